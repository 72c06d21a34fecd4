"""Measure a model and its agent on what no training saw, beside priors and controls, with intervals and a page."""

import argparse
import hashlib
import json
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from training import eval_page, options
from training.data import arguments
from training.evaluation import agent as agent_reports
from training.evaluation import answers, classes, health, material, retrieval, tables, words
from training.evaluation.answering import Intervals, ask_each, picture_numbers, read
from training.phases.common import FeatureStore
from training.phases.monitor import gather_readings
from xuracore import __version__, io, set_num_threads
from xuracore.errors import ConfigError, FormatError
from xuracore.io.atomic import write_atomically
from xuravljepa.agent.agent import Agent, load_heads
from xuravljepa.model import CAPTION_QUERY, SHIPPED

EPILOG = """\
jobs (--only takes one or more):
  answers     nearest known answer per question type, beside the question-only prior, the shuffled-picture control,
              permuted answers; on generated scenes also unseen wording, held-out combinations, corrupted pictures
  classes     open-vocabulary classification: classes are embedded from their names in several templates
  retrieval   pictures to captions and back: recall at 1, 5, 10, median and mean rank
  words       what the Y-Decoder writes: answers, and captions where it was taught any
  health      effective rank, spread, cosines, alignment, uniformity; alarms of collapse
  doubt, tools, injection   the agent, on generated scenes

Intervals (95 %) come from resampling whole pictures.  The same command on as many threads writes the same bytes.

examples:
  xura eval                                                          the shipped model
  xura eval --model runs/tiny/agent/model --json result.json --html result.html
  xura eval --data-dir my/pictures --model runs/jepa/model --html result.html
  xura eval --data-dir my/pictures --only classes --names classes.txt --query "what is in the image?"
"""
MODEL_JOBS = ("answers", "classes", "retrieval", "words", "health")
AGENT_JOBS = ("doubt", "tools", "injection")
CLASS_TYPES = ("shape", "colour_of_shape")  # of the generated questions: those whose answer names a class
MAX_LIST_BYTES = 1_000_000


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="DIR", help="folder of a model, or 'tiny' (default)")
    parser.add_argument("--only", nargs="+", choices=(*MODEL_JOBS, *AGENT_JOBS, "scenes"), metavar="JOB",
                        help=f"{', '.join((*MODEL_JOBS, *AGENT_JOBS))}; 'scenes' is 'answers' on generated scenes")
    group = parser.add_argument_group("what to measure on")
    group.add_argument("--scenes", type=options.positive, default=600, metavar="N",
                       help="generated test scenes (default 600)")
    group.add_argument("--data-seed", type=int, default=0, metavar="N", help="seed of the generated scenes")
    group.add_argument("--data-dir", metavar="DIR",
                       help="your own data instead: a manifest, or a format of --data-format")
    group.add_argument("--split", metavar="NAME", help="which rows of it, or 'all' (default: test, else val, else "
                       "every tenth picture, which training holds out)")
    group.add_argument("--limit", type=options.positive, metavar="N", help="pictures at most")
    arguments.add_data_options(parser)
    group = parser.add_argument_group("how")
    group.add_argument("--names", metavar="FILE", help="class names, one a line (default: the answers in the data)")
    group.add_argument("--templates", metavar="FILE", help="sentences with {} for the name, one a line; the mean of "
                       f"their embeddings is the class (default: {', '.join(classes.TEMPLATES)})")
    group.add_argument("--query", metavar="TEXT", help="one question for every picture when classifying (default: "
                       "each row's own)")
    group.add_argument("--caption-query", default=CAPTION_QUERY, metavar="TEXT",
                       help=f"the question that asks for a caption (default {CAPTION_QUERY!r})")
    group.add_argument("--heads", metavar="DIR", help="other heads to compare the injection with, from a run of "
                       "train_agent.py --injection-mode residual or --stage injection")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the controls and intervals (default 0)")
    group.add_argument("--resamples", type=options.positive, default=1000, metavar="N", help="default 1000")
    group = parser.add_argument_group("results")
    group.add_argument("--json", metavar="FILE", help="write all numbers there")
    group.add_argument("--html", metavar="FILE", help="write a page with pictures of right and wrong answers")
    group.add_argument("--predictions", metavar="FILE",
                       help="write every question with what was said there, as JSON Lines")
    group.add_argument("--feature-cache", metavar="DIR", help="keep the X-Encoder's tokens here")
    group.add_argument("--threads", type=options.positive, metavar="N")
    group.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def lines_of(path):
    """The lines of a text file that are not blank; FormatError for what is no such file."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_LIST_BYTES + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", path) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(content) > MAX_LIST_BYTES or not lines:
        raise FormatError(f"expected some lines, at most {MAX_LIST_BYTES} bytes of them", path)
    return lines


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def about(args, argv, chosen):
    """What was measured on what, and by which command; nothing that changes from run to run."""
    folder = Path(args.model) if Path(args.model).exists() else SHIPPED / args.model
    digests = {f"{part}_sha256": file_sha256(folder / f"{part}.safetensors") for part in ("model", "agent")
               if (folder / f"{part}.safetensors").is_file()}
    asked, bad = len(chosen.rows), chosen.bad.count if chosen.bad is not None else 0
    notes = [*chosen.notes, *([f"{bad} rows that cannot be used were left out"] if bad else [])]
    return {
        "command": shlex.join(["xura", "eval", *argv]),
        "model": {"name": args.model, **digests},
        "data": {"name": chosen.name, "sha256": chosen.sha256(), "questions": asked,
                 "pictures": len(np.unique(picture_numbers(chosen.rows))) if asked else 0,
                 "captions": len(chosen.captions) + len(chosen.texts), "left_out": bad, "notes": notes},
        "versions": {"xura": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "seed": args.seed, "resamples": args.resamples,
    }


def encode(args, model, chosen):
    """(FeatureStore of all pictures, the Material without what cannot be used): the only pass of the X-Encoder."""
    features = FeatureStore(model, chosen.every_row(), report=options.counter(args, "pictures encoded"),
                            cache=args.feature_cache, bad=chosen.bad)
    if chosen.bad is not None:
        chosen = chosen.usable(features)
        if chosen.rows or chosen.texts:
            rows, texts = arguments.leave_out_long(model, chosen.bad, chosen.rows, chosen.texts)
            chosen = replace(chosen, rows=tuple(rows), texts=tuple(texts))
    return features, chosen


def measure_model(args, agent, chosen, wanted, features):
    """({job: report}, Answers or None) of the jobs that need no tools."""
    model, result, said = agent.model, {}, None
    intervals = Intervals(args.seed, args.resamples)
    asked = options.counter(args, "questions answered")
    answerable = chosen.rows and (model.config.answers or all(row.choices for row in chosen.rows))
    if answerable and {"answers", "words", "health"} & set(wanted):
        if "answers" in wanted:
            result["answers"], said = answers.measure(model, chosen, features, intervals, asked)
        else:
            said = read(model, chosen.rows, features, report=asked)
    elif "answers" in wanted:
        result["answers"] = {"skipped": "there are no questions about pictures, or the model was taught no answers"}
    if "classes" in wanted:
        rows = [row for row in chosen.rows if not chosen.generated or row.type in CLASS_TYPES]
        names = lines_of(args.names) if args.names else None
        templates = lines_of(args.templates) if args.templates else classes.TEMPLATES
        result["classes"] = classes.measure(model, rows, features, intervals, names, templates, args.query)
    if "retrieval" in wanted:
        result["retrieval"] = retrieval.measure(model, chosen.captions, features, intervals, args.caption_query)
    if "words" in wanted:
        result["words"] = words.measure(model, said, chosen, features, intervals, args.caption_query,
                                        report=options.counter(args, "texts written"))
    if "health" in wanted:
        if said is None:
            said_of = caption_readings(model, chosen.captions, features, args.caption_query)
        result["health"] = health.measure(model, said or said_of, features, intervals)
    return result, said


def caption_readings(model, rows, features, query):
    """Answers to the caption query, each picture's caption taken for the answer: what health looks at without any."""
    kept, _ = retrieval.readable(model, rows)
    rows = ask_each(kept, query)
    if not rows:
        raise ConfigError("there is nothing to measure: no question that the model could answer, and no caption that "
                          "it could read")
    return read(model, [replace(row, answer=row.caption, answers=(row.caption,)) for row in rows], features)


