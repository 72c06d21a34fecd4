"""The command-line options that say what data to train or measure on, and what they open."""

import sys
from pathlib import Path

from training.data.dataset import open_dataset
from training.data.readers import FORMATS
from training.data.readers.settings import Settings
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuravljepa.model import CAPTION_QUERY

SHOWN = 10
LARGE = 4_000_000  # parameters of an X-Encoder that takes longer to encode a picture than to read its tokens
BAD_SAMPLES = "bad_samples.jsonl"


def add_data_options(parser):
    """Add the options about one's own data, beside ``--data-dir``."""
    group = parser.add_argument_group("your own data (with --data-dir; see training/README.md)")
    group.add_argument("--data-format", choices=FORMATS, default="auto", help="of what lies there (default: looked at)")
    group.add_argument("--data-images", metavar="DIR", help="folder of the pictures, if not beside the data")
    group.add_argument("--data-question", metavar="TEXT", default=CAPTION_QUERY,
                       help=f"asked of pictures that have only a class (default {CAPTION_QUERY!r})")
    for name, what in (("img", "pictures"), ("caption", "captions"), ("query", "questions"), ("answer", "answers")):
        group.add_argument(f"--csv-{name}-key", metavar="NAME", help=f"column, or JSON key, of the {what}")
    group.add_argument("--csv-separator", metavar="CHARACTER", help="of columns (default: what the first line has)")
    group.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="SHARE",
                       help="of rows that may be bad: they are reported and left out (default 0: none)")


def add_cache_option(parser):
    """Add ``--feature-cache`` to a parser, or to a group of one."""
    parser.add_argument("--feature-cache", metavar="DIR", help="keep the frozen X-Encoder's tokens here (float16, "
                        "found by the pictures' bytes), so that no run encodes a picture again; 'none' keeps nothing "
                        "(default: none, but 'features' beside --output-dir where the X-Encoder is large)")


def cache_folder(args, encoder):
    """The folder of ``--feature-cache``, or None: by default one that all phases share, for a large X-Encoder."""
    if args.feature_cache is not None:
        return None if args.feature_cache == "none" else args.feature_cache
    if encoder.parameter_count() < LARGE or args._ranks.size > 1:  # several ranks share the encoding instead
        return None
    folder = Path(args.output_dir).parent / "features"
    if not args.quiet:
        print(f"the X-Encoder's tokens are kept in {folder}, {2 * encoder.config.n_tokens * encoder.config.d_model:,} "
              "bytes a picture (--feature-cache none: they are not)", file=sys.stderr, flush=True)
    return folder


def open_from(args, folder=None, split=None, say=None):
    """The Dataset at ``args.data_dir``; errors as in ``open_dataset``.

    folder : gets the list of bad rows if there are too many.
    """
    separator = {"\\t": "\t", "tab": "\t"}.get(args.csv_separator, args.csv_separator)
    settings = Settings(Path(args.data_images) if args.data_images else None, args.data_question, args.csv_img_key,
                        args.csv_caption_key, args.csv_query_key, args.csv_answer_key, separator)
    listing = Path(folder) / BAD_SAMPLES if folder is not None else None
    return open_dataset(args.data_dir, args.data_format, split=split, max_bad_fraction=args.max_bad_fraction,
                        settings=settings, say=say, listing=listing)


def check_known(model, source, rows, given):
    """ConfigError where a model knows no answer of ``rows``: it was trained on something else.

    given : whether the rows are from --data-dir, not generated.
    """
    if not {row.answer for row in rows} & set(model.config.answers):
        raise ConfigError(f"the model {source} knows no answer of {'your' if given else 'generated'} questions: "
                          + ("train the phases before on this --data-dir first, and name the result with --model"
                             if given else "it was trained on data of your own, and --data-dir has to say where they "
                             "are"))


def leave_out_long(model, bad, *parts):
    """For each list of rows, those whose texts the model has room for; the others go to ``bad``."""
    kept = [[row for row in rows if _fits(model, row, bad)] for rows in parts]
    bad.check(sum(map(len, kept)))
    return kept


def _fits(model, row, bad):
    try:
        text = row.caption if row.answer is None else row.answer
        model.query_tokens([row.query or CAPTION_QUERY])
        model.y_encoder.tokens([text])
        model.y_decoder.tokens([text])
    except (ShapeError, DTypeError) as error:
        bad.add(*(row.origin or (row.image, None)), error)
        return False
    return True


def report_bad(bad, folder, quiet=False):
    """Say on stderr how many rows were left out, and which first; write all to ``folder``/bad_samples.jsonl."""
    if folder is not None:
        path = Path(folder) / BAD_SAMPLES
        path.unlink(missing_ok=True)  # of an earlier run
        if bad.count:
            bad.save(path)
    if bad.count and not quiet:
        where = f" (all in {path})" if folder is not None else ""
        print(f"{bad.count} bad rows were left out{where}:\n{bad.report(SHOWN)}", file=sys.stderr, flush=True)
