"""Recorded episodes as RLDS JSON: reading with every check, and the arrays that training takes.

    {"steps": [{"observation": {…}, "action": {"command": [0.1, …]}, "reward": 0.0, "is_terminal": false}, …]}

A step may also have ``timestamp`` (seconds, never going back), and an action ``planner`` and ``tool_calls``.
The inputs of a step are its observation, the action before it and the reward before it; what is to be
learned is its own action.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xuracore.errors import FormatError
from xuracore.io.strict_json import load_json

TAIL = 16  # the last dimensions of an action that tell of planner and tools: 8 for each


class RLDSValidationError(FormatError):
    """An episode is not what training can use; the message names file, step and reason."""


class Episode(NamedTuple):
    """One recording as arrays."""

    obs: np.ndarray  # (T, obs_dim)
    actions: np.ndarray  # (T, action_dim)
    rewards: np.ndarray  # (T)
    terminal: np.ndarray  # (T)


class Validation(NamedTuple):
    """What :func:`validate` found."""

    total_files: int
    trainable_files: int
    total_steps: int
    issues: list  # of text
    is_valid: bool


def read_episode(path, obs_dim, action_dim):
    """The Episode of a JSON file; RLDSValidationError for anything that is not one."""
    try:
        data = load_json(path)
    except RLDSValidationError:
        raise
    except FormatError as error:
        raise RLDSValidationError(error.reason, path, error.entry) from None
    return episode_from(data, obs_dim, action_dim, path)


def episode_from(data, obs_dim, action_dim, path=None):
    """The Episode of decoded JSON; RLDSValidationError names the step that is wrong."""
    steps = data.get("steps") if isinstance(data, dict) else None
    if not isinstance(steps, list) or not steps:
        raise RLDSValidationError('expected {"steps": [...]} with at least one step', path)
    obs, actions, rewards, terminal, clock, widths = [], [], [], [], -math.inf, None
    for i, step in enumerate(steps):
        where = f"step {i}"
        if not isinstance(step, dict):
            raise RLDSValidationError(f"is a {type(step).__name__}; expected an object", path, where)
        for key, kind in (("observation", dict), ("action", dict)):
            if not isinstance(step.get(key), kind):
                raise RLDSValidationError(f"has no {key} object", path, where)
        time = step.get("timestamp", clock)
        if isinstance(time, bool) or not isinstance(time, (int, float)) or time < clock:
            raise RLDSValidationError(f"its timestamp {time!r} goes back behind {clock!r}", path, where)
        clock = time
        reward, ended = step.get("reward", 0.0), step.get("is_terminal", False)
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise RLDSValidationError(f"its reward is {reward!r}; expected a finite number", path, where)
        if not isinstance(ended, bool):
            raise RLDSValidationError(f"is_terminal is {ended!r}; expected true or false", path, where)
        raw = _numbers(step["observation"], path, f"{where}, observation")
        command = _numbers(step["action"].get("command"), path, f"{where}, action.command")
        if not command:
            raise RLDSValidationError("its action has no command: a list of numbers", path, where)
        if widths is None:
            widths = len(raw), len(command)
        if (len(raw), len(command)) != widths:
            raise RLDSValidationError(
                f"has {len(raw)} observed numbers and a command of {len(command)}; step 0 has {widths[0]} and "
                f"{widths[1]}", path, where)
        obs.append(_fitted(observation_vector(step["observation"], path, where), obs_dim))
        actions.append(action_vector(step["action"], action_dim))
        rewards.append(reward)
        terminal.append(ended)
    return Episode(np.array(obs, np.float32), np.array(actions, np.float32), np.array(rewards, np.float32),
                   np.array(terminal))


def _numbers(value, path, where):
    """Every number in nested JSON, depth first, keys in order of the alphabet; strings and null are passed over."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in _numbers(value[key], path, where)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _numbers(item, path, where)]
    if isinstance(value, bool):
        return [float(value)]
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or abs(value) > 1e30:
            raise RLDSValidationError(f"holds {value!r}; expected finite numbers", path, where)
        return [float(value)]
    return []


def observation_vector(observation, path=None, where=None):
    """The numbers of an observation: joint positions, command and pose first, if it has them, then all others."""
    rest, first = dict(observation), []
    state = rest.pop("robot_state", None)
    if isinstance(state, dict):
        state = dict(state)
        first += _numbers(state.pop("joint_positions", None), path, where)
        rest["robot_state"] = state
    for key in ("command", "pose"):
        first += _numbers(rest.pop(key, None), path, where)
    return first + _numbers(rest, path, where)


