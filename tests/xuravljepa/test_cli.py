"""The command: short errors, right exit codes, nothing imported before it is needed, nothing believed."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xuracore
from xuracore import io
from xuramamba import LanguageModel, LanguageModelConfig
from xuravljepa import cli
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.trace import read_traces
from xuravljepa.cli import compiling_notice
from xuravljepa.model import VLJEPA, parameter_counts
from xuravljepa.presets import VLJEPAConfig

ROOT = Path(xuracore.__file__).parent.parent
ANSWERS = ("circle", "square", *map(str, range(31)))
ASKED = "what shape is the red one?"
SMALL = {"d_state": 16, "headdim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An agent with random weights that always doubts, the two tools, and a picture."""
    path = tmp_path_factory.mktemp("agent")
    model = VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(0))
    config = AgentConfig.for_model(model.config)
    heads = AgentHeads(config, model.config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.weight.data[:] = 0
    heads.monitor.trust.data[:] = 0
    heads.monitor.output.bias.data[:] = 4.0
    Agent(model, heads).save_pretrained(path)
    io.save_json(path / "prices.json", {"zorba": {answer: 7 for answer in ANSWERS}})
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "scene.png")
    return path


@pytest.fixture(autouse=True)
def _no_notice(monkeypatch):
    """Whether a first call compiles for long enough to be announced depends on the machine."""
    monkeypatch.setattr(cli, "compiling_notice", contextlib.nullcontext)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse's way
        code = error.code
    return code, *capsys.readouterr()


def python(*arguments, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=environment, **more)


# ---------------------------------------------------------------------- help and mistakes
def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom xuravljepa import cli\n"
            "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'numpy', 'numba', 'PIL', 'xuracore', 'training'} & set(sys.modules)\n"
            "print(sorted(heavy), file=sys.stderr)")
    result = python("-c", code)
    assert result.returncode == 0 and result.stderr == "[]\n"
    assert all(name in result.stdout for name in ("ask", "train", "eval", "make-data", "generate", "inspect",
                                                  "info", "bench"))


@pytest.mark.parametrize("command", [["ask"], ["chat"], ["inspect"], ["info"], ["bench"], ["generate"], ["train"],
                                     *(["train", phase] for phase in cli.PHASES), ["make-data"], ["eval"]])
def test_every_command_has_help(capsys, command):
    code, out, err = run(capsys, *command, "--help")
    assert code == 0 and err == ""
    assert out.startswith(f"usage: xura {' '.join(command)} ")


@pytest.mark.parametrize("arguments", [
    [], ["nonsense"], ["ask"], ["ask", "a.png"], ["train"], ["train", "nothing"], ["inspect"],
    ["train", "jepa", "--no-such-option"], ["bench", "--seconds", "many"]])
def test_wrong_arguments_end_with_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "error" in err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"xura {xuracore.__version__}\n", "")


@pytest.mark.parametrize("arguments, says", [
    (["ask", "missing.png", "any?"], "no such file"),
    (["ask", "{here}/scene.png", "x " * 600], "limit"),
    (["ask", "{here}/scene.png", " "], "empty"),
    (["ask", "{here}/config.json", "any?"], "not a picture"),
    (["ask", "{here}/scene.png", "any?", "--model", "{here}/missing"], "no such folder"),
    (["ask", "{here}/scene.png", "any?", "--trace", "{here}/no/such/folder"], "No such file"),
    (["inspect", "{here}/missing"], "No such file"),
    (["inspect", "{here}/scene.png"], "header"),
    (["generate", "{here}", "hello"], "model_type"),
    (["bench", "--seconds", "0"], "--seconds"),
    (["train", "agent", "--data-dir", "x", "--model", "{here}/missing", "--quiet"], "no such folder"),
    (["make-data", "--n", "0"], "--n")])
def test_what_cannot_be_done_is_one_line_and_2(capsys, folder, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(here=folder) for argument in arguments]
    if arguments[0] in ("ask", "bench") and "--model" not in arguments:
        arguments += ["--model", str(folder)]
    code, out, err = run(capsys, *arguments)
    assert code == 2 and says in err and err.count("\n") == 1
    assert "Traceback" not in err


def test_a_file_name_cannot_move_the_cursor(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path / "\x1b[2Jnothing")
    assert code == 2 and "\x1b" not in err


