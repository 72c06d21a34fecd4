"""What an agent has in view, in a file: the picture's tokens, and the predictor's states after the last question.

Safetensors with a version, a digest of the X-Encoder that made the tokens, one of the predictor whose states they
are, and one of all numbers.
"""

import hashlib

import numpy as np

from xuracore import io, no_grad
from xuracore.errors import FormatError, ShapeError
from xuracore.tensor import Tensor
from xuravljepa.model import CAPTION_QUERY

VERSION = 3


def save(agent, path):
    """See ``Agent.save_state``."""
    if agent.seen is None:
        raise ShapeError("the agent has seen nothing yet")
    states = () if agent.model.config.predictor.bidirectional else agent.states or ()  # its own carry nothing on
    tensors = {"visual": agent.seen, **parts(states)}
    about = {"version": str(VERSION), "picture": agent.picture, "x_encoder": agent.eyes(),
             "predictor": weights_digest(agent.model.predictor), "turn": str(agent.turn), "sha256": digest(tensors)}
    io.save_safetensors(path, tensors, about)


def load(agent, path):
    """See ``Agent.load_state``."""
    try:
        metadata, tensors = io.read_metadata(path), io.load_safetensors(path)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path) from None
    if metadata.get("version") != str(VERSION):
        version = metadata.get("version")
        raise FormatError(f"state version {version!r:.40}; this program reads {VERSION}", path)
    if metadata.get("x_encoder") != agent.eyes():
        raise FormatError("belongs to another model, whose X-Encoder sees differently", path)
    visual, vision = tensors.get("visual", np.zeros(0)), agent.model.config.vision
    needed = 3 if agent.trained and agent.heads.monitor.config.shift else 1
    expected = vision.n_tokens, vision.d_model
    if visual.shape[1:] != expected or len(visual) < needed or not _is_finite(visual):
        raise FormatError(f"expected finite float32 {(needed, *expected)}, got {visual.dtype} {visual.shape}", path,
                          "visual")
    if digest(tensors) != metadata.get("sha256"):
        raise FormatError("its checksum does not fit: it was damaged", path)
    turn, states = metadata.get("turn", ""), None
    if not (turn.isascii() and turn.isdigit() and len(turn) < 10):
        raise FormatError(f"turn is {turn!r:.40}; expected a number", path)
    if len(tensors) > 1 and metadata.get("predictor") == weights_digest(agent.model.predictor):
        states = _states(agent.model, tensors, visual[:needed], path)
    agent.restore(visual[:needed], metadata.get("picture", ""), states, int(turn))


@no_grad()
def _states(model, tensors, visual, path):
    """The predictor's states out of the tensors of a file, checked against those of a look of our own."""
    query = np.repeat(model.query_tokens([CAPTION_QUERY]), len(visual), axis=0)
    like = model.predictor.look(query, visual)
    for name, part in parts(like).items():
        found = tensors.get(name)
        if found is None or found.shape[1:] != part.shape[1:] or len(found) < len(part) or not _is_finite(found):
            raise FormatError(f"expected finite float32 {part.shape}", path, name)
    return [type(state)(*(Tensor(tensors[f"states.{i}.{field}"][: len(visual)]) for field in state._fields))
            for i, state in enumerate(like)]


def parts(states):
    """{name: array} of the predictor's states."""
    return {f"states.{i}.{field}": np.ascontiguousarray(part.data)
            for i, state in enumerate(states) for field, part in zip(state._fields, state)}


def weights_digest(module, more=""):
    """SHA-256 of a module's weights, and of a text."""
    return digest(module.state_dict(), more)


def digest(tensors, more=""):
    """SHA-256 of named arrays, and of a text."""
    found = hashlib.sha256(more.encode())
    for name, array in sorted(tensors.items()):
        found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _is_finite(array):
    return array.dtype == np.float32 and bool(np.isfinite(array).all())
