"""The ``xura`` command.  Every part loads what it needs when it is used: ``xura --help`` imports nothing.

Exit codes: 0 done; 1 it failed on the way; 2 the request makes no sense (arguments, files); 130 Ctrl-C.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

DESCRIPTION = "Vision, language and tools on state-space models: ask, train, measure, look inside."
EPILOG = """\
examples:
  xura ask scene.png "what shape is the red one?" "how many circles are there?"
  xura train jepa --tiny --epochs 2 --batch-size 4
  xura inspect runs/jepa/model

'xura COMMAND --help' explains a command; 'xura train jepa --help' a phase of training.
"""
PHASES = {"vit": "pretrain_vit", "jepa": "train_jepa", "decoder": "train_decoder", "agent": "train_agent",
          "tiny": "reproduce_tiny"}
SCRIPTS = {"eval": "evaluate", "make-data": "make_data"}
NOTICE = "(the first run compiles kernels, which may take a minute)"
FEW, SMALL = 16, 32e6  # questions, and bytes of weights, of which NumPy is done before Numba has loaded its kernels
_MISUSE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv=None):
    """Run one command; returns the exit code.  Without ``argv`` it is the command of this process, and its only one."""
    alone = argv is None
    return guard(functools.partial(_run, alone=alone), sys.argv[1:] if alone else list(argv))


def guard(run, argv):
    """The exit code of ``run(argv)``, where mistakes of the caller's are one line on stderr."""
    try:
        return run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output had enough, as in: xura inspect model | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return code


def _run(argv, alone=False):
    script = _script(argv)
    if script is not None:
        return _delegate(*script)
    if argv == ["--version"]:
        from xuracore import __version__

        print(f"xura {__version__}")
        return 0
    args = _parser().parse_args(argv)
    if alone and args.command == "ask":
        _start_lightly(args)
    return args.run(args) or 0


def _start_lightly(args):
    """Let a process that asks little of a small model use the NumPy forms of kernels, and one thread.

    Loading Numba and its kernels would take longer than all the answers, and the first time minutes.  What the
    environment says comes first.  A trace is left to the kernels: programs replay it bit for bit with theirs.
    """
    folder = Path(args.model)
    folder = folder if folder.exists() else Path(__file__).parent / "pretrained" / folder
    weights = folder / "model.safetensors"
    if len(args.questions) <= FEW and not args.trace and weights.is_file() and weights.stat().st_size <= SMALL:
        os.environ.setdefault("XURA_KERNELS", "numpy")
        os.environ.setdefault("XURA_NUM_THREADS", "1")


def _exit_code(error):
    """1 or 2 for what may happen to anybody, None for a bug, whose traceback should be seen."""
    from xuracore.errors import XuraError

    if isinstance(error, (ArithmeticError, MemoryError)):
        return 1
    if isinstance(error, XuraError) or isinstance(error, _MISUSE):
        return 2
    return 1 if isinstance(error, OSError) else None


def one_line(error):
    """The message without line breaks, and without anything that could move a cursor."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"not enough memory. {text}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable("; ".join(lines)) or type(error).__name__


def printable(text):
    """Text without anything that could move a cursor."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)


# ---------------------------------------------------------------------- what scripts of training carry out
def _script(argv):
    """(module, its name in words, its arguments) where the command is a script's, else None."""
    if argv[:1] == ["train"] and len(argv) > 1 and argv[1] in PHASES:
        return PHASES[argv[1]], f"xura train {argv[1]}", argv[2:]
    if argv and argv[0] in SCRIPTS:
        return SCRIPTS[argv[0]], f"xura {argv[0]}", argv[1:]
    return None


def _delegate(module, name, arguments):
    script = importlib.import_module(f"training.scripts.{module}")
    earlier = sys.argv
    sys.argv = [name, *arguments]  # argparse takes the name it shows from here
    try:
        return script.main(arguments)
    finally:
        sys.argv = earlier


