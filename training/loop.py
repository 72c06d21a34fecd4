"""The training loop: one step after the other, each a pure function of the state and the step number.

    config = TrainerConfig(steps=1000, clip=1.0)
    trainer = Trainer(model, loss_function, optimizer, schedule, batches, config, "runs/one")
    result = trainer.run(resume=True)
    sys.exit(result.exit_code)

``loss_function(model, batch, rng)`` returns ``(loss, metrics)``: a Tensor of one element, the mean over
the batch, and a dict of numbers to log.  One with a method ``accumulate``, such as
:class:`training.accumulate.TwoPass`, sees all batches of an accumulated step together.

``batches.batch(i)`` returns batch number i, a pure function of i; ``rng`` is a Philox generator keyed by
(seed, i).  So a resumed run draws what an uninterrupted one would have drawn, and its tensors are equal
bit for bit (same machine, same number of threads).

On several ranks (see :mod:`training.parallel`) each gives its part of a batch as ``batches.batch(i)``, all take
the same steps, and rank 0 writes; equal bits then also need the same number of ranks.
"""

import contextlib
import functools
import math
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import xuracore as xc
from training import checkpoint
from training.event_log import EventLog, writer_class
from training.interrupt import SIGNALS, Interruption
from training.optim import ExponentialMovingAverage, clip_grad_norm
from training.parallel import ALONE, GradientMean, RankError, means, own_chance, spread_state
from training.plot import draw_training
from training.progress import Best, MetricLog, ProgressLine, Taken, Window
from xuracore.config import Config, require
from xuracore.errors import ConfigError, XuraError
from xuracore.io import CheckpointDirectory


class TrainingDiverged(XuraError, ArithmeticError):
    """Loss or gradients were not finite for too many steps in a row."""


