"""Language models beside their peers: prefill, decode at four widths, training steps; tokens a second.

    python tests/benchmarks/language_models.py --peer-python PYTHON_WITH_TORCH [--only decode] [--quick]
        [--llama-source llama.cpp --llama-programs llama.cpp/build/bin]

Models have the sizes of the 130M ones and random weights.  Each side lives in a process of its own with the
same number of threads, and works only while the others wait; rounds alternate, the table holds medians.
A training step is forward, backward and AdamW on tokens (4, 256), d 256, 8 layers, vocabulary 4096.  Peers
compute logits of the last token only at prefill, as we do.  Without llama.cpp its column shows figures
measured earlier on two cores of this class, in brackets; ratios are then against those.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

BIG = {"vocab_size": 50280, "d_model": 768, "n_layer": 24}
SMALL = {"vocab_size": 4096, "d_model": 256, "n_layer": 8}
PROMPT, BATCH, LENGTH = 512, 4, 256
WIDTHS = ("float32", "bfloat16", "int8", "int4")
LLAMA = {  # measured with llama.cpp's own benchmark, two threads; bfloat16 stands for its F16
    ("prefill", "mamba1"): {"float32": 278}, ("prefill", "mamba2"): {"float32": 442},
    ("decode", "mamba1"): {"float32": 39, "bfloat16": 76, "int8": 87, "int4": 119},
    ("decode", "mamba2"): {"float32": 39, "bfloat16": 90, "int8": 102, "int4": 162},
}  # fmt: skip
WANTED = {  # ours / peer
    ("prefill", "mamba1"): {"transformers": 5, "llama.cpp": 2},
    ("prefill", "mamba2"): {"transformers": 3, "llama.cpp": 1.4},
    ("decode", "mamba1"): {"llama.cpp": 1.4}, ("decode", "mamba2"): {"llama.cpp": 1.3},
    ("train", "mamba1"): {"mambapy": 5}, ("train", "mamba2"): {"transformers": 2},
}  # fmt: skip
PEERS = {
    ("prefill", "mamba1"): ("transformers", "mambapy"), ("prefill", "mamba2"): ("transformers",),
    ("prefill", "mamba3"): ("our mamba2",), ("decode", "mamba1"): ("transformers", "mambapy"),
    ("decode", "mamba2"): ("transformers",), ("decode", "mamba3"): ("our mamba2",),
    ("train", "mamba1"): ("mambapy", "transformers"), ("train", "mamba2"): ("transformers",),
    ("train", "mamba3"): ("our mamba2",),
}  # fmt: skip
COLUMNS = ("transformers", "mambapy", "llama.cpp", "our mamba2")


def jobs():
    """(label, kind, mixer, width) of every row."""
    for kind in ("prefill", "decode", "train"):
        for mixer in ("mamba1", "mamba2", "mamba3"):
            for width in WIDTHS if kind == "decode" and mixer != "mamba3" else ("float32",):
                yield f"{kind} {mixer} {width}", kind, mixer, width


# ---------------------------------------------------------------------- ours
def ours(kind, mixer, width, quick):
    """(function, tokens it handles, stored bytes)."""
    import numpy as np

    import xuracore as xc
    from training.optim import AdamW
    from xuramamba import LanguageModel, LanguageModelConfig
    from xuramamba.quantize import quantize, stored_bytes

    sizes = SMALL if kind == "train" else BIG
    lm = LanguageModel(LanguageModelConfig(**sizes, mixer=mixer), rng=np.random.default_rng(0))
    rng = np.random.default_rng(1)
    if kind == "train":
        ids = rng.integers(0, sizes["vocab_size"], (BATCH, LENGTH + 1))
        optimizer = AdamW(lm.parameters(), lr=1e-4)

        def step():
            lm.zero_grad()
            logits, _ = lm(ids[:, :-1])
            xc.ops.cross_entropy(logits, ids[:, 1:]).backward()
            optimizer.step()

        return step, BATCH * LENGTH, 0
    quantize(lm, width)
    ids = rng.integers(0, sizes["vocab_size"], (1, PROMPT))
    if kind == "prefill":

        def read():
            with xc.no_grad():
                hidden, _ = lm.backbone(ids)
                lm.logits(hidden[:, -1])

        return read, PROMPT, 0
    new = 16 if quick else 32

    def generate():
        lm.generate(ids[:, :1], max_new_tokens=new + 1, stop=())

    return generate, new, stored_bytes(lm)


# ---------------------------------------------------------------------- peers, in their own interpreter
def with_transformers(kind, mixer, width, quick):
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = SMALL if kind == "train" else BIG
    fields = {
        "vocab_size": sizes["vocab_size"], "hidden_size": sizes["d_model"], "num_hidden_layers": sizes["n_layer"],
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    if mixer == "mamba1":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(state_size=16, **fields))
    else:
        config = transformers.Mamba2Config(
            state_size=128, num_heads=2 * sizes["d_model"] // 64, head_dim=64, n_groups=1, **fields
        )
        model = transformers.Mamba2ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    if kind == "train":
        batch = 1 if mixer == "mamba1" else BATCH  # its loop over tokens takes a minute at the full batch
        ids = torch.randint(1, sizes["vocab_size"], (batch, LENGTH + 1), generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step():
            optimizer.zero_grad()
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()

        return step, batch * LENGTH, 0
    model.eval()
    ids = torch.randint(1, sizes["vocab_size"], (1, PROMPT), generator=generator)
    if kind == "prefill":

        def read():
            with torch.no_grad():
                model(input_ids=ids, use_cache=True, logits_to_keep=1)

        return read, PROMPT, 0

    def generate():
        with torch.no_grad():
            model.generate(ids[:, :1], max_new_tokens=9, min_new_tokens=9, do_sample=False)

    return generate, 8, 0


def with_mambapy(kind, mixer, width, quick):
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = SMALL if kind == "train" else BIG
    table = torch.nn.Embedding(sizes["vocab_size"], sizes["d_model"])
    config = MambaConfig(d_model=sizes["d_model"], n_layers=sizes["n_layer"])
    stack, norm = Mamba(config), RMSNorm(sizes["d_model"], 1e-5)
    generator = torch.Generator().manual_seed(1)
    if kind == "train":
        parameters = [p for module in (table, stack, norm) for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        ids = torch.randint(0, sizes["vocab_size"], (BATCH, LENGTH + 1), generator=generator)

        def step():
            optimizer.zero_grad()
            logits = norm(stack(table(ids[:, :-1]))) @ table.weight.T
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()

        return step, BATCH * LENGTH, 0
    ids = torch.randint(0, sizes["vocab_size"], (1, PROMPT), generator=generator)
    if kind == "prefill":

        def read():
            with torch.no_grad():
                norm(stack(table(ids))[:, -1]) @ table.weight.T

        return read, PROMPT, 0

    def generate():
        caches = [(None, torch.zeros(1, config.d_inner, config.d_conv - 1)) for _ in range(config.n_layers)]
        token = ids[0, :1]
        with torch.no_grad():
            for _ in range(8):
                hidden, caches = stack.step(table(token), caches)
                token = (norm(hidden) @ table.weight.T).argmax(dim=-1)

    return generate, 8, 0


# ---------------------------------------------------------------------- one side in a child
def serve(side, kind, mixer, width, quick):
    """Prepare, call once untimed, then answer each line with the seconds of a call."""
    if side == "our mamba2":
        side, mixer = "ours", "mamba2"
    make = {"ours": ours, "transformers": with_transformers, "mambapy": with_mambapy}[side]
    call, tokens, stored = make(kind, mixer, width, quick)
    slow = side == "transformers" and (kind, mixer) == ("train", "mamba1")
    if not slow:
        call()
    print(json.dumps({"tokens": tokens, "bytes": stored}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(json.dumps(time.perf_counter() - start), flush=True)


class Side:
    """A child process that works when it is asked."""

    def __init__(self, name, job, options):
        python = sys.executable if name.startswith("our") else options.peer_python
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XURA_NUM_THREADS")
        environment = {**kept, **dict.fromkeys(names, str(options.threads)), "TRANSFORMERS_VERBOSITY": "error"}
        if name.startswith("our"):
            del environment["OMP_NUM_THREADS"]
        command = [python, __file__, "--side", name, *job[1:]] + ["--quick"] * options.quick
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.seconds, self.about = [], self._answer()

    def _answer(self):
        line = self.child.stdout.readline()
        if not line:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            raise RuntimeError(f"{self.name}: {lines[-1] if lines else 'ended without a word'}")
        return json.loads(line)

    def turn(self):
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        self.seconds.append(self._answer())

    def rate(self):
        return self.about["tokens"] / statistics.median(self.seconds)

    def close(self):
        self.child.stdin.close()
        self.child.stdout.close()
        self.child.wait()
        self.errors.close()


def compare(job, options, llama):
    """({side: tokens a second}, stored bytes of ours) of one row, rounds alternating."""
    _, kind, mixer, width = job
    names = ["ours", *(PEERS[kind, mixer] if width == "float32" else ())]
    if options.peer_python is None:
        names = [name for name in names if name.startswith("our")]
    sides, rates, asked = [], {}, llama is not None and (kind, mixer) in LLAMA
    try:
        for name in names:
            try:
                sides.append(Side(name, job, options))
            except RuntimeError as error:
                print(f"{job[0]}: left out, {error}", file=sys.stderr)
        for round_ in range(options.rounds):
            for side in sides:
                slow = side.seconds and side.seconds[0] > 10
                if not slow:
                    side.turn()
            if asked:
                new = {"prompt": PROMPT} if kind == "prefill" else {"new": 16 if options.quick else 32}
                rates.setdefault("llama.cpp", []).append(llama(mixer, width, **new))
    finally:
        for side in sides:
            side.close()
    rates = {name: statistics.median(each) for name, each in rates.items()}
    rates |= {side.name: side.rate() for side in sides}
    return rates, sides[0].about["bytes"] if sides else 0


def row(job, rates, stored, floor):
    """A line of the table."""
    label, kind, mixer, width = job
    cells, mine = [label, f"{rates['ours']:,.0f}"], rates["ours"]
    for name in COLUMNS:
        known = rates.get(name)
        text = "" if known is None else f"{known:,.0f}"
        if known is None and name == "llama.cpp":
            known = LLAMA.get((kind, mixer), {}).get(width)
            text = "" if known is None else f"[{known}]"
        wanted = WANTED.get((kind, mixer), {}).get(name)
        cells.append(text and f"{text}: {mine / known:.2f}×" + (f" (asked {wanted}×)" if wanted else ""))
    share = mine * stored / 1e9
    cells.append(f"{share:.1f} ({share / floor:.0%})" if stored else "")
    return "| " + " | ".join(cells) + " |"


def reading_speed():
    """GB/s at which this machine reads: the fastest of our float32 product and NumPy's sum, half a GB."""
    import numpy as np

    from xuracore.kernels.gemv import gemv

    weight = np.ones((2**17, 1024), np.float32)
    none, bias = np.empty((0, 0, 0), np.uint16), np.zeros(2**17, np.float32)
    x, y = np.ones((1, 1024), np.float32), np.empty((1, 2**17), np.float32)
    found = {}
    for name, call in (
        ("product kernel", lambda: gemv.sized(weight.size)(weight, none, bias, x, 16, y)),
        ("numpy product", lambda: weight @ x[0]),
        ("numpy sum", weight.sum),
    ):
        call()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = weight.nbytes / 1e9 / statistics.median(times)
    return found


