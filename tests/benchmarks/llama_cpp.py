"""llama.cpp as a peer: converts a model folder to GGUF at several widths and asks llama-bench for tokens/s.

Needs a source tree (its convert_hf_to_gguf.py and gguf-py) and the built programs llama-quantize and
llama-bench; the tree comes with the source distribution of llama-cpp-python, under vendor/llama.cpp::

    cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF
    ninja -C build llama-bench llama-quantize
"""

import json
import subprocess
from pathlib import Path

FILE_TYPES = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def convert(source, programs, python, folder, width):
    """The GGUF file of the model in ``folder`` (Hugging Face layout) at ``width``; made when missing."""
    whole, target = Path(folder) / "float32.gguf", Path(folder) / f"{width}.gguf"
    if not whole.exists():
        config = Path(folder) / "config.json"  # the converter of Mamba-2 rounds the vocabulary up, unless told not to
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_vocab_size_multiple": 1}))
        script = Path(source) / "convert_hf_to_gguf.py"
        _run([python, script, folder, "--outtype", "f32", "--outfile", whole])
    if not target.exists():
        _run([Path(programs) / "llama-quantize", whole, target, FILE_TYPES[width]])
    return target


def rate(programs, file, threads, prompt=0, new=0):
    """Tokens a second of reading ``prompt`` tokens or of making ``new`` ones."""
    command = [Path(programs) / "llama-bench", "-m", file, "-t", threads, "-p", prompt, "-n", new, "-r", 1]
    return json.loads(_run([*command, "-ngl", 0, "-o", "json"]))[0]["avg_ts"]


def _run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed: {done.stderr.strip()[-2000:]}")
    return done.stdout
