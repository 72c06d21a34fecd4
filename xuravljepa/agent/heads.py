"""What phase 3 trains beside the model: monitor, injector and tool selector, with their file."""

from dataclasses import dataclass, field

import numpy as np

from xuracore import nn
from xuracore.config import Config
from xuravljepa.agent.confusion import ConfusionMonitor, MonitorConfig
from xuravljepa.agent.injector import InjectorConfig, StateInjector
from xuravljepa.agent.selection import SelectorConfig, ToolSelector


@dataclass(frozen=True)
class AgentConfig(Config):
    """Sizes of the heads, and what validation found.

    confident_below, abstain_above : p(wrong) under which no tool is called, over which the answer is a guess.
    fixes, breaks : P(an injection makes a wrong answer right), P(it makes a right one wrong).
    cost : of a call, in units of a right answer.   errs : how often a tool is taken to be wrong before anything is
    known of it.   cards : {tool: the text that describes it}, as trained.   words : all that the questions of
    training had; () where that is not known.
    """

    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    injector: InjectorConfig = field(default_factory=InjectorConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    confident_below: float = 0.1
    abstain_above: float = 0.5
    fixes: float = 0.9
    breaks: float = 0.02
    cost: float = 0.05
    errs: float = 0.02
    cards: dict = field(default_factory=dict)
    words: tuple = ()

    @classmethod
    def for_model(cls, config, tools=(), mode="state"):
        """The sizes that fit a model's configuration; a bidirectional predictor has no states: it reads the text."""
        p = config.predictor
        mode = "text" if p.bidirectional and mode == "state" else mode
        return cls(
            monitor=MonitorConfig(read_dim=p.d_model, vision_dim=p.vision_dim),
            injector=InjectorConfig(mode=mode, knowledge_dim=p.embed_dim, width=64 if p.embed_dim > 256 else 0),
            selector=SelectorConfig(read_dim=p.d_model, embed_dim=p.embed_dim, tools=tuple(tools)),
        )


class AgentHeads(nn.Module):
    """``monitor``, ``injector`` and ``selector``; ``config`` is an :class:`AgentConfig`."""

    def __init__(self, config, predictor_config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.injector = StateInjector(config.injector, predictor_config, rng=rng)
        self.selector = ToolSelector(config.selector, rng=rng)
        self.monitor = ConfusionMonitor(config.monitor, rng=rng)
