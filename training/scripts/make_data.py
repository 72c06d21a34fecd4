"""Write generated data to disk: pictures, a manifest, a hash of it all, and a sheet to look at.

    python training/scripts/make_data.py                                     100 training scenes
    python training/scripts/make_data.py --kind tools --split calib test     tool questions of two splits
    python training/scripts/make_data.py --kind stream --n 3 --length 90     three streams with events

Training does not need these files: it draws the same pictures in memory.  They are for looking at the data,
for other programs, and as a pattern for your own manifest (see training/README.md).  The same arguments
always give the same bytes; --n 200 begins with the pictures of --n 100.
"""
import argparse
import hashlib
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.data.dataset import Dataset
from training.data.manifest import Sample, write_manifest
from training.data.priors import prior_table, question_only_prior
from training.data.questions import questions
from training.data.rng import GENERATOR_VERSION
from training.data.scenes import IMAGE_SIZE, SPLITS, caption, render, scene
from training.data.streams import render_stream, stream
from training.data.tools_data import price_list, tool_questions, write_price_list
from xuracore.errors import ConfigError, XuraError

KINDS = ("scenes", "tools", "stream")
INFO = "data.json"
POOL_OF_SPLIT = {"train": "train", "val": "train", "calib": "calib"}     # every other split: test
PREVIEW_TILES, PREVIEW_COLUMNS = 18, 6
PRIOR_SCENES = 2000


def main(arguments=None):
    """Run the command; returns the exit code: 0, or 2 when the arguments or the folder will not do."""
    options = _parser().parse_args(arguments)
    try:
        return _make(options)
    except XuraError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="scenes",
                        help="scenes: questions about what is seen (default); tools: questions that need a "
                             "price list or a sum; stream: frame sequences with events")
    parser.add_argument("--n", type=int, default=None,
                        help="scenes (default 100) or streams (default 4) of each split")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=["train"], metavar="SPLIT",
                        help=f"which splits to write, of {', '.join(SPLITS)} (default train); ood holds "
                             "the colour and shape pairs that no other split has, corrupt is test seen badly")
    parser.add_argument("--size", type=int, default=IMAGE_SIZE,
                        help=f"side of the pictures in pixels, a multiple of {IMAGE_SIZE}, the default")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other data (default 0)")
    parser.add_argument("--length", type=int, default=60, help="frames of each stream (default 60)")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="where to write (default data/KIND); made if missing, else it must be empty or "
                             "hold an earlier result of this command, which is replaced")
    parser.add_argument("--preview", action=argparse.BooleanOptionalAction, default=True,
                        help="also write preview.png, a sheet of pictures with a question each (default yes)")
    return parser


def _make(options):
    count = options.n if options.n is not None else 4 if options.kind == "stream" else 100
    if count < 1:
        raise ConfigError(f"--n must be at least 1, got {count}")
    if options.size < IMAGE_SIZE or options.size % IMAGE_SIZE:
        raise ConfigError(f"--size must be a multiple of {IMAGE_SIZE}, got {options.size}")
    out = _prepare(options.out or Path("data") / options.kind)
    writer = _Writer(out, options.size)
    produce = {"scenes": _write_scenes, "tools": _write_tools, "stream": _write_streams}[options.kind]
    for split in dict.fromkeys(options.split):
        produce(writer, split, count, options)
    write_manifest(out / "manifest.jsonl", writer.rows)
    info = {"kind": options.kind, "splits": list(dict.fromkeys(options.split)), "n": count,
            "size": options.size, "seed": options.seed, "generator": GENERATOR_VERSION,
            "pictures": writer.pictures, "rows": len(writer.rows), "sha256": writer.hash()}
    if options.kind == "tools":
        write_price_list(out / "price_list.json", options.seed)
    if options.kind == "stream":
        info["length"] = options.length
    (out / INFO).write_text(json.dumps(info, indent=1) + "\n", "utf-8")
    if options.preview:
        contact_sheet(writer.tiles).save(out / "preview.png")
    _say(options, out, info, writer)
    return 0


def _prepare(out):
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / INFO).is_file():
        raise ConfigError(f"--out {out} has other files in it; give an empty or a new folder")
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        for stale in (out / "images").glob("*.png"):
            stale.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    return out


