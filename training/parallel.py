"""One training on several processes: what they tell each other, over MPI.

    mpirun -n 2 python training/scripts/train_jepa.py …

Every process (*rank*) runs the same script on its part of every batch and holds all parameters; their
gradients are added up once a step, so all take the same step.  Losses that compare samples with each other
see the features of all ranks (see :class:`training.accumulate.TwoPass`).  Rank 0 alone writes and speaks.
mpi4py, of the extra ``mpi``, is imported where a launcher started more than one process, or on request.

What is exchanged is arrays and JSON, nothing pickled.
"""

import functools
import json
import os
import platform
import sys
import time
import traceback

import numpy as np

import xuracore as xc
from xuracore.errors import MissingExtraError, XuraError

# how launchers say how many processes they started: Open MPI, MPICH and Intel MPI, Slurm's srun
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
MOST_AT_ONCE = 2**28  # numbers in one message: counts are 32 bits wide
GRACE = 1.0  # seconds for rank 0 to say what goes wrong on all ranks alike


class RankError(XuraError, RuntimeError):
    """The processes of a run are not in the same state, or were not started alike."""


class Ranks:
    """The processes of a run, seen from one of them.  This class is a run on its own: rank 0 of 1.

    Subclasses give ``rank``, ``size`` and the four methods below that move data; all ranks call them in the
    same order.
    """

    rank, size = 0, 1

    def gather_bytes(self, data):
        """[bytes of rank 0, of rank 1, …] on every rank."""
        return [bytes(data)]

    def add_up(self, array):
        """Replace a contiguous float array by its sum over the ranks: on all of them the same bits."""

    def spread(self, array):
        """Replace a contiguous array by that of rank 0."""

    def abort(self, code):
        """End all processes at once."""
        raise SystemExit(code)

    # ------------------------------------------------------------------ made of these
    @property
    def leads(self):
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def gather(self, value):
        """JSON data of all ranks, in their order."""
        return [json.loads(text) for text in self.gather_bytes(json.dumps(value).encode())]

    def from_leader(self, value):
        """The JSON data of rank 0; what others pass is not looked at."""
        return self.gather(value if self.leads else None)[0]

    def gather_rows(self, array):
        """The arrays of all ranks one after the other along the first axis; other sizes and types agree."""
        if self.size == 1:
            return array
        parts = self.gather_bytes(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        rows = [np.frombuffer(part, array.dtype).reshape(-1, *array.shape[1:]) for part in parts]
        return np.concatenate(rows)

    def part(self, count):
        """The slice of ``range(count)`` that is this rank's: all together they are the whole, in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def in_turn(self):
        """``for _ in ranks.in_turn():`` runs the body on one rank after the other."""
        for turn in range(self.size):
            if turn == self.rank:
                yield turn
            self.gather_bytes(b"")


ALONE = Ranks()


class MpiRanks(Ranks):
    """The processes of MPI's COMM_WORLD.  MissingExtraError where mpi4py is not installed."""

    def __init__(self):
        try:
            from mpi4py import MPI
        except ImportError:
            raise MissingExtraError("mpi4py", "mpi") from None
        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size

    def gather_bytes(self, data):
        counts = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([len(data)], np.int64), counts)
        if counts.sum() >= 2**31:
            raise RankError(f"{counts.sum():,} bytes are too many for one exchange; make the batch smaller")
        everything = bytearray(int(counts.sum()))
        self._world.Allgatherv([data, self._mpi.BYTE], [everything, counts.tolist(), self._mpi.BYTE])
        stops = np.cumsum(counts)
        return [bytes(everything[stop - count : stop]) for count, stop in zip(counts, stops)]

    def add_up(self, array):
        flat = array.reshape(-1)
        for start in range(0, flat.size, MOST_AT_ONCE):
            self._world.Allreduce(self._mpi.IN_PLACE, flat[start : start + MOST_AT_ONCE])

    def spread(self, array):
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, MOST_AT_ONCE):
            self._world.Bcast([flat[start : start + MOST_AT_ONCE], self._mpi.BYTE])

    def abort(self, code):
        self._world.Abort(code)


# ---------------------------------------------------------------------- starting and ending
_ranks = [None]  # of this process, once known


def launched():
    """How many processes the launcher started, by the environment; 1 without one."""
    return next((int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()), 1)


def ranks(asked=False):
    """The Ranks of this process: MPI's if a launcher started several or ``asked``, else :data:`ALONE`.

    Raises MissingExtraError without mpi4py, RankError where the launcher started several processes of
    which MPI knows nothing.
    """
    if _ranks[0] is None and (asked or launched() > 1):
        found = MpiRanks()
        if found.size != launched() and launched() > 1:
            raise RankError(f"{launched()} processes were launched, but mpi4py sees {found.size}: it is built for "
                              "another MPI than the launcher's. Use the mpirun of the MPI that mpi4py was built with")
        _ranks[0] = found
    return _ranks[0] or ALONE


