"""What every configuration can do: be a frozen dataclass, and come from and go to plain JSON data."""

import dataclasses
import difflib
import types
import typing

from xuracore.errors import ConfigError


class Config:
    """Mixin for frozen dataclasses.

        @dataclass(frozen=True)
        class VitConfig(Config):
            depth: int = 12

        VitConfig.from_dict({"depht": 2})   # ConfigError: unknown key 'depht' …, did you mean 'depth'?
    """

    @classmethod
    def from_dict(cls, data):
        """Build from plain data; ConfigError for an unknown key, a missing one or a wrong type."""
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__} needs a JSON object; got {type(data).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for key in data:
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, 1)
                hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
                raise ConfigError(f"{cls.__name__}: unknown key {key!r}{hint}")
        values = {key: _convert(f"{cls.__name__}.{key}", hints[key], value) for key, value in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from None

    def to_dict(self):
        """Plain data for JSON; ``from_dict`` gives the same configuration back."""
        return dataclasses.asdict(self)

    def replace(self, **changes):
        """A copy with some values changed; unknown names and wrong types are refused as in ``from_dict``."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _convert(where, kind, value):
    """``value`` checked against an annotation; whole numbers serve as floats, nothing else is coerced."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(where, option, value)
            except ConfigError:
                continue
    elif (kind is tuple or origin is tuple) and isinstance(value, (list, tuple)):
        kinds = typing.get_args(kind) or (object, ...)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(kinds) == len(value):
            return tuple(_convert(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(kinds, value)))
    elif isinstance(kind, type) and issubclass(kind, Config):
        return value if isinstance(value, kind) else kind.from_dict(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is type(None):
        if value is None:
            return None
    elif isinstance(kind, type) and type(value) is kind or kind is object:
        return value
    name = getattr(kind, "__name__", None) or str(kind)
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {name}")


def require_positive(config, *names):
    """ConfigError unless each of the named sizes is at least 1."""
    for name in names:
        size = getattr(config, name)
        require(size >= 1, f"{type(config).__name__}.{name} is {size}; expected at least 1")


def require(condition, message):
    """ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)