class _Writer:
    """Saves pictures, collects rows, tiles for the sheet, and the hash of raw pixels and texts."""

    def __init__(self, out, size):
        self.out, self.scale = out, size // IMAGE_SIZE
        self.rows, self.tiles, self.pictures = [], [], 0
        self._digest = hashlib.sha256(GENERATOR_VERSION.encode())

    def picture(self, pixels, name):
        """Save uint8 (64, 64, 3) pixels, enlarged by whole steps; returns the path below the folder."""
        pixels = pixels.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        self._digest.update(pixels.tobytes())
        self.pictures += 1
        place = Path("images") / f"{name}.png"
        Image.fromarray(pixels).save(self.out / place)
        return place

    def row(self, sample):
        """Add one row of the manifest."""
        self._digest.update(repr(sample).encode())
        self.rows.append(sample)

    def tile(self, pixels, text):
        """Offer a picture for the contact sheet."""
        if len(self.tiles) < PREVIEW_TILES:
            self.tiles.append((pixels, text))

    def hash(self):
        """SHA-256 of everything written so far, in hex."""
        return self._digest.hexdigest()


def _write_scenes(writer, split, count, options):
    for index in range(count):
        this = scene(split, index, options.seed)
        pixels = render(this)
        place = writer.picture(pixels, f"{split}-{index:06d}")
        asked = questions(this)
        writer.row(Sample(f"{split}-{index}-caption", place, caption=caption(this), split=split))
        for i, q in enumerate(asked):
            writer.row(Sample(f"{split}-{index}-{i}", place, q.query, q.answer, (q.answer,), type=q.type,
                              split=split, meta={"relational": q.relational, "family": q.family}))
        shown = asked[index % len(asked)]
        writer.tile(pixels, f"{shown.query} {shown.answer}")


def _write_tools(writer, split, count, options):
    for index in range(count):
        this = scene(split, index, options.seed)
        pixels = render(this)
        place = writer.picture(pixels, f"{split}-{index:06d}")
        for pool in ("known", POOL_OF_SPLIT.get(split, "test")):
            for q in tool_questions(this, pool):
                writer.row(Sample(f"{split}-{index}-{pool}-{q.type}", place, q.query, q.answer, (q.answer,),
                                  type=q.type, split=split,
                                  tool={"name": q.tool, "arguments": q.arguments, "result": q.result},
                                  meta={"known": q.known, "key": q.key, "pool": pool}))
                if q.type == ("price", "sum")[index // 2 % 2] and q.known == (index % 2 == 0):
                    writer.tile(pixels, f"{q.query} {q.answer} ({'known' if q.known else 'tool'})")


def _write_streams(writer, split, count, options):
    for index in range(count):
        this = stream(split, index, options.seed, options.length)
        happened = {event.frame: event for event in this.events}
        said = caption(this.scenes[0])
        for frame, pixels in enumerate(render_stream(this)):
            place = writer.picture(pixels, f"{split}-{index:04d}-{frame:04d}")
            event = happened.get(frame)
            meta = {"stream": index, "frame": frame}
            if event:
                meta |= {"event": event.text, "kind": event.kind}
            writer.row(Sample(f"{split}-{index}-{frame}", place, caption=caption(this.scenes[frame]),
                              split=split, meta=meta))
            if frame == 0 or event:
                writer.tile(pixels, f"frame {frame}: {event.text if event else said}")


def contact_sheet(tiles, columns=PREVIEW_COLUMNS):
    """Pictures with their texts below, as one PIL image; ``tiles`` lists (uint8 (64, 64, 3), text)."""
    side, margin, line = 3 * IMAGE_SIZE, 10, 12
    width, height = side + 2 * margin, side + 2 * margin + 3 * line
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (pixels, text) in enumerate(tiles):
        left, top = i % columns * width + margin, i // columns * height + margin
        large = Image.fromarray(np.asarray(pixels)).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(large, (left, top))
        draw.rectangle((left - 1, top - 1, left + side, top + side), outline=(150, 150, 150))
        for k, words in enumerate(textwrap.wrap(text, 32)[:3]):
            draw.text((left, top + side + 3 + k * line), words, fill="black", font=font)
    return sheet


def _say(options, out, info, writer):
    print(f"Wrote {info['pictures']} pictures and {info['rows']} rows to {out}/")
    print(f"  manifest.jsonl   one row per question or caption\n  {INFO:16s} seed, generator, SHA-256")
    if options.kind == "tools":
        print(f"  price_list.json  the prices of {len(price_list(options.seed))} shops, for the lookup tool")
    if options.preview:
        print("  preview.png      a sheet to look at")
    print(f"SHA-256 {info['sha256']}")
    if options.kind == "scenes":
        train = Dataset.scenes("train", PRIOR_SCENES, options.seed)
        test = Dataset.scenes("test", PRIOR_SCENES // 4, options.seed)
        print(f"Guessing from the question alone, learned on {PRIOR_SCENES} train scenes, is right in test:")
        print(prior_table(question_only_prior(train, test)))


if __name__ == "__main__":
    sys.exit(main())
