"""The agent's parts: tools, the recursion that calls them, and the trace of what happened.

Names are loaded when they are first used: a tool's process imports this package without its weight.
"""

import importlib

_HOME = {
    "agent": ("Agent", "Reply"),
    "arguments": ("AskModel", "Constant", "FromQuestion", "Template"),
    "budget": ("Budget",),
    "builtin": ("KnowledgeBase", "MemorySearch", "add", "calculator", "echo"),
    "errors": ("ArgumentError", "MemoryBusyError", "ReplayError", "ToolError"),
    "memory": ("Memory", "MemoryConfig", "VisualMemory"),
    "picture": ("draw_scenes", "write_png"),
    "recall": ("Recollection", "frames_in"),
    "recursion": ("Outcome", "PatternSelector", "Proposal", "Reading", "RecursionConfig", "RecursionLayer"),
    "report": ("html_page", "write_html"),
    "sandbox": ("Limits", "Sandbox"),
    "selective": ("Decode", "SelectiveConfig", "SelectiveDecoder", "ward_segments"),
    "story": ("Scene",),
    "tools": ("Output", "Tool", "ToolRegistry", "ToolRequest", "ToolResult", "Usefulness"),
    "trace": ("Replay", "Run", "Step", "Trace", "read_traces"),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}

__all__ = sorted(_ROOM)


def __getattr__(name):
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM[name]}"), name)


def __dir__():
    return __all__
