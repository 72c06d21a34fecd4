"""Under mpirun: what the threads of conftest.py stand for is so between processes too.  Skipped without MPI."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(not (MPIRUN and find_spec("mpi4py")), reason="needs mpirun and mpi4py")

SCRIPT = """
    import json, os, sys
    import numpy as np
    from training import checkpoint, options, parallel, optim, schedules
    from training.accumulate import TwoPass
    from training.loop import Trainer, TrainerConfig
    from training.progress import read_metrics
    from xuracore import nn, ops
    from xuracore.errors import ConfigError

    class Towers(nn.Module):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.left, self.right = nn.Linear(6, 5, rng=rng), nn.Linear(4, 5, rng=rng)
            self.dropout = nn.Dropout(0.5, rng=np.random.default_rng(1))
            self.log_scale = nn.Parameter(np.array(1.0, np.float32))

    class Pairs:
        def __init__(self, ranks):
            self.part = ranks.part(8)

        def batch(self, index):
            rng = np.random.default_rng(index)
            shapes = {"x": (8, 6), "y": (8, 4)}
            return {name: rng.standard_normal(shape).astype(np.float32)[self.part]
                    for name, shape in shapes.items()}

    def features(model, batch, rng):
        return ops.l2_normalize(model.left(batch["x"])), ops.l2_normalize(model.right(model.dropout(batch["y"])))

    def trainer(ranks, folder, dropout=0.5, **changes):
        model = Towers()
        model.dropout.rate = dropout
        loss = TwoPass(features, lambda model, found, _: (ops.info_nce(*found, model.log_scale), {}), lambda batch: None)
        config = TrainerConfig(**{"steps": 8, "log_every": 1, "ema_decay": 0.9, **changes})
        return Trainer(model, loss, optim.AdamW(model, lr=0.05), schedules.constant(0.05), Pairs(ranks), config, folder,
                       stream=sys.stderr, ranks=ranks)

    def digest(run):
        return checkpoint.digest({**run.model.state_dict(), **run.optimizer.state_dict(), **run.average.state_dict()})

    @parallel.together
    def main(argv):
        ranks = parallel.ranks()
        if len(sys.argv) > 2 and ranks.rank == 1:
            raise ConfigError("only here")
        folder = sys.argv[1]
        whole, parts = trainer(ranks, folder + "/whole"), trainer(ranks, folder + "/parts")
        whole.run()
        parts.run(stop_at=3)
        parts = trainer(ranks, folder + "/parts")
        parts.run(resume=True)
        alike = trainer(ranks, folder + "/alike", dropout=0.0)
        alike.run()
        told = ranks.gather([digest(whole), digest(parts), digest(alike)])
        if ranks.leads:
            one = trainer(parallel.ALONE, folder + "/one", dropout=0.0)
            one.run()
            curves = [[r["loss"] for r in read_metrics(one.output_dir.parent / name / "metrics.jsonl")]
                      for name in ("alike", "one")]
            print(json.dumps({"told": told, "curves": curves}))
        return 0

    if __name__ == "__main__":
        options.run_script(main, [])
"""


def mpirun(tmp_path, *words):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).parents[2])
    allowed = {f"{name}_ALLOW_RUN_AS_ROOT{more}": "1" for name in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    environment = {**os.environ, **allowed, "PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1", "XURA_NUM_THREADS": "1",
                   "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.run([MPIRUN, "-n", "2", sys.executable, script, str(tmp_path), *words], env=environment,
                          capture_output=True, text=True, timeout=120)


def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path):
    done = mpirun(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (whole, parts, _), other = found["told"]
    assert whole == parts and other == found["told"][0]
    assert found["curves"][0] == pytest.approx(found["curves"][1], rel=1e-5)
    assert done.stderr.count("step 8/8") == 4  # rank 0 alone speaks


def test_an_error_in_one_process_ends_both_at_once(tmp_path):
    started = time.monotonic()
    done = mpirun(tmp_path, "fail")
    assert done.returncode != 0 and "rank 1 of 2 ends all. error: only here" in done.stderr
    assert time.monotonic() - started < 60
