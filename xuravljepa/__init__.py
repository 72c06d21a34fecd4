"""Vision, language and agent: VL-JEPA on Mamba-3.

Names are loaded when they are first used, so that a tool's own process starts without their weight.
"""

import importlib

_HOME = {
    "VisionTransformer": "vit", "VitConfig": "vit", "VLJEPA": "model", "VLJEPAConfig": "presets",
    "Agent": "agent.agent", "Reply": "agent.agent", "ByteTokenizer": "tokenizer",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