def llama_of(options, folder):
    """``rate(mixer, width, prompt or new)`` of llama.cpp, or None."""
    if not options.llama_programs:
        return None
    import numpy as np

    from tests.benchmarks import llama_cpp
    from xuramamba import LanguageModel, LanguageModelConfig

    def rate(mixer, width, **tokens):
        where = Path(options.keep or folder) / mixer
        if not where.exists():
            config = LanguageModelConfig(**BIG, mixer=mixer)
            lm = LanguageModel(config, rng=np.random.default_rng(0))
            lm.save_pretrained(where, format="huggingface")
        python = options.peer_python or sys.executable
        file = llama_cpp.convert(options.llama_source, options.llama_programs, python, where, width)
        return llama_cpp.rate(options.llama_programs, file, options.threads, **tokens)

    return rate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help='rows whose label contains this, such as "decode mamba1"')
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes (default 5)")
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", help="an interpreter with torch, transformers and mambapy")
    parser.add_argument("--llama-source", help="source tree of llama.cpp")
    parser.add_argument("--llama-programs", help="folder with llama-bench and llama-quantize")
    parser.add_argument("--keep", help="folder for converted models (default: a temporary one)")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(*options.side, options.quick)
        return
    if options.quick:
        options.rounds = min(options.rounds, 2)
    chosen = [job for job in jobs() if options.only in job[0]]
    if not chosen:
        parser.error(f"--only {options.only!r} names no row; there are: " + ", ".join(j[0] for j in jobs()))
    os.environ.setdefault("XURA_NUM_THREADS", str(options.threads))
    speeds = reading_speed()
    print(f"{options.threads} threads, {options.rounds} rounds; this machine reads, GB/s: "
          + ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()) + "\n")  # fmt: skip
    print("Tokens a second; a peer's, then ours over it.\n")
    print("| job | ours | " + " | ".join(COLUMNS) + " | GB/s, share |")
    print("|---|---:|" + "---:|" * (len(COLUMNS) + 1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        llama = llama_of(options, folder)
        for job in chosen:
            rates, stored = compare(job, options, llama)
            if "ours" in rates:
                print(row(job, rates, stored, max(speeds.values())), flush=True)


if __name__ == "__main__":
    main()