def _parser():
    from xuravljepa import cli_chat, cli_generate, cli_inspect

    parser = argparse.ArgumentParser(prog="xura", description=DESCRIPTION, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, help, run=None, description=None):
        description = description or (run.__doc__ if run and run.__doc__ else help)
        command = commands.add_parser(name, help=help, description=description,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(run=run)
        return command

    def add_model(command):
        command.add_argument("--model", default="tiny", metavar="DIR",
                             help="folder of an agent (default: the shipped one)")

    ask = add("ask", "answer questions about a picture", _ask)
    ask.add_argument("image", metavar="IMAGE", help="picture file: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM")
    ask.add_argument("questions", nargs="+", metavar="QUESTION")
    add_model(ask)
    ask.add_argument("--json", action="store_true", help="one JSON object per question and line")
    ask.add_argument("--show", action="store_true", help="print every step: doubts, calls, readings")
    ask.add_argument("--trace", metavar="FILE", help="write every step there, as JSON Lines")
    ask.add_argument("--page", metavar="FILE", help="write a page (HTML) that shows the steps")

    chat = add("chat", "talk about pictures, line by line", cli_chat.run)
    chat.epilog = cli_chat.EXAMPLES
    cli_chat.add_arguments(chat)
    add_model(chat)

    phases = "\n".join(f"  xura train {name:8s} training/scripts/{file}.py" for name, file in PHASES.items())
    about = "Train a phase, or the tiny model from nothing; each has its own --help."
    train = add("train", "train a phase: vit, jepa, decoder, agent; or tiny, all of them",
                description=f"{about}\n\n{phases}")
    train.add_argument("phase", choices=PHASES)
    add("eval", "measure a model on held-out scenes or your own data (training/scripts/evaluate.py)")
    add("make-data", "write generated pictures and a manifest (training/scripts/make_data.py)")

    generate = add("generate", "continue a text with a language model", cli_generate.run)
    generate.epilog = cli_generate.EXAMPLES
    cli_generate.add_arguments(generate)
    inspect = add("inspect", "list what is in a model folder or file of weights", cli_inspect.run)
    cli_inspect.add_arguments(inspect)

    info = add("info", "versions, threads, kernels, presets and shipped models", _info)
    info.add_argument("--json", action="store_true", help="as one JSON object")
    bench = add("bench", "a few timings of this machine", _bench)
    bench.add_argument("--seconds", type=float, default=0.5, metavar="S", help="for each line (default 0.5)")
    add_model(bench)
    bench.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


@contextlib.contextmanager
def compiling_notice(after=2.0):
    """Say on stderr what is going on if the first answer takes longer than ``after`` seconds."""
    timer = threading.Timer(after, print, (NOTICE,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------- ask
def _ask(args):
    """Answer questions about a picture.

The agent says where it is unsure, and calls a tool where that promises help; --show tells how every answer
came about.
"""
    from xuravljepa.agent.agent import Agent

    agent, replies = Agent.from_pretrained(args.model), []
    wait = contextlib.nullcontext if os.environ.get("XURA_KERNELS") == "numpy" else compiling_notice
    for question in args.questions:
        with wait():
            reply = agent.ask(None if replies else args.image, question)
        replies.append(reply)
        if args.json:
            print(json.dumps(_reply_data(question, reply, agent.trained)), flush=True)
        elif args.show:
            reply.trace.show()
            print()
        else:
            asked = f"{printable(question)}  " if len(args.questions) > 1 else ""
            print(f"{asked}{reply.text}  ({how(reply, agent.trained)})", flush=True)
        if args.trace:
            reply.trace.write(args.trace, append=len(replies) > 1)
    if args.page:
        from xuravljepa.agent.report import write_html
        from xuravljepa.agent.story import Scene

        write_html(args.page, [Scene(args.image, tuple(reply.trace for reply in replies), args.image)])


def how(reply, monitored):
    from xuravljepa.agent.story import percent

    sure = f"{percent(reply.confidence)} sure"
    parts = [sure if monitored else "this model has no monitor: it cannot doubt"]
    for call in reply.tool_calls:
        said = f"said {printable(call['result'][:60])}" if call["ok"] else "failed"
        parts.append(f"{call['tool']} {said}")
    return ", ".join(parts)


def _reply_data(question, reply, monitored):
    confidence = reply.confidence if monitored else None
    return {"question": question, "answer": reply.answer, "confidence": confidence, "unsure": reply.unsure,
            "reason": reply.reason, "tool_calls": reply.tool_calls}


# ---------------------------------------------------------------------- info and bench
def _info(args):
    from xuracore import doctor
    from xuravljepa.model import PRESETS, SHIPPED, parameter_counts
    from xuravljepa.presets import VLJEPAConfig

    facts, notes = doctor.examine()
    presets = {name: parameter_counts(VLJEPAConfig.preset(name)) for name in PRESETS}
    folders = {name: SHIPPED / name for name in PRESETS}
    shipped = {name: str(folder) for name, folder in folders.items() if (folder / "config.json").is_file()}
    if args.json:
        print(json.dumps({"facts": facts, "notes": notes, "presets": presets, "shipped": shipped}, indent=1))
        return
    for name, fact in facts.items():
        print(f"{name:16s} {fact}")
    for note in notes:
        print(f"{'note':16s} {note}")
    print("\npreset      parameters   float32   parts")
    for name, parts in presets.items():
        total = sum(parts.values())
        listed = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items() if count > 1)
        print(f"{name:9s} {total:12,d} {4 * total / 1e6:6.0f} MB   {listed}")
    print("\nshipped models")
    for name, folder in shipped.items():
        print(f"{name:9s} {folder}")
    if not shipped:
        print("none")


def _bench(args):
    """A few timings: medians over as many runs as fit into --seconds each.

For comparisons close everything else, and set XURA_NUM_THREADS.
"""
    import numpy as np

    import xuracore as xc
    from training.data.scenes import render, scene
    from xuracore import jit
    from xuracore.errors import ConfigError
    from xuramamba import Mamba1, Mamba3
    from xuravljepa.agent.agent import Agent

    if not 0 < args.seconds <= 60:
        raise ConfigError(f"--seconds is {args.seconds:g}; expected more than 0 and at most 60")
    agent, rng = Agent.from_pretrained(args.model), np.random.default_rng(0)
    pictures, turn = [render(scene("test", i)) for i in range(2)], itertools.count()
    x = xc.Tensor(np.ones(1, np.float32), requires_grad=True)
    tokens = xc.tensor(rng.standard_normal((1, 512, 256)).astype(np.float32))
    mamba1, mamba3 = Mamba1(256, rng=rng), Mamba3(256, d_state=64, headdim=64, rng=rng)
    asked = "what shape is the red one?"
    work = {
        "ask about a new picture": lambda: agent.ask(pictures[next(turn) % 2], asked),
        "ask about the same picture": lambda: agent.ask(None, asked),
        "Mamba-1 mixer, 512 tokens × 256": xc.no_grad()(lambda: mamba1(tokens)),
        "Mamba-3 mixer, 512 tokens × 256": xc.no_grad()(lambda: mamba3(tokens)),
        "smallest op, forward": lambda: x * x,
        "smallest op, forward and backward": lambda: (x * x).backward(),
    }
    with compiling_notice():
        timings = {name: _median(call, args.seconds) for name, call in work.items()}
    if args.json:
        about = {"threads": xc.get_num_threads(), "kernels": jit.backend()}
        print(json.dumps({"milliseconds": timings, **about}, indent=1))
        return
    print(f"threads: {xc.get_num_threads()}, kernels: {jit.backend()}")
    for name, milliseconds in timings.items():
        print(f"{milliseconds:12.4f} ms   {name}")


def _median(call, seconds):
    """Median milliseconds of ``call`` over about ``seconds``, after a first call that does not count."""
    call()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