def action_vector(action, action_dim):
    """The command, padded or cut to action_dim; its last 16 numbers tell of planner and tools where there are any.

    That tail is 8 numbers of the plan's text and 8 of the tools' names, bytes of their SHA-256 in [-1, 1].
    """
    vector = _fitted(_numbers(action.get("command"), None, None), action_dim)
    planner, tools = action.get("planner"), action.get("tool_calls")
    if (planner or tools) and action_dim >= TAIL:
        plan = planner if isinstance(planner, dict) else {}
        text = " ".join([str(plan.get("intent", "")), *map(str, plan.get("plan_steps") or [])])
        names = " ".join(str(call.get("name", "")) for call in tools or [] if isinstance(call, dict))
        vector[-TAIL:] = [*_hashed(text), *_hashed(names)]
    return vector


def _hashed(text):
    return [byte / 127.5 - 1 for byte in hashlib.sha256(text.encode()).digest()[: TAIL // 2]]


def _fitted(values, size):
    return (list(values) + [0.0] * size)[:size]


def episode_files(folder):
    """The JSON files of a folder, sorted; RLDSValidationError if there are none."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise RLDSValidationError("holds no .json file", folder)
    return files


def load_episodes(folder, obs_dim, action_dim):
    """All episodes of a folder; RLDSValidationError for the first that is wrong."""
    return [read_episode(path, obs_dim, action_dim) for path in episode_files(folder)]


def validate(folder, obs_dim=128, action_dim=32, *, raise_if_invalid=False):
    """Check every file of a folder; returns a Validation, or raises RLDSValidationError with all issues."""
    issues, good, steps = [], 0, 0
    try:
        files = episode_files(folder)
    except RLDSValidationError as error:
        files, issues = [], [str(error)]
    for path in files:
        try:
            steps += len(read_episode(path, obs_dim, action_dim).rewards)
            good += 1
        except RLDSValidationError as error:
            issues.append(str(error))
    if issues and raise_if_invalid:
        raise RLDSValidationError("; ".join(issues[:5]) + (" …" if len(issues) > 5 else ""), folder)
    return Validation(len(files), good, steps, issues, not issues)


class Batch(NamedTuple):
    """Steps of several streams side by side; a stream is one episode after the other."""

    obs: np.ndarray  # (B, T, obs_dim)
    previous: np.ndarray  # (B, T, action_dim) the action before, zero at the beginning of an episode
    rewards: np.ndarray  # (B, T, 1) the reward before
    target: np.ndarray  # (B, T, action_dim) the action to learn
    resets: np.ndarray  # (B, T) an episode begins here


def inputs_of(episode):
    """A Batch of one row from an episode; a new one begins after every step that ``is_terminal``."""
    begins = np.concatenate([[True], episode.terminal[:-1]])
    previous = np.concatenate([np.zeros_like(episode.actions[:1]), episode.actions[:-1]])
    rewards = np.concatenate([np.zeros(1, np.float32), episode.rewards[:-1]])
    previous[begins], rewards[begins] = 0, 0
    return Batch(*(x[None] for x in (episode.obs, previous, rewards[:, None], episode.actions, begins)))


class Streams:
    """Endless Batches of ``length`` steps for truncated backpropagation: each row goes on where it stopped."""

    def __init__(self, episodes, batch, length, rng):
        self._rows = [inputs_of(episode) for episode in episodes]
        self._batch, self._length, self._rng = batch, length, rng
        self._rest = [self._next() for _ in range(batch)]

    def _next(self):
        return self._rows[self._rng.integers(len(self._rows))]

    def __iter__(self):
        while True:
            rows = []
            for i in range(self._batch):
                row = self._rest[i]
                while row.obs.shape[1] < self._length:
                    row = Batch(*(np.concatenate(pair, axis=1) for pair in zip(row, self._next())))
                rows.append(Batch(*(x[:, : self._length] for x in row)))
                self._rest[i] = Batch(*(x[:, self._length :] for x in row))
            yield Batch(*(np.concatenate(parts) for parts in zip(*rows)))


def fingerprint(episodes):
    """A hash of all numbers of the episodes, so that a proof can name its data."""
    digest = hashlib.sha256()
    for episode in episodes:
        for part in episode:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
