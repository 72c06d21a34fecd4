"""Options from a file: what wins, what is refused, and that what was resolved is understood again."""

import json

import pytest

from training import options
from training.config_file import RESOLVED, read_config, resolved, write_resolved
from xuracore.errors import ConfigError, FormatError


def parser():
    made = options.training_parser("train", "", steps=100, batch_size=8, lr=1e-3, warmup=10, weight_decay=0.01,
                                   output_dir="runs/here", monitor="all")
    made.add_argument("--y-encoder-lr-multiplier", type=float, default=1.0)
    made.add_argument("--model", "--phase1-checkpoint", metavar="DIR")
    made.add_argument("--only", nargs="+", choices=("a", "b"))
    return made


def written(tmp_path, text, name="run.json"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_defaults_give_way_to_the_file_the_file_to_set_and_set_to_flags(tmp_path):
    file = written(tmp_path, '{"lr": 0.1, "batch-size": 3, "seed": 3, "tiny": true, "only": ["a"]}')
    args = parser().parse_args(["--seed", "5", "--config", file, "--set", "batch_size=4", "--set", "seed=4"])
    assert (args.lr, args.batch_size, args.seed, args.tiny, args.only) == (0.1, 4, 5, True, ["a"])
    assert args.weight_decay == 0.01 and args.epochs is None
    assert parser().parse_args(["--config", file, "--set", "tiny=false"]).tiny is False


def test_toml_says_the_same_as_json(tmp_path):
    file = written(tmp_path, 'lr = 0.1\nschedule = "wsd"\nresume = "latest"\n', "run.toml")
    args = parser().parse_args(["--config", file])
    assert (args.lr, args.schedule, args.resume) == (0.1, "wsd", "latest")


def test_a_later_name_of_an_option_is_understood_too(tmp_path):
    assert parser().parse_args(["--set", "phase1_checkpoint=here"]).model == "here"
    assert parser().parse_args(["--set", "wd=0.5"]).weight_decay == 0.5


@pytest.mark.parametrize("given, says", [
    ({"batchsize": 3}, "unknown key 'batchsize' .did you mean 'batch_size'"),
    ({"batch_size": 0}, "not a whole number"),
    ({"lr": "fast"}, "lr: invalid float value: 'fast'"),
    ({"lr": True}, "expected a number"),
    ({"tiny": "yes"}, "expected true or false"),
    ({"schedule": "cosinus"}, "invalid choice: 'cosinus'"),
    ({"only": "a"}, "expected a list"),
    ({"only": ["c"]}, "invalid choice"),
    ({"seed": None}, "seed is null"),
    ({"model": {"depth": 3}}, "expected a number or a text"),
    ({"config": "other.json"}, "unknown key"),
])
def test_what_the_file_gets_wrong_is_named(given, says, tmp_path):
    file = written(tmp_path, json.dumps(given))
    with pytest.raises(ConfigError, match=says) as caught:
        parser().parse_args(["--config", file])
    assert file in str(caught.value)


@pytest.mark.parametrize("words, says", [
    (["--set", "lr"], "KEY=VALUE"),
    (["--set", "learning_rate=3"], "unknown key"),
    (["--set", "steps=-1"], "--set: steps"),
])
def test_what_set_gets_wrong_is_named(words, says):
    with pytest.raises(ConfigError, match=says):
        parser().parse_args(words)


def test_an_unknown_flag_comes_with_the_nearest_known_one(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--what", "--batchsize=4"])
    assert "--batchsize=4 (did you mean '--batch-size'?)" in capsys.readouterr().err


@pytest.mark.parametrize("name, text, error", [
    ("run.yaml", "lr: 3", ConfigError), ("run.json", "[1]", FormatError), ("run.json", "{", FormatError),
    ("run.toml", "lr = ", FormatError), ("run.json", '{"lr": 1, "lr": 2}', FormatError),
])
def test_files_that_are_no_configuration_are_refused(name, text, error, tmp_path):
    with pytest.raises(error, match="run"):
        read_config(written(tmp_path, text, name))


def test_the_resolved_configuration_gives_the_same_options_again(tmp_path):
    words = ["--tiny", "--lr", "0.3", "--set", "only=[\"b\"]", "--resume", "--ema", "0.9", "--epochs", "2"]
    args = parser().parse_args(words)
    options.prepare(args)
    write_resolved(args, tmp_path)
    again = parser().parse_args(["--config", str(tmp_path / RESOLVED)])
    options.prepare(again)
    assert resolved(again) == resolved(args) == read_config(tmp_path / RESOLVED)
    assert again.resume is None and again.tiny and again.batch_size == 8


def test_a_dry_run_prints_the_plan(capsys):
    args = parser().parse_args(["--dry-run", "--steps", "7"])
    options.prepare(args)
    assert options.dry_run(args, phase=1)
    told = json.loads(capsys.readouterr().out)
    assert told["would_train"] == {"phase": 1, "steps": 7} and told["options"]["lr"] == 1e-3
    assert not options.dry_run(parser().parse_args([]))


def test_patience_needs_something_to_watch():
    args = parser().parse_args(["--patience", "2"])
    with pytest.raises(ConfigError, match="--evaluate-every"):
        options.prepare(args)
    args = parser().parse_args(["--patience", "2", "--evaluate-every", "5"])
    options.prepare(args)
    assert args.monitor == "all"
