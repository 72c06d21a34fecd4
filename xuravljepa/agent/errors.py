"""What can go wrong between the agent and its tools."""

from xuracore.errors import XuraError


class ToolError(XuraError, ValueError):
    """A tool is described wrongly, is unknown, or has a name that is taken."""


class ArgumentError(XuraError, ValueError):
    """An argument is missing, has the wrong type or cannot be produced; the message names it."""

    def __init__(self, parameter, reason):
        super().__init__(f"{parameter}: {reason}")
        self.parameter, self.reason = parameter, reason


class ReplayError(XuraError, RuntimeError):
    """A replayed run asked for something that its trace did not record."""


class MemoryBusyError(XuraError, RuntimeError):
    """A visual memory is written by another process, or cannot be written because it is closed."""
