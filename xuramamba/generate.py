"""Token by token with a state of constant size: each new token costs the same, however long the past."""

import contextlib
import signal
import threading
import time
from typing import NamedTuple

import numpy as np

from xuracore.autograd import no_grad
from xuracore.errors import ConfigError, ShapeError
from xuramamba.decode import decoder_of
from xuramamba.sampling import check_options, choose, penalize_repetition
from xuramamba.state import select, stack

PREFILL_CHUNK = 1024  # tokens of a prompt that are read at once: bounds memory, whatever its length


class Generated(NamedTuple):
    """What :func:`generate` made, with ``details=True``."""

    ids: object  # (B, L + new) int64, or for prompts of several lengths a list of rows
    state: tuple  # of the model after all of ids, to go on from
    reasons: tuple  # of each row: "stop id", "stop string", "length", "callback" or "interrupted"
    prompt_tokens: int  # of all rows
    new_tokens: int  # of all rows
    prefill_seconds: float
    decode_seconds: float


def generate(
    model, token_ids, max_new_tokens=64, temperature=0.0, top_k=None, top_p=None, rng=None, stop=None,
    stream=None, *, repetition_penalty=1.0, min_new_tokens=0, stop_strings=(), tokenizer=None, state=None,
    progress=None, details=False, prefill_chunk=PREFILL_CHUNK,
):  # fmt: skip
    """Continue each row of ``token_ids`` and return the rows with what was added.

    token_ids : (B, L), or a list of rows of any lengths; each row is continued as it would be alone.
    temperature, top_k, top_p : see :func:`xuramamba.sampling.choose`; 0 takes the most likely token.
    rng : a Generator, a whole number as its seed, or a list of Generators, one a row.
    stop : a token id, or a collection of them, after which a row is done; None: the model's own
        (``config.eos_token_ids``); ``()``: none.
    stream : called with the new ids (B,) after each step; returning True ends generation.
    repetition_penalty : above 1, tokens that a row has already are less likely (prompt included).
    min_new_tokens : so many come before a stop id may.
    stop_strings : a row is done when its new text has one of them; needs ``tokenizer``.
    tokenizer : ids behind the last one it has are never chosen.
    state : what an earlier call returned (``details``); ``token_ids`` are then what follows.
    progress : called with (tokens read, tokens in all) while prompts are read.
    details : return :class:`Generated`, whose state has seen all of its ids.
    prefill_chunk : tokens of a prompt that are read at once.

    Returns (B, L + new) int64, where a row that is done repeats its last token; for rows of several
    lengths a list of arrays, none of which repeats anything.  Ctrl-C while tokens are made returns what
    there is (``reasons`` says so).
    Raises ShapeError, ConfigError.
    """
    rows = _rows(token_ids)
    check_options(temperature, top_k, top_p, repetition_penalty)
    if max_new_tokens < 0 or not 0 <= min_new_tokens:
        raise ConfigError(f"max_new_tokens={max_new_tokens}, min_new_tokens={min_new_tokens}; expected 0 or more")
    if prefill_chunk < 1:
        raise ConfigError(f"prefill_chunk={prefill_chunk}; expected at least 1")
    if stop_strings and tokenizer is None:
        raise ConfigError("stop_strings need tokenizer, which turns ids into text")
    stop = model.config.eos_token_ids if stop is None else tuple(stop) if np.iterable(stop) else (stop,)
    texts = [tokenizer.stream(stop_strings) for _ in rows] if stop_strings else None
    if isinstance(rng, (int, np.integer)):
        rng = np.random.default_rng(rng)
    if isinstance(rng, (list, tuple)) and len(rng) != len(rows):
        raise ConfigError(f"rng is a list of {len(rng)} generators for {len(rows)} rows; expected one a row")
    vocabulary = model.config.vocab_size
    if tokenizer is not None:
        vocabulary = min(vocabulary, tokenizer.vocabulary_size)
    run = _Run(model, rows, state, np.array(stop, np.int64), texts, vocabulary)
    with no_grad():
        start = time.perf_counter()
        run.prefill(prefill_chunk, progress)
        middle = time.perf_counter()
        run.decode(max_new_tokens, min_new_tokens, (temperature, top_k, top_p), rng, repetition_penalty, stream)
        end = time.perf_counter()
        ids = run.result(same_length=len({len(row) for row in rows}) == 1)
        if not details:
            return ids
        return Generated(
            ids, run.final_state(), tuple(run.reasons), sum(map(len, rows)), sum(map(len, run.new)),
            middle - start, end - middle,
        )  # fmt: skip


def _rows(token_ids):
    try:
        rows = [np.asarray(row) for row in token_ids]
    except TypeError:
        rows = []
    if not rows or any(row.ndim != 1 or not len(row) or row.dtype.kind not in "iu" for row in rows):
        raise ShapeError("token_ids: expected (B, L) whole numbers with L at least 1, or a list of such rows")
    return [row.astype(np.int64) for row in rows]


