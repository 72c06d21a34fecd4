"""The agent's parts: tools, the recursion that calls them, and the trace of what happened.

Names are loaded when they are first used: a tool's process imports this package without its weight.
"""

import importlib

_HOME = {
    "AskModel": "arguments", "Constant": "arguments", "FromQuestion": "arguments", "Template": "arguments",
    "ArgumentError": "errors", "ReplayError": "errors", "ToolError": "errors",
    "KnowledgeBase": "builtin", "MemorySearch": "builtin", "add": "builtin", "calculator": "builtin",
    "echo": "builtin",
    "Limits": "sandbox", "Sandbox": "sandbox",
    "Output": "tools", "Tool": "tools", "ToolRegistry": "tools", "ToolRequest": "tools",
    "ToolResult": "tools",
    "Usefulness": "tools",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
