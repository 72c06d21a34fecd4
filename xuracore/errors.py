"""The one exception family of Xura.

Each error says what was given, what was expected and what to do.  They derive from the
built-in exception a caller would catch anyway, so ``except ValueError`` keeps working.
"""


class XuraError(Exception):
    """Base class of every error raised on purpose by Xura."""


class ShapeError(XuraError, ValueError):
    """An array has the wrong number of dimensions or the wrong sizes."""


class DTypeError(XuraError, TypeError):
    """An array or argument has the wrong element type or Python type."""


class ConfigError(XuraError, ValueError):
    """A configuration has an unknown key or a value out of range."""


class GradError(XuraError, RuntimeError):
    """The tape was asked for something it cannot give."""


class FormatError(XuraError, ValueError):
    """A file is not what it claims to be, or is damaged.

    The message names the file, the entry inside it where there is one, and the reason.
    """

    def __init__(self, reason, path=None, entry=None):
        where = "" if path is None else f"{path}: "
        what = "" if entry is None else f"{entry!r}: "
        super().__init__(f"{where}{what}{reason}")
        self.path, self.entry, self.reason = path, entry, reason


class MissingExtraError(XuraError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""

    def __init__(self, package, extra):
        super().__init__(f"{package} is not installed; install it with: pip install 'xura[{extra}]'")
        self.package, self.extra = package, extra
