"""Choosing a tool by meaning: questions and tool descriptions meet in one space.

    e_m = s · cos(W h, t_m),    t_m = norm(YEnc(card of tool m) + offset_m),    and one score for "no tool"

h are the pooled READ features.  Offsets are learned for the tools seen in training; a tool registered
later has none and is known by its description alone.
"""

from dataclasses import dataclass

import numpy as np

from xuracore import nn, no_grad, ops
from xuracore.config import Config
from xuracore.nn import init
from xuravljepa.agent.recursion import Proposal


@dataclass(frozen=True)
class SelectorConfig(Config):
    """``tools``: names of the tools that training knows, in the order of their offsets."""

    read_dim: int = 96
    embed_dim: int = 64
    tools: tuple = ()


class ToolSelector(nn.Module):
    """pooled (B, read_dim) → logits (B, 1 + tools); column 0 is "no tool"."""

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.query = nn.Linear(config.read_dim, config.embed_dim, rng=rng)
        self.none = nn.Parameter(init.normal((1, config.embed_dim), rng, 1.0))
        self.offsets = nn.Parameter(init.zeros((len(config.tools), config.embed_dim)))
        self.log_scale = nn.Parameter(np.array(2.0, np.float32))

    def forward(self, pooled, cards, names):
        """cards (tools, embed_dim) embeddings of the tools' cards, names: their names, in the same order."""
        known = np.zeros((len(names), len(self.config.tools)), np.float32)
        for row, name in enumerate(names):
            if name in self.config.tools:
                known[row, self.config.tools.index(name)] = 1
        tools = cards + ops.matmul(known, self.offsets) if known.size else cards
        targets = ops.l2_normalize(ops.concatenate(self.none, tools, axis=0))
        asked = ops.l2_normalize(self.query(pooled))
        return ops.linear(asked, targets) * ops.exp(self.log_scale)

    @no_grad()
    def rank(self, pooled, cards, tools, question):
        """Proposals for one question (pooled (1, d)), best first.

        A tool is proposed if its arguments can be found in the question and it scores above "no tool";
        one that training never saw needs only the first.
        """
        if not tools:
            return []
        logits = self(pooled, cards, [tool.name for tool in tools]).data[0].astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        proposals = []
        for tool, score, logit in zip(tools, p[1:], logits[1:]):
            unseen = tool.name not in self.config.tools
            if tool.applies(question) and (unseen or logit > logits[0]):
                proposals.append(Proposal(tool.name, float(score)))
        return sorted(proposals, key=lambda proposal: -proposal.score)