def threads_per_rank(ranks):
    """Processors of this machine that a rank may use without taking them from its neighbours; at least 1."""
    node = platform.node()
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    here = [set(processors) for name, processors in ranks.gather([node, mine]) if name == node]
    return max(1, min(xc.get_num_threads(), len(set.union(*here)) // len(here)))


def together(main):
    """Decorates the ``main(argv)`` of a script: what ends it with an error on one rank ends all of them.

    The other ranks would wait for the missing one for ever.  Without MPI it changes nothing.
    """
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except BaseException as error:
            if ranks().size == 1:
                raise
            _give_up(ranks(), error)
            raise

    return run


def _give_up(ranks, error):
    if isinstance(error, SystemExit) and not error.code:
        return
    if not ranks.leads:
        time.sleep(GRACE)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    else:
        code, text = exit_code(error)
        text = "".join(traceback.format_exception(error)) if text is None else f"error: {text}\n"
        sys.stderr.write(f"rank {ranks.rank} of {ranks.size} ends all. {text}" if code != 130 else "")
    sys.stdout.flush()
    sys.stderr.flush()
    ranks.abort(code)


def exit_code(error):
    """(exit code, line that tells a person what is wrong, or None for a bug, whose traceback should be seen)."""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, XuraError):
        return 1 if isinstance(error, ArithmeticError) else 2, str(error)
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
        return 2, f"{error.filename}: {error.strerror}"
    return 1, None


# ---------------------------------------------------------------------- work that is shared
class Gathered(xc.Function):
    """The rows of all ranks, of which this one's stand at ``start``.

    Its gradient goes back to these, times the number of ranks: each computes the same from the whole, and the mean
    over the ranks shall be the gradient.
    """

    def forward(save, x, *, ranks, start):
        save(ranks.size, slice(start, start + len(x)))
        return ranks.gather_rows(x)

    def vjp(grad, saved, needs):
        size, own = saved
        return grad[own] * size


def shared(function, ranks):
    """``function`` of rows, which returns a row for each (array or Tensor), computed by each rank for its part."""
    if ranks.size == 1:
        return function

    def in_parts(rows):
        own = ranks.part(len(rows))
        some = rows[own] if own.start < own.stop else rows[:1]  # one row more, where only its shape counts
        found = function(some)[: own.stop - own.start]
        if isinstance(found, xc.Tensor):
            return Gathered.apply(found, ranks=ranks, start=own.start)
        return ranks.gather_rows(found)

    return in_parts


# ---------------------------------------------------------------------- a step of all
class GradientMean:
    """Averages the gradients of some parameters over the ranks, flattened into one array per type."""

    def __init__(self, parameters, ranks):
        self._parameters, self._ranks, self._flat, self._views = list(parameters), ranks, {}, []
        sizes = {}
        for parameter in self._parameters:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.size
        self._flat = {dtype: np.zeros(size, dtype) for dtype, size in sizes.items()}
        starts = dict.fromkeys(sizes, 0)
        for parameter in self._parameters:
            start = starts[parameter.dtype]
            starts[parameter.dtype] = stop = start + parameter.size
            self._views.append(self._flat[parameter.dtype][start:stop].reshape(parameter.shape))

    def missing(self):
        """Numbers of the parameters that have no gradient here."""
        return [i for i, parameter in enumerate(self._parameters) if parameter.grad is None]

    def __call__(self, missing=()):
        """Every gradient becomes its mean over the ranks; those ``missing`` everywhere stay away."""
        share = 1 / self._ranks.size
        for parameter, view in zip(self._parameters, self._views):
            if parameter.grad is None:
                view[...] = 0
            else:
                np.multiply(parameter.grad, view.dtype.type(share), out=view)
        for flat in self._flat.values():
            self._ranks.add_up(flat)
        absent = set(missing)
        for i, (parameter, view) in enumerate(zip(self._parameters, self._views)):
            parameter.grad = None if i in absent else view


def means(found):
    """{name: mean over those that have it} of ``found``, a list of {name: number}."""
    names = dict.fromkeys(name for values in found for name in values)
    return {name: float(np.mean([values[name] for values in found if name in values])) for name in names}


def spread_state(ranks, state):
    """The arrays of rank 0 under the names of ``state``."""
    state = {name: np.array(state[name], order="C") for name in sorted(state)}
    for array in state.values():
        ranks.spread(array)
    return state


def own_chance(generators, rank):
    """Give the generators of a rank other than 0 a state of their own, a function of the old one and the rank.

    All ranks are built from one seed, and would drop the same features of different samples.
    """
    if rank:
        for generator in generators.values():
            kind = type(generator.bit_generator)
            drawn = generator.integers(2**32, size=4).tolist()
            generator.bit_generator.state = kind(np.random.SeedSequence([rank, *drawn])).state


def set_threads(ranks, asked):
    """``asked`` threads, or on several ranks a fair share of the machine's processors."""
    if asked or ranks.size > 1:
        xc.set_num_threads(asked or threads_per_rank(ranks))