class _Run:
    """The rows of one call: those that go on form the batch, the others wait with their state."""

    def __init__(self, model, rows, state, stop, texts, vocabulary):
        self.model, self.rows, self.stop, self.texts = model, rows, stop, texts
        self.vocabulary = vocabulary
        self.new = [[] for _ in rows]
        self.reasons = ["length"] * len(rows)
        self.active = np.arange(len(rows))
        self.state, self.logits = state, None  # of the active rows
        self.unread = False  # the last token of each active row is not yet in the state
        self.session = None  # makes steps of the active rows; self.state is then its state
        self.finished = {}  # row: its state, which has not seen the row's last token

    # ------------------------------------------------------------------ prompts
    def prefill(self, chunk, progress):
        """Read each prompt once; rows of one length are read together."""
        total, done, parts, order = sum(map(len, self.rows)), 0, [], []
        for length in sorted({len(row) for row in self.rows}):
            members = [i for i, row in enumerate(self.rows) if len(row) == length]
            ids = np.stack([self.rows[i] for i in members])
            state = None if self.state is None else select(self.state, members)
            for start in range(0, length, chunk):
                hidden, state = self.model.backbone(ids[:, start : start + chunk], state)
                done += ids[:, start : start + chunk].size
                if progress is not None:
                    progress(done, total)
            parts.append((self.model.logits(hidden[:, -1]).numpy(), state))
            order += members
        back = np.argsort(order)
        self.logits = np.concatenate([logits for logits, _ in parts])[back]
        self.state = select(stack(state for _, state in parts), back) if len(parts) > 1 else parts[0][1]

    # ------------------------------------------------------------------ steps
    def decode(self, most, least, options, rng, penalty, stream):
        """Up to ``most`` tokens for each row."""
        seen = [np.unique(row) for row in self.rows] if penalty != 1 else None
        try:
            with _Interruptions() as self.interruptions:
                self._decode(most, least, options, rng, penalty, stream, seen)
        except KeyboardInterrupt:
            for row in self.active.tolist():
                self.reasons[row] = "interrupted"

    def _decode(self, most, least, options, rng, penalty, stream, seen):
        for step in range(most):
            new = self._choose(step < least, options, rng, penalty, seen)
            for row, token in zip(self.active.tolist(), new.tolist()):
                self.new[row].append(token)
                if seen is not None:
                    seen[row] = np.union1d(seen[row], token)
            self.unread = True
            if stream is not None and stream(np.array([new[-1] for new in self.new])):
                for row in self.active.tolist():
                    self.reasons[row] = "callback"
                return
            if not self._retire(new) or step + 1 == most:
                return
            self._feed()

    def _choose(self, early, options, rng, penalty, seen):
        logits = np.array(self.logits, copy=True)
        logits[:, self.vocabulary :] = -np.inf  # rows of the table that are no token
        if seen is not None:
            for row, place in zip(self.active.tolist(), logits):
                penalize_repetition(place, seen[row], penalty)
        if early and len(self.stop):
            logits[:, self.stop] = -np.inf
        rngs = [rng[row] for row in self.active] if isinstance(rng, (list, tuple)) else rng
        return choose(logits, *options, rngs)

    def _retire(self, new):
        """Take the rows that are done out of the batch; False when none is left."""
        going = np.ones(len(new), bool)
        for place, (row, token) in enumerate(zip(self.active.tolist(), new.tolist())):
            if self.texts is not None:
                self.texts[row].push(token)
            if token in self.stop:
                self.reasons[row], going[place] = "stop id", False
            elif self.texts is not None and self.texts[row].stopped:
                self.reasons[row], going[place] = "stop string", False
        if not going.all():
            for place in np.flatnonzero(~going):
                self.finished[int(self.active[place])] = select(self.state, [place])
            self.active, self.state = self.active[going], select(self.state, np.flatnonzero(going))
            self.session = None
        return len(self.active) > 0

    def _feed(self):
        last, decoder = np.array([self.new[row][-1] for row in self.active]), decoder_of(self.model)
        if self.session is None or self.session.decoder is not decoder:
            self.session = decoder.session(self.state)
        with self.interruptions.held():
            self.logits = self.session.step(last)
            self.state, self.unread = self.session.state, False

    # ------------------------------------------------------------------ results
    def result(self, same_length):
        rows = [np.concatenate([row, np.array(new, np.int64)]) for row, new in zip(self.rows, self.new)]
        if not same_length:
            return rows
        width = max(map(len, rows))
        return np.stack([np.concatenate([row, np.repeat(row[-1:], width - len(row))]) for row in rows])

    def final_state(self):
        """The state after every row's last token."""
        states = dict(self.finished)
        states |= {int(row): select(self.state, [place]) for place, row in enumerate(self.active)}
        waiting = [*self.finished, *(self.active.tolist() if self.unread else ())]
        if waiting:
            last = np.array([[self.new[row][-1]] for row in waiting])
            _, after = self.model.backbone(last, stack(states[row] for row in waiting))
            states |= {row: select(after, [place]) for place, row in enumerate(waiting)}
        return stack(states[row] for row in range(len(self.rows)))


class _Interruptions:
    """Inside, Ctrl-C during a step waits for its end: steps write into the state."""

    def __enter__(self):
        self._handler, self._holding, self._waiting = None, False, False
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and callable(signal.getsignal(signal.SIGINT)):
            self._handler = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_):
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._take:
            signal.signal(signal.SIGINT, self._handler)

    def _take(self, number, frame):
        if self._holding:
            self._waiting = True
        else:
            self._handler(number, frame)

    @contextlib.contextmanager
    def held(self):
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._waiting:
                self._waiting = False
                self._handler(signal.SIGINT, None)