def test_ctrl_c_is_130_and_a_bug_shows_its_traceback(capsys):
    def stop(error):
        raise error

    assert cli.guard(stop, KeyboardInterrupt()) == 130
    assert cli.guard(stop, ArithmeticError("loss is not finite")) == 1
    assert cli.guard(stop, OSError(28, "No space left on device")) == 1
    assert cli.guard(stop, MemoryError("3 GiB")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: loss is not finite", "error: [Errno 28] No space left on device",
        "error: not enough memory. 3 GiB"]
    with pytest.raises(RuntimeError):
        cli.guard(stop, RuntimeError("a bug"))


def test_a_closed_pipe_is_no_traceback(folder):
    command = f"{sys.executable} -m xuravljepa.cli inspect {folder} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.stdout.count("\n") == 1 and result.stderr == ""


def test_a_slow_start_is_announced(capsys):
    with compiling_notice(after=0.01):
        time.sleep(0.2)
    with compiling_notice(after=60.0):
        pass
    assert capsys.readouterr().err == f"{cli.NOTICE}\n"


# ---------------------------------------------------------------------- ask
def test_ask_answers_and_says_where_it_guesses(capsys, folder):
    code, out, err = run(capsys, "ask", folder / "scene.png", ASKED, "--model", folder)
    assert code == 0 and out.startswith("I am not sure. My best guess is: ") and "2 % sure" in out


def test_a_model_without_a_monitor_claims_no_confidence(capsys, folder, tmp_path):
    Agent.from_pretrained(folder).model.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "ask", folder / "scene.png", ASKED, "--model", tmp_path)
    assert code == 0 and "%" not in out and "no monitor" in out
    out = run(capsys, "ask", folder / "scene.png", ASKED, "--model", tmp_path, "--json")[1]
    assert json.loads(out)["confidence"] is None


def test_ask_says_what_a_tool_said(capsys, folder):
    code, out, _ = run(capsys, "ask", folder / "scene.png", ASKED, "price of the red one at zorba?",
                       "--model", folder)
    assert code == 0
    assert out.splitlines()[0].startswith(f"{ASKED}  ") and "lookup said 7" in out.splitlines()[1]


def test_ask_as_json_with_trace_and_page(capsys, folder, tmp_path):
    questions = [ASKED, "price of the red one at zorba?"]
    code, out, _ = run(capsys, "ask", folder / "scene.png", *questions, "--model", folder, "--json",
                       "--trace", tmp_path / "run.jsonl", "--page", tmp_path / "page.html")
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [reply["question"] for reply in replies] == questions
    assert replies[1]["tool_calls"][0]["result"] == "7" and replies[0]["unsure"] is True
    traces = list(read_traces(tmp_path / "run.jsonl"))
    assert [trace.run.question for trace in traces] == questions
    assert [trace.final.answer for trace in traces] == [reply["answer"] for reply in replies]
    assert ASKED in (tmp_path / "page.html").read_text("utf-8")


def test_ask_shows_every_step(capsys, folder):
    question = "add 7 to the number of circles"
    code, out, _ = run(capsys, "ask", folder / "scene.png", question, "--model", folder, "--show")
    assert code == 0 and "read the picture" in out and "calculator(" in out


def test_a_short_question_from_the_shell_loads_no_numba(folder):
    code = ("import os, sys\nfrom xuravljepa import cli\n"
            "for name in ('XURA_KERNELS', 'XURA_NUM_THREADS'): os.environ.pop(name, None)\n"
            f"sys.argv = ['xura', 'ask', {str(folder / 'scene.png')!r}, {ASKED!r}, '--model', {str(folder)!r}]\n"
            "print(cli.main(), 'numba' in sys.modules)")
    result = python("-c", code)
    assert result.stdout.startswith("I am not sure.") and result.stdout.endswith("\n0 False\n"), result.stderr