@dataclass(frozen=True)
class TrainerConfig(Config):
    """How to train; what to train is given to the Trainer itself."""

    steps: int  # optimizer steps in all
    accumulate: int = 1  # batches per step; their gradients are averaged
    clip: float | None = 1.0  # largest norm of all gradients together; None: no clipping
    ema_decay: float | None = None  # keep averaged weights; evaluation uses them
    seed: int = 0
    log_every: int = 10  # steps per log record, which holds means over them
    save_every: int = 0  # steps between checkpoints; 0: only when the run ends or is interrupted
    keep: int = 2  # checkpoints that stay
    evaluate_every: int = 0  # steps between evaluations; 0: none
    monitor: str | None = None  # name of the evaluated number that decides which weights are best
    monitor_mode: str = "max"  # "max" or "min"
    patience: int = 0  # evaluations without improvement after which to stop; 0: never
    min_delta: float = 0.0  # by how much a number must be better than the best so far to be an improvement
    max_skips: int = 10  # steps in a row that are not finite before giving up
    event_log: bool = False  # also write events/ for TensorBoard
    prefetch: bool = True  # make the next batch in a thread meanwhile
    progress_seconds: float = 10.0  # between lines where the output is no terminal

    def __post_init__(self):
        least = {"steps": 1, "accumulate": 1, "log_every": 1, "keep": 1, "max_skips": 1}
        least.update(save_every=0, evaluate_every=0, patience=0, seed=0)
        for name, bound in least.items():
            value = getattr(self, name)
            require(value >= bound, f"TrainerConfig.{name} is {value}; it is at least {bound}")
        require(self.clip is None or self.clip > 0, f"TrainerConfig.clip is {self.clip}; positive or None")
        require(self.monitor_mode in ("max", "min"), f"monitor_mode is {self.monitor_mode!r}; 'max' or 'min'")
        require(self.min_delta >= 0, f"TrainerConfig.min_delta is {self.min_delta}; it is at least 0")
        require(not self.patience or self.monitor, "patience needs the name of a number to monitor")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.  ``reason`` is "finished", "patience", "stop_at" or the name of a signal."""

    step: int
    reason: str
    best: float | None = None

    @property
    def complete(self):
        """Whether the run came to its end, so that its model is the result."""
        return self.reason in ("finished", "patience")

    @property
    def exit_code(self):
        """130 after Ctrl-C, as shells expect; 0 otherwise (a requested end is not a failure)."""
        return 130 if self.reason == "SIGINT" else 0


class Trainer:
    """Trains ``model``; see the head of this file.

    output_dir : receives metrics.jsonl and .csv, training.svg, checkpoints/ and, with a monitored number,
        best/.  None writes nothing.
    evaluate : ``evaluate(model, step) -> {name: number}``, run without gradients on the averaged weights
        where there are any, on rank 0.
    after_step : ``after_step(model)``, for constraints such as a clamped temperature.
    describe : JSON data that says what is trained (model and data configuration); saved in config.json,
        and a run is only resumed under the same description.
    generators : further {name: Generator} whose states belong to the run.
    stream : where progress goes, None for silence.
    ranks : the processes that train together.
    """

    def __init__(
        self, model, loss_function, optimizer, schedule, batches, config, output_dir=None, *, evaluate=None,
        after_step=None, describe=None, generators=None, stream=sys.stderr, ranks=ALONE,
    ):  # fmt: skip
        self.model, self.loss_function, self.optimizer = model, loss_function, optimizer
        self.schedule, self.batches, self.config = schedule, batches, config
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.evaluate, self.after_step, self.describe = evaluate, after_step, describe
        self.generators, self.stream, self.ranks = dict(generators or {}), stream if ranks.leads else None, ranks
        self._gradients = GradientMean(optimizer.parameters(), ranks) if ranks.size > 1 else None
        self.average = None
        if config.ema_decay is not None:
            self.average = ExponentialMovingAverage(optimizer.named_parameters(), config.ema_decay)
        self.step, self.skipped = 0, 0
        self._skips_in_a_row, self._window = 0, Window()
        self._best = Best()
        names = SIGNALS + ("SIGUSR1",) * (ranks.size > 1)  # mpirun hands the last one on
        self.interruption, self._stop = Interruption(lambda text: self._line.say(text), names), None
        self._log, self._events, self._line, self._saved_at = None, None, None, None
        self._others = None  # states of the generators of ranks 1, 2, … in the checkpoint resumed from
        self.when_open = None  # called once ``output_dir`` is this run's

    # ------------------------------------------------------------------ the run
    def run(self, resume=False, overwrite=False, stop_at=None):
        """Train to ``config.steps`` and return a :class:`TrainingResult`.

        resume : go on from the latest whole checkpoint in ``output_dir``, if there is one.
        overwrite : delete an earlier run in ``output_dir``; without either, ConfigError protects it.
        stop_at : end after this step instead, with a checkpoint, as an interruption would.

        Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second Ctrl-C ends
        it at once.  On several ranks it is enough that one of them gets the signal.
        """
        resumed = self._open(resume, overwrite)
        self._line = ProgressLine(self.config.steps, self.stream, self.config.progress_seconds)
        if resumed:
            self._line.say(f"resumed at step {self.step} from {self.output_dir}")
        try:
            with self.interruption.listening(), self._batch_source() as batches:
                reason = self._steps(batches, stop_at)
            if self.output_dir is not None and self._saved_at != self.step:
                self.save()
            if reason not in ("finished", "patience"):
                self._line.say(f"{reason}: stopped after step {self.step}" + self._where_saved())
        finally:
            self._line.close()
            if self._events is not None:
                self._events.close()
            if self._log is not None:
                self._log.close()
                draw_training(self._log.path, self.output_dir / "training.svg")
        return TrainingResult(self.step, reason, self._best.value)

    def _steps(self, batches, stop_at):
        """Train until something ends it; returns what."""
        self._stop = None
        self.model.train()
        while self.step < self.config.steps:
            if self.ranks.size == 1:  # several have agreed in the last step
                self._stop = self.interruption.asked
            if self._stop is not None:
                return self._stop
            if self.config.patience and self._best.waited >= self.config.patience:
                return "patience"
            if stop_at is not None and self.step >= stop_at:
                return "stop_at"
            self._one_step(batches)
        return "finished"

    def _where_saved(self):
        return "" if self.output_dir is None else f", saved in {self.output_dir}; resume to go on"

    def _one_step(self, batches):
        started, count, rate = time.perf_counter(), self.config.accumulate, float(self.schedule(self.step))
        taken = Taken(batches)
        indices = range(self.step * count, (self.step + 1) * count)
        self.optimizer.zero_grad()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # _update looks at the result
            if (count > 1 or self.ranks.size > 1) and hasattr(self.loss_function, "accumulate"):
                rngs = [functools.partial(self._rng, i) for i in indices]
                batches = [taken(i) for i in indices]
                loss, metrics = self.loss_function.accumulate(self.model, batches, rngs, self.ranks)
            else:
                loss, metrics = self._mean_gradient(taken, indices)
        if self.ranks.size > 1:
            loss, metrics, taken.samples = self._of_all_ranks(loss, metrics, taken.samples)
        norm = self._update(loss, rate)
        self.step += 1
        record = {"loss": loss, **{name: float(value) for name, value in metrics.items()}, "grad_norm": norm}
        self._window.add(record, taken.samples, time.perf_counter() - started, taken.seconds)
        self._line.show(self.step, {"loss": loss, "lr": rate})
        self._report(rate)

    def _mean_gradient(self, batches, indices):
        """Add up the gradients of batch after batch, divided by their number; mean loss and metrics."""
        found = []
        for index in indices:
            loss, values = self.loss_function(self.model, batches(index), self._rng(index))
            if math.isfinite(loss.item()):
                (loss * (1.0 / len(indices)) if len(indices) > 1 else loss).backward()
            found.append({"loss": loss.item(), **values})
        mean = means(found)
        return mean.pop("loss"), mean

    def _of_all_ranks(self, loss, metrics, samples):
        """Make the gradients the means over all ranks; (loss, metrics, samples) of all, and whether to stop."""
        values = {"loss": loss, **{name: float(value) for name, value in metrics.items()}}
        told = self.ranks.gather({"values": values, "samples": samples, "stop": self.interruption.asked,
                                  "missing": self._gradients.missing()})
        self._stop = next((each["stop"] for each in told if each["stop"]), None)
        self._gradients(set.intersection(*(set(each["missing"]) for each in told)))
        mean = means([each["values"] for each in told])
        return mean.pop("loss"), mean, sum(each["samples"] for each in told)

    def _update(self, loss, rate):
        """Clip and step, unless loss or gradient is not finite; returns the norm of the gradient."""
        parameters = list(self.optimizer.parameters())
        norm = clip_grad_norm(parameters, math.inf if self.config.clip is None else self.config.clip)
        if math.isfinite(norm) and math.isfinite(loss):
            self._skips_in_a_row = 0
            self.optimizer.step(rate)
            if self.after_step is not None:
                self.after_step(self.model)
            if self.average is not None:
                self.average.update()
            return norm
        self.skipped += 1
        self._skips_in_a_row += 1
        self._line.say(f"step {self.step + 1} skipped: loss {loss:g}, gradient norm {norm:g}")
        if self._skips_in_a_row >= self.config.max_skips:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self._skips_in_a_row} steps in a row, up to step "
                f"{self.step + 1} (loss {loss:g}, gradient norm {norm:g}); lower the learning rate, or look "
                "at the batch of that step"
            )
        return norm

    def _report(self, rate):
        config = self.config
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._write({"split": "train", **self._window.close(), "lr": rate, "skipped": self.skipped})
        if config.evaluate_every and self.evaluate and (
            self.step % config.evaluate_every == 0 or self.step == config.steps
        ):
            self._evaluate()
        if config.save_every and self.step % config.save_every == 0 and self.output_dir is not None:
            self.save()

    def _evaluate(self):
        with self.averaged(), xc.no_grad():
            self.model.eval()
            values = None
            if self.ranks.leads:
                values = {name: float(v) for name, v in self.evaluate(self.model, self.step).items()}
            values = self.ranks.from_leader(values)
            self.model.train()
            monitor = self.config.monitor
            if monitor is not None and monitor not in values:
                raise ConfigError(f"monitor={monitor!r} is not among the evaluated {sorted(values)}")
            if monitor is not None:
                self._judge(values[monitor])
        self._write({"split": "validation", **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._line.say(f"step {self.step}: validation  {shown}")

    def _judge(self, value):
        """Keep the weights of the moment in best/ if ``value`` is the best so far."""
        better = self._best.judge(value, self.config.monitor_mode, self.config.min_delta)
        if better and self.output_dir is not None and self.ranks.leads:
            told = {"step": self.step, "monitor": self.config.monitor, "value": value}
            self._best_directory().save(self.step, self.model.state_dict(), trainer=told, config=self._description())

    def _best_directory(self):
        return CheckpointDirectory(self.output_dir / "best", keep=1)

    def averaged(self):
        """Context in which the model holds its averaged weights (its own, if none are kept)."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def adopt(self):
        """Leave in the model the weights to hand on: the best, where a number is monitored and files are
        written; else the averaged ones, or the last.  All ranks call it."""
        if self._best.value is not None and self.output_dir is not None:
            if self.ranks.leads:
                self.model.load_state_dict(self._best_directory().load().model)
            if self.ranks.size > 1:
                self.model.load_state_dict(spread_state(self.ranks, self.model.state_dict()))
        elif self.average is not None:
            self.average.adopt()

    # ------------------------------------------------------------------ where batches and chance come from
    def _rng(self, index):
        key, counter = np.array([self.config.seed, index], np.uint64), np.array([0, 0, 0, self.ranks.rank], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    @contextlib.contextmanager
    def _batch_source(self):
        """A function from a batch number to the batch; the next one is made meanwhile in a thread."""
        if not self.config.prefetch:
            yield self.batches.batch
            return
        last = self.config.steps * self.config.accumulate
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        ready = {}

        def get(index):
            future = ready.pop(index, None) or pool.submit(self.batches.batch, index)
            if index + 1 < last:
                batch = future.result()
                ready[index + 1] = pool.submit(self.batches.batch, index + 1)
                return batch
            return future.result()

        try:
            yield get
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------ files
    def _directory(self):
        return CheckpointDirectory(self.output_dir / "checkpoints", keep=self.config.keep)

    def _description(self):
        return checkpoint.as_json({"trainer": self.config.to_dict(), "run": self.describe})

    def save(self):
        """Write a checkpoint of this moment.  All ranks call it; RankError if they hold different weights."""
        progress = {
            "skipped": self.skipped, "skips_in_a_row": self._skips_in_a_row, "window": self._window.state(),
            **self._best.state(),
        }  # fmt: skip
        self._saved_at, others = self.step, []
        if self.ranks.size > 1:
            chance = {name: checkpoint.generator_state(g) for name, g in self._every_generator().items()}
            told = self.ranks.gather({"weights": checkpoint.digest(self.model.state_dict()), "chance": chance})
            if len({each["weights"] for each in told}) > 1:
                raise RankError(f"the ranks hold different weights after step {self.step}; resume from an earlier "
                                "checkpoint, and look whether all machines and libraries are alike")
            others = [each["chance"] for each in told[1:]]
        if self.ranks.leads:
            checkpoint.save(
                self._directory(), self.step, self.model, self.optimizer, self.average, self.generators, progress,
                self._description(), others,
            )  # fmt: skip

    def _every_generator(self):
        return {**checkpoint.module_generators(self.model), **self.generators}

    def resume(self, step=None):
        """Load the latest whole checkpoint, or that of ``step``; raises where there is none that fits."""
        found = checkpoint.load(
            self._directory(), self.model, self.optimizer, self.average, self.generators, step
        )
        self.step, progress, config, trainer = found
        self._check_description(config)
        self.skipped, self._skips_in_a_row = progress["skipped"], progress["skips_in_a_row"]
        self._window = Window(**progress["window"])
        self._best, self._saved_at = Best.of(progress), self.step
        self._others = trainer.get("others", [])
        for what, saved, now in (("threads", trainer["threads"], xc.get_num_threads()),
                                 ("ranks", len(self._others) + 1, self.ranks.size)):  # fmt: skip
            if saved != now:
                warnings.warn(
                    f"the run used {saved} {what}, now there are {now}: sums may round differently, so the result "
                    "is not bit for bit that of an uninterrupted run",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _agree(self, resumed):
        """Put all ranks into the state of rank 0, and give each its own generators; whether that resumed."""
        if len(set(self.ranks.gather_bytes(repr(self._description()).encode()))) > 1:
            raise RankError("the ranks were started with different options, or see different data")
        mine = {"resumed": resumed, "step": self.step, **self._best.state(),
                "skipped": self.skipped, "skips_in_a_row": self._skips_in_a_row, "others": self._others}
        state = self.ranks.from_leader(mine)
        for part in (self.model, self.optimizer, self.average):
            if part is not None:
                part.load_state_dict(spread_state(self.ranks, part.state_dict()))
        generators, others = self._every_generator(), state["others"] or []
        if len(others) != self.ranks.size - 1:
            own_chance(generators, self.ranks.rank)
        elif not self.ranks.leads:
            for name, generator in generators.items():
                checkpoint.restore_generator(generator, others[self.ranks.rank - 1][name])
        self.step, self._best = state["step"], Best.of(state)
        self.skipped, self._skips_in_a_row = state["skipped"], state["skips_in_a_row"]
        self._saved_at = self.step if state["resumed"] else None
        return state["resumed"]

    def _check_description(self, config):
        """ConfigError if the saved run differs in anything that its numbers depend on."""
        saved, now = config or {}, self._description()
        names = ("accumulate", "clip", "ema_decay", "seed", "log_every")
        found = checkpoint.differences({n: saved.get("trainer", {}).get(n) for n in names},
                                       {n: now["trainer"][n] for n in names})
        found += checkpoint.differences(saved.get("run"), now["run"])
        if found:
            raise ConfigError(f"cannot resume {self.output_dir}: " + "; ".join(found))

    def _open(self, resume, overwrite):
        """Prepare ``output_dir`` and the state; returns whether a run was resumed."""
        resumed = self.ranks.leads and self.output_dir is not None and self._open_files(resume, overwrite)
        return resumed if self.ranks.size == 1 else self._agree(resumed)

    def _open_files(self, resume, overwrite):
        if self.config.event_log:
            writer_class()  # that the extra is missing is known before anything is deleted
        directory, log = self._directory(), self.output_dir / "metrics.jsonl"
        exists = bool(directory.steps())
        if exists and resume:
            self.resume()
        elif exists and not overwrite:
            raise ConfigError(
                f"{self.output_dir} holds a run at step {directory.steps()[-1]}; resume it, choose another "
                "folder, or ask to overwrite it"
            )
        elif exists:
            shutil.rmtree(directory.path)
            for part in ("best", "events"):
                shutil.rmtree(self.output_dir / part, ignore_errors=True)
        resumed = exists and resume
        if self.config.event_log:
            self._events = EventLog(self.output_dir / "events", self.step + 1 if resumed else None)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.when_open is not None:
            self.when_open()
        self._log = MetricLog(log, self.step if resumed else None)
        return resumed

    def _write(self, record):
        if self._log is not None:
            record = {"step": self.step, **record}
            self._log.write(record)
            if self._events is not None:
                self._events.write(record)