def measure_agent(args, agent, wanted, rows):
    """{job: report} of the jobs on what the agent adds.   rows : of one's own, or None."""
    result, seed = {}, args.data_seed
    if "doubt" in wanted:
        result["doubt"] = agent_reports.doubt_report(agent.model, agent.heads, args.scenes, seed, rows,
                                                     options.counter(args, "questions doubted"))
    if rows is not None:
        return result
    if len(agent.tools) and "tools" in wanted:
        result["tools"] = agent_reports.tool_report(agent, max(args.scenes // 2, 1), seed,
                                                    options.counter(args, "tool questions asked"))
    if agent.heads.config.cards and "injection" in wanted:
        scenes = max(args.scenes // 3, 1)
        result["injection"] = agent_reports.injection_report(agent.model, agent.heads, scenes, seed)
        if args.heads:
            other = load_heads(agent.model, args.heads)
            result["compared"] = agent_reports.injection_report(agent.model, other, scenes, seed)
    return result


def write_predictions(path, said):
    """Answers as JSON Lines, in the order of the data."""
    rows = ({"id": row.id, "type": row.type, "query": row.query, "answers": list(dict.fromkeys(row.answers)),
             "said": str(text), "right": float(right), "confidence": round(float(sure), 6)}
            for row, text, right, sure in zip(said.rows, said.said, said.right, said.confidence))
    write_atomically(Path(path), [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(argv)
    if args.threads:
        set_num_threads(args.threads)
    jobs = (*MODEL_JOBS, *AGENT_JOBS[: 1 if args.data_dir else None])
    wanted = ["answers" if job == "scenes" else job for job in args.only] if args.only else jobs
    foreign = [job for job in wanted if job not in jobs]
    if foreign:
        raise ConfigError(f"--only {foreign[0]} needs generated tool questions; leave out --data-dir")
    for file in (args.json, args.html, args.predictions):
        if file and not Path(file).resolve().parent.is_dir():
            raise FormatError("there is no such folder to write into", Path(file).parent)
    agent = Agent.from_pretrained(args.model)
    if args.data_dir:
        chosen = material.own(args.data_dir, args.split, args.limit,
                              arguments.open_from(args, Path(args.json).parent if args.json else None,
                                                  say=lambda text: options.say(args, text)))
    else:
        options.say(args, f"no --data-dir: generating {args.scenes} test scenes (seed {args.data_seed})")
        chosen = material.generated(args.scenes, args.data_seed)
    found, said, features = {}, None, None
    if set(wanted) & set(MODEL_JOBS):
        features, chosen = encode(args, agent.model, chosen)
        found, said = measure_model(args, agent, chosen, wanted, features)
    result = {"about": about(args, argv, chosen), **found}
    if agent.trained and set(wanted) & set(AGENT_JOBS):
        result.update(measure_agent(args, agent, wanted, list(chosen.rows) if args.data_dir else None))
    if chosen.bad is not None and chosen.bad.count:
        arguments.report_bad(chosen.bad, Path(args.json).parent if args.json else None, args.quiet)
    print(tables.text(result))
    if args.json:
        io.save_json(Path(args.json), result)
    if args.predictions and said is not None:
        write_predictions(args.predictions, said)
    if args.html:
        cards = {} if said is None else eval_page.choose_cards(said, args.seed)
        shown = [i for part in cards.values() for i in part]
        if agent.trained and shown:  # what the agent itself would say of these, by its monitor
            rows = [said.rows[i] for i in shown]
            found = gather_readings(agent.model, agent.heads, rows, inject=False)
            said.confidence[shown] = 1 - agent.heads.monitor.p_wrong(found["features"])
        eval_page.write_html(args.html, result, said, cards)
        options.say(args, f"page: {args.html}")
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
