"""The tool router: which tool a request asks for, from a hashed bag of words and one linear softmax.

Words go to one of 4096 columns by their MD5, the vector is brought to length 1, and a linear map learns the most
frequent tools and ``__other__``.  A request is held out when the MD5 of its text is 0 modulo 10: by its content
alone, so that no held-out text is ever trained on, however often it occurs.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from training.optim import Adam
from xuracore import ops
from xuracore.config import require
from xuracore.errors import FormatError
from xuracore.io.strict_json import load_json, save_json
from xuracore.nn import Parameter
from xuramamba.wavecore.checkpoint import load_arrays, save_arrays

COLUMNS, TOP, OTHER = 4096, 128, "__other__"
WEIGHTS, MANIFEST = "tool_router.npz", "tool_router_manifest.json"


def _md5(text):
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest(), "big")


def held_out(text):
    """Whether a request belongs to the evaluation."""
    return _md5(text) % 10 == 0


def features(texts):
    """Requests as rows (n, 4096) of length 1; a text without words is zero."""
    x = np.zeros((len(texts), COLUMNS), np.float32)
    for row, text in zip(x, texts):
        for word in re.findall(r"\w+", text.lower()):
            row[_md5(word) % COLUMNS] += 1
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class ToolRouter:
    """W (4096, tools), b (tools) and the tools' names, the last ``__other__``."""

    def __init__(self, weight, bias, tools):
        self.weight, self.bias, self.tools = weight, bias, list(tools)

    def probabilities(self, texts):
        """(n, tools) for a list of requests."""
        return ops.softmax(features(texts) @ self.weight + self.bias, axis=-1)

    def infer(self, text, count=5):
        """[(tool, probability)] of the likeliest tools."""
        row = self.probabilities([text])[0]
        return [(self.tools[i], float(row[i])) for i in np.argsort(-row)[:count]]

    def save(self, folder):
        """Write tool_router.npz and tool_router_manifest.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder / WEIGHTS, {"W": self.weight, "b": self.bias})
        save_json(folder / MANIFEST, {"model_type": "tool_router", "version": "1.0.0", "columns": COLUMNS,
                                      "tools": self.tools})

    @classmethod
    def load(cls, folder):
        """Of a folder; FormatError for a damaged one."""
        folder = Path(folder)
        about, found = load_json(folder / MANIFEST), load_arrays(folder / WEIGHTS)
        tools = about.get("tools") if isinstance(about, dict) else None
        named = isinstance(tools, list) and all(isinstance(tool, str) for tool in tools)
        if not named or found.keys() != {"W", "b"}:
            raise FormatError("expected a list of tools, and W and b", folder)
        if found["W"].shape != (COLUMNS, len(tools)) or found["b"].shape != (len(tools),):
            raise FormatError(f"W {found['W'].shape} and b {found['b'].shape} do not fit {len(tools)} tools", folder)
        return cls(found["W"], found["b"], tools)


def train(pairs, *, steps=600, batch=64, lr=3e-3, seed=0):
    """A ToolRouter from (request, tool) pairs, of which the held-out ones are left aside."""
    pairs = [(text, tool) for text, tool in pairs if not held_out(text)]
    require(pairs, "no request is left to train on: all are held out, or none was given")
    names, counts = np.unique([tool for _, tool in pairs], return_counts=True)
    tools = [str(name) for name in names[np.argsort(-counts, kind="stable")][:TOP]] + [OTHER]
    place = {tool: i for i, tool in enumerate(tools)}
    x = features([text for text, _ in pairs])
    target = np.array([place.get(tool, len(tools) - 1) for _, tool in pairs])
    weight, bias = Parameter(np.zeros((COLUMNS, len(tools)), np.float32)), Parameter(np.zeros(len(tools), np.float32))
    optimizer, rng = Adam([weight, bias], lr=lr), np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(x), batch)
        loss = ops.cross_entropy(ops.matmul(x[rows], weight) + bias, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ToolRouter(weight.data, bias.data, tools)


def evaluate(router, pairs):
    """{"top1", "top5", "count"} on the held-out requests among ``pairs``, each text once."""
    pairs = sorted({(text, tool) for text, tool in pairs if held_out(text)})
    require(pairs, "no request is held out: give more of them")
    order = np.argsort(-np.asarray(router.probabilities([text for text, _ in pairs])), axis=1)
    known = {tool: i for i, tool in enumerate(router.tools)}
    right = np.array([known.get(tool, len(router.tools) - 1) for _, tool in pairs])
    hits = order[:, :5] == right[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean()), "count": len(pairs)}


_TASKS = {
    "move_arm": (("move", "bring", "swing"), ("the arm", "the elbow", "the wrist")),
    "open_gripper": (("open", "release", "loosen"), ("the gripper", "the hand", "your fingers")),
    "close_gripper": (("close", "tighten", "clench"), ("the gripper", "the hand", "your fingers")),
    "take_picture": (("photograph", "capture", "take a picture of"), ("the table", "the room", "the shelf")),
    "measure_distance": (("measure", "estimate", "tell"), ("how far the wall is", "the distance", "the gap")),
    "navigate": (("drive to", "go to", "roll towards"), ("the kitchen", "the dock", "the window")),
    "speak": (("say", "announce", "speak"), ("hello", "the time", "that you are ready")),
    "charge": (("charge", "refill", "plug in"), ("the battery", "yourself", "your cells")),
}  # fmt: skip


def generated_requests(count=2000, seed=0):
    """(request, tool) pairs of eight tools of a robot, with politeness and hurry mixed in."""
    rng, pairs = np.random.default_rng(seed), []
    before = ("please", "now", "robot,", "could you", "kindly", "")
    after = ("", "slowly", "at once", "for me", "again", "when you can", "if possible", "carefully", "before lunch")
    names = sorted(_TASKS)
    for _ in range(count):
        tool = names[rng.integers(len(names))]
        verbs, objects = _TASKS[tool]
        words = (rng.choice(before), rng.choice(verbs), rng.choice(objects), rng.choice(after), rng.choice(after))
        pairs.append((" ".join(word for word in words if word), tool))
    return pairs


def read_requests(folder):
    """(request, tool) pairs of RLDS episodes: each step's planner intent with the first tool that it calls."""
    pairs = []
    for path in sorted(Path(folder).glob("*.json")):
        steps = load_json(path).get("steps", [])
        for step in steps if isinstance(steps, list) else []:
            action = step.get("action") if isinstance(step, dict) else None
            action = action if isinstance(action, dict) else {}
            planner, calls = action.get("planner"), action.get("tool_calls")
            if isinstance(planner, dict) and planner.get("intent") and isinstance(calls, list) and calls:
                name = calls[0].get("name") if isinstance(calls[0], dict) else None
                if isinstance(name, str):
                    pairs.append((str(planner["intent"]), name))
    if not pairs:
        raise FormatError("holds no step with a planner's intent and a tool call", folder)
    return pairs
