"""What a training run must remember to go on as if it had never stopped.

A checkpoint (see :class:`xuracore.io.CheckpointDirectory`) holds

    model.safetensors       parameters and buffers
    optimizer.safetensors   optimizer.<slot>.<parameter> and, with averaged weights, ema.average.<parameter>
    trainer.json            step, skipped steps, open sums of the log, generators, threads, versions
    config.json             the run's configuration, as the caller describes it

Generators are those given by name and every ``numpy.random.Generator`` that a module holds.
"""

import hashlib

import numpy as np

import xuracore as xc
from xuracore.errors import FormatError


def generator_state(generator):
    """The state of a ``numpy.random.Generator`` as plain JSON data."""
    return _plain(generator.bit_generator.state)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def restore_generator(generator, state):
    """Set ``generator`` to a state made by :func:`generator_state`; FormatError if it is of another kind."""
    try:
        generator.bit_generator.state = _rich(state)
    except (TypeError, ValueError, KeyError) as error:
        kind = type(generator.bit_generator).__name__
        raise FormatError(f"the saved state does not fit a {kind} generator: {error}") from None


def _rich(value):
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array", "dtype"}:
        return np.array(value["array"], dtype=value["dtype"])
    return {key: _rich(part) for key, part in value.items()}


def module_generators(model):
    """{"path.attribute": Generator} of every generator held by a module of ``model``."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, np.random.Generator)
    }


def digest(tensors):
    """SHA-256 over names, dtypes, shapes and bytes of {name: array}: equal digests are equal tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def save(directory, step, model, optimizer, average=None, generators=None, progress=None, config=None,
         others=()):
    """Write a checkpoint of all this to the CheckpointDirectory; returns its folder.

    average : ExponentialMovingAverage or None.   generators : {name: Generator}.
    progress, config : JSON data for trainer.json and config.json.   others : for ranks 1, 2, … of a run on
    several, the states of their generators.
    """
    state = {f"optimizer.{key}": array for key, array in optimizer.state_dict().items()}
    if average is not None:
        state.update({f"ema.{key}": array for key, array in average.state_dict().items()})
    every = {**module_generators(model), **(generators or {})}
    trainer = {
        "step": step,
        "progress": progress,
        "generators": {name: generator_state(generator) for name, generator in every.items()},
        "others": list(others),
        "threads": xc.get_num_threads(),
        "versions": {"xuracore": xc.__version__, "numpy": np.__version__},
    }
    return directory.save(step, model.state_dict(), optimizer=state, trainer=trainer, config=config)


def load(directory, model, optimizer, average=None, generators=None, step=None):
    """Read a checkpoint into the given objects; returns ``(step, progress, config, trainer)``.

    step : which one; None for the latest that is whole.  Raises FormatError or StateDictError if it
        does not fit; the optimizer and the average are only changed once the model fitted.
    """
    found = directory.load(step)
    if found.optimizer is None or found.trainer is None:
        raise FormatError("holds a model, but no state to resume training from", str(found.path))
    every = {**module_generators(model), **(generators or {})}
    saved = found.trainer.get("generators", {})
    if saved.keys() != every.keys():
        raise FormatError(f"has generators {sorted(saved)}; this run has {sorted(every)}", str(found.path))
    model.load_state_dict(found.model)
    optimizer.load_state_dict(_part(found.optimizer, "optimizer."))
    averaged = _part(found.optimizer, "ema.")
    if average is not None:
        average.load_state_dict(averaged)
    elif averaged:
        raise FormatError("has averaged weights; this run has none", str(found.path))
    for name, generator in every.items():
        restore_generator(generator, saved[name])
    return found.step, found.trainer.get("progress"), found.config, found.trainer


def _part(state, prefix):
    return {key[len(prefix) :]: array for key, array in state.items() if key.startswith(prefix)}


def as_json(value):
    """``value`` as it comes back from a JSON file: tuples are lists."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def differences(saved, now, place="", most=8):
    """["batch_size was 64, is 32", …] between two JSON values, at most so many."""
    if isinstance(saved, dict) and isinstance(now, dict):
        place = f"{place}." if place else ""
        names = dict.fromkeys([*saved, *now])
        found = [text for name in names for text in differences(saved.get(name), now.get(name), f"{place}{name}")]
        return found[:most]
    if saved == now:
        return []
    was, has = (text if len(text := repr(value)) < 60 else "another" for value in (saved, now))
    return [f"{place or 'the description'} was {was}, is {has}"]