@pytest.mark.parametrize("more", [[], ["--trace", "run.jsonl"], ["and?"] * cli.FEW, ["--model", "small"]])
def test_what_a_lone_question_starts_with(more, folder, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", environment := {"XURA_NUM_THREADS": "2"})
    arguments = cli._parser().parse_args(["ask", "--model", str(folder), "scene.png", ASKED, *more])
    cli._start_lightly(arguments)
    assert environment == {"XURA_NUM_THREADS": "2"} | ({} if more else {"XURA_KERNELS": "numpy"})


# ---------------------------------------------------------------------- inspect
def test_inspect_lists_a_folder(capsys, folder):
    code, out, err = run(capsys, "inspect", folder)
    assert code == 0 and err == "" and "xura-vljepa" in out
    state = Agent.from_pretrained(folder).model.state_dict()
    assert f"{sum(array.size for array in state.values()):,} numbers" in out
    assert all(name in out for name in state)
    code, summary, _ = run(capsys, "inspect", folder, "--summary")
    assert code == 0 and "predictor.read_tokens" not in summary
    eyes = sum(array.size for name, array in state.items() if name.startswith("x_encoder."))
    assert f"  x_encoder: {eyes:,}\n" in summary


def test_inspect_as_json_is_the_header(capsys, tmp_path):
    tensors = {"a": np.zeros((2, 3), np.float16), "b": np.array(1, np.int64)}
    io.save_safetensors(tmp_path / "x.safetensors", tensors, {"note": "of\x1b[2J ours"})
    code, out, _ = run(capsys, "inspect", tmp_path / "x.safetensors", "--json")
    (file,) = json.loads(out)["files"].values()
    assert file == {"tensors": {"a": {"dtype": "F16", "shape": [2, 3]}, "b": {"dtype": "I64", "shape": []}},
                    "parameters": 7, "bytes": 20, "metadata": {"note": "of\x1b[2J ours"}}
    code, out, _ = run(capsys, "inspect", tmp_path / "x.safetensors")
    assert code == 0 and "2 × 3" in out and "\x1b" not in out


@pytest.mark.parametrize("data", [b"", b"\x08" + b"\0" * 7, b"\xff" * 8 + b"{}", b"\x80\x04pickle" * 9,
                                  (2).to_bytes(8, "little") + b"{}" + b"left over",
                                  (9).to_bytes(8, "little") + b'{"a": {}}'])
def test_inspect_refuses_a_hostile_file(capsys, tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    code, out, err = run(capsys, "inspect", tmp_path / "x.safetensors")
    assert code == 2 and out == "" and "x.safetensors" in err and err.count("\n") == 1
    (tmp_path / "config.json").write_text("[" * 10_000)
    assert run(capsys, "inspect", tmp_path)[0] == 2


def test_inspect_wants_something_to_look_at(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2 and "no .safetensors" in err


# ---------------------------------------------------------------------- the other commands
def test_info_knows_versions_threads_and_presets(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and xuracore.__version__ in out and "threads" in out
    counts = json.loads(run(capsys, "info", "--json")[1])["presets"]
    assert sum(counts["tiny"].values()) == VLJEPA(VLJEPAConfig.tiny()).parameter_count()
    assert set(counts) == {"tiny", "small", "base"}


def test_parameters_are_counted_without_the_memory_of_the_model():
    config = VLJEPAConfig.tiny()
    odd = config.replace(predictor=config.predictor.replace(n_layers=3, gates=False))
    assert sum(parameter_counts(odd).values()) == VLJEPA(odd).parameter_count()


def test_bench_measures(capsys, folder):
    code, out, _ = run(capsys, "bench", "--seconds", "0.001", "--model", folder, "--json")
    times = json.loads(out)["milliseconds"]
    assert code == 0 and len(times) == 6 and all(0 < value < 1e5 for value in times.values())


def test_generate_continues_bytes_and_is_repeatable(capsys, tmp_path):
    LanguageModel(LanguageModelConfig(264, 32, 1, mixer_fields=SMALL)).save_pretrained(tmp_path)
    arguments = ["generate", tmp_path, "red ", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("red ") and run(capsys, *arguments)[1] == out
    assert run(capsys, "generate", tmp_path, "")[0] == 2


def test_generate_refuses_a_vocabulary_of_words(capsys, tmp_path):
    LanguageModel(LanguageModelConfig(300, 32, 1, mixer_fields=SMALL)).save_pretrained(tmp_path)
    code, _, err = run(capsys, "generate", tmp_path, "red")
    assert code == 2 and "bytes" in err


def test_make_data_is_the_script(capsys, tmp_path):
    out = tmp_path / "data"
    code, _, _ = run(capsys, "make-data", "--kind", "stream", "--n", "1", "--length", "2", "--out", out)
    assert code == 0 and (out / "manifest.jsonl").is_file()
    assert sys.argv[0] != "xura make-data"
