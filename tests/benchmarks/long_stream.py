"""A stream of a million tokens through a language model, in chunks, at constant memory.

    python tests/benchmarks/long_stream.py --tokens 1000000
    python tests/benchmarks/long_stream.py --mixer mamba1 --d-model 768 --layers 24 --tokens 20000
    python tests/benchmarks/long_stream.py --model DIR --tokens 100000

After every chunk only the state is kept, which has the same size whatever the length of the past.  Prints,
along the way, the tokens read, the speed since the line before, and the memory of the process.  Ends with 1
if memory grew by more than --allowed megabytes after the first chunks.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

FIELDS = {
    "s4d": {}, "mamba1": {}, "mamba2": {"d_state": 64, "headdim": 64}, "mamba3": {"d_state": 64, "headdim": 64},
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the stream (default 1000000)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per call (default 1024)")
    parser.add_argument("--lines", type=int, default=10, help="lines printed along the way (default 10)")
    parser.add_argument("--model", help="folder of a model; default: random weights of the sizes below")
    parser.add_argument("--mixer", choices=FIELDS, default="mamba2", help="default mamba2")
    parser.add_argument("--d-model", type=int, default=256, help="default 256")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--vocab", type=int, default=256, help="default 256")
    parser.add_argument("--allowed", type=float, default=32, help="megabytes of growth allowed (default 32)")
    return stream(parser.parse_args())


def stream(options):
    import xuracore as xc
    from xuramamba import LanguageModel, LanguageModelConfig
    from xuramamba.state import nbytes

    if options.model:
        model = LanguageModel.from_pretrained(options.model)
    else:
        config = LanguageModelConfig(
            options.vocab, options.d_model, options.layers, options.mixer, FIELDS[options.mixer]
        )
        model = LanguageModel(config, rng=np.random.default_rng(0))
    size, rng = model.config.vocab_size, np.random.default_rng(1)
    print(f"{model.parameter_count():,} parameters, chunks of {options.chunk} tokens\n")
    print("| tokens read | tokens/s | resident MB | state kB |\n|---:|---:|---:|---:|", flush=True)
    done, state, counted, settled = 0, None, 0, None
    with xc.no_grad():
        _, warm = model(rng.integers(0, size, (1, options.chunk)))  # compiles
        model(rng.integers(0, size, (1, options.chunk)), warm)
        since = time.perf_counter()
        while done < options.tokens:
            count = min(options.chunk, options.tokens - done)
            logits, state = model(rng.integers(0, size, (1, count)), state)
            done += count
            if done * options.lines // options.tokens > counted * options.lines // options.tokens or settled is None:
                now, resident = time.perf_counter(), resident_megabytes()
                settled = resident if settled is None or done <= 16 * options.chunk else settled
                speed = (done - counted) / (now - since)
                print(f"| {done:,} | {speed:,.0f} | {resident:.1f} | {nbytes(state) / 1e3:.1f} |", flush=True)
                counted, since = done, time.perf_counter()
    growth = resident_megabytes() - settled
    finite = bool(np.isfinite(logits.numpy()).all())
    print(f"\nMemory grew by {growth:.1f} MB from the first line to the last; logits are "
          f"{'finite' if finite else 'NOT FINITE'}.")  # fmt: skip
    return 0 if growth <= options.allowed and finite else 1


def resident_megabytes():
    """Memory of this process that lies in RAM, now; where the system does not say, the most it ever was."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    sys.exit(main())
