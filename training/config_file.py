"""Options from a file: ``--config FILE`` and ``--set key=value`` beside the flags of a script.

    python training/scripts/train_jepa.py --config run.toml --set lr=1e-3 --batch-size 64

Defaults give way to the file, the file to ``--set``, and that to flags.  A key is the name of an option,
with ``_`` or ``-`` between its words; the file is a flat JSON object or TOML table.
"""

import argparse
import difflib
import json
import tomllib
from pathlib import Path

from xuracore import io
from xuracore.errors import ConfigError, FormatError

RESOLVED = "config.resolved.json"
ABOUT_ONE_CALL = ("help", "config", "set", "dry_run", "resume", "overwrite")  # not part of what a run is


class ConfigParser(argparse.ArgumentParser):
    """An ArgumentParser that also takes its options from a file; see the head of this file."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        group = self.add_argument_group("settings from a file")
        group.add_argument("--config", metavar="FILE", help="JSON or TOML with options; flags win over it")
        group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                           help="an option by its name, as in the file; may be repeated")

    def parse_args(self, args=None, namespace=None):
        """As argparse does; ConfigError or FormatError for what the file or a ``--set`` gets wrong."""
        early = argparse.ArgumentParser(prog=self.prog, add_help=False, argument_default=argparse.SUPPRESS)
        early.add_argument("--config")
        early.add_argument("--set", action="append")
        given = vars(early.parse_known_args(args)[0])
        namespace = argparse.Namespace() if namespace is None else namespace
        if "config" in given:
            self._fill(namespace, read_config(given["config"]), given["config"])
        for text in given.get("set", ()):
            key, found, value = text.partition("=")
            if not found:
                raise ConfigError(f"--set {text!r}; expected KEY=VALUE")
            self._fill(namespace, {key.strip(): _value_of(value)}, "--set")
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error("unrecognized arguments: " + " ".join(
                word + (_nearest(word.partition("=")[0], flags) if word.startswith("-") else "") for word in unknown))
        return known

    def _fill(self, namespace, values, source):
        actions = {action.dest: action for action in self._actions if action.option_strings}
        aliases = {flag.lstrip("-").replace("-", "_"): action.dest for action in self._actions
                   for flag in action.option_strings}
        for key, value in values.items():
            name = aliases.get(key.replace("-", "_"))
            if name is None or name in ("help", "config", "set"):
                raise ConfigError(f"{source}: unknown key {key!r}{_nearest(key.replace('-', '_'), aliases)}")
            setattr(namespace, name, self._checked(actions[name], key, value, source))

    def _checked(self, action, key, value, source):
        """``value`` as the option would have read it."""
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise ConfigError(f"{source}: {key} is {value!r}; expected true or false")
            return value
        if value is None and action.default is None:
            return None
        if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
            if not isinstance(value, list):
                raise ConfigError(f"{source}: {key} is {value!r}; expected a list")
            return [self._one(action, key, part, source) for part in value]
        return self._one(action, key, value, source)

    def _one(self, action, key, value, source):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(f"{source}: {key} is {json.dumps(value)}; expected a number or a text")
        try:
            value = self._get_value(action, str(value))
            self._check_value(action, value)
        except argparse.ArgumentError as error:
            raise ConfigError(f"{source}: {key}: {error.message}") from None
        return value


def read_config(path):
    """The dict in a JSON or TOML file; FormatError or ConfigError if it is something else."""
    path = Path(path)
    if path.suffix == ".toml":
        try:
            with open(path, "rb") as file:
                return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"is not TOML: {error}", path) from None
    if path.suffix != ".json":
        raise ConfigError(f"--config {path}: a configuration is a .json or a .toml file")
    values = io.load_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"holds a {type(values).__name__}; expected an object of options", path)
    return values


def resolved(args):
    """{option: value}, every default written out; read as a file it gives the same options again."""
    return {name: value for name, value in sorted(vars(args).items())
            if name[0] != "_" and name not in ABOUT_ONE_CALL}


def write_resolved(args, folder):
    """Write ``config.resolved.json`` into ``folder``."""
    io.save_json(Path(folder) / RESOLVED, resolved(args))


def _value_of(text):
    """A JSON value where the text is one (1e-3, true, null, ["a"]), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _nearest(word, known):
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
