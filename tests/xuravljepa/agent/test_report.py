"""The page and the picture show the whole story, load nothing, and let no text be more than text."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xuracore.errors import FormatError
from xuravljepa.agent.picture import draw_scenes, write_png
from xuravljepa.agent.report import html_page, write_html
from xuravljepa.agent.story import MAX_SIDE, Scene, percent, picture_to_show, tell, verdict
from xuravljepa.agent.tools import ToolFailure, ToolResult
from xuravljepa.agent.trace import Run, Step, Trace

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
READ = Step(0, 0.01, "read", "4", p_wrong_after=0.93, candidates=(("4", 0.31), ("7", 0.3), ("no", -0.2)))
CALL = Step(1, 0.04, "call", "7", p_wrong_before=0.93, p_wrong_after=0.04,
            candidates=(("7", 0.8), ("4", 0.2)), tool="lookup", arguments={"shop": "zorba", "item": "circle"},
            asked=(("what shape is the red one?", "circle"),), ms=0.3, state_change=0.21,
            result=ToolResult("lookup", True, 7, "7", ms=0.3))
FAILED = Step(1, 0.04, "call", "4", p_wrong_before=0.93, tool="lookup", ms=0.3, note="so it is",
              result=ToolResult("lookup", False, error=ToolFailure("LookupError", "no shop")))
END = Step(2, 0.05, "answer", "7", reason="confident", p_wrong_after=0.04)
ASKED = Run("r1", "what does the red one cost at zorba?", "tiny", seed=3, expected="7")
MENDED = Trace(ASKED, [READ, CALL, END])
GAVE_UP = dataclasses.replace(END, answer="4", reason="tool_error", p_wrong_after=0.93)
UNMENDED = Trace(ASKED, [READ, FAILED, GAVE_UP])
CUT_OFF, EMPTY = Trace(ASKED, [READ]), Trace(ASKED)


class Page(HTMLParser):
    """Reads a page: its text, what its tags refer to, and whether they are closed in order."""

    void = {"meta", "img", "line", "polyline"}

    def __init__(self, page):
        super().__init__()
        self.open, self.said, self.links, self.tags = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{name} is a script"
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                self.links.append(value)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def test_the_page_tells_the_story():
    page = Page(html_page([Scene(PIXELS, (MENDED,), "a new scene")]))
    story = ["what does the red one cost at zorba?", "7", "96 % sure", "right", "nearest answers before",
             "0.31", "nearest answers after lookup", "0.80", "asked itself",
             "what shape is the red one? “circle”", 'lookup(shop="zorba", item="circle") = 7 (0.3 ms)',
             "changed the state by 21 %", "it is sure enough"]
    rest = page.text
    assert "a new scene" in rest
    for part in story:
        assert part in rest, part
        rest = rest[rest.index(part):]
    assert page.open == [] and {"polyline", "circle", "table"} <= set(page.tags)


def test_a_failure_and_a_wrong_answer_are_shown_as_such():
    text = Page(html_page([Scene(PIXELS, (UNMENDED,))])).text
    assert "wrong: it is “7”" in text and "7 % sure: a guess" in text
    assert "lookup(?): LookupError: no shop" in text and "so it is" in text


def test_the_page_is_self_contained():
    source = html_page([Scene(PIXELS, (MENDED, UNMENDED)), Scene(PIXELS[:32], (CUT_OFF, EMPTY))])
    page = Page(source)
    assert len(page.links) == 2 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "default-src 'none'" in source
    assert not re.search(r"url\(|@import|https?:", source)
    shown = Image.open(io.BytesIO(base64.b64decode(page.links[0].split(",")[1])))
    assert np.array_equal(np.asarray(shown)[::8, ::8], PIXELS)


HOSTILE = st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>",
                           "\x1b[31m", "&amp;", "' onload='", "x" * 5000, "a " * 2000, "", "\u202e",
                           "日本語 é ∑"])


@settings(max_examples=12)
@given(HOSTILE | st.text(max_size=20), HOSTILE)
def test_no_text_is_more_than_text(text, other):
    read = dataclasses.replace(READ, answer=text, note=other,
                               candidates=((text, 0.5), (other, -3.0), (text, 9.0)))
    call = dataclasses.replace(CALL, tool=other, arguments={text: other}, asked=((text, other),),
                               answer=other, result=ToolResult(text, True, text, other), state_change=1e9)
    end = dataclasses.replace(END, answer=text)
    trace = Trace(Run(other, text, text, expected=other, started=text), [read, call, end])
    plain = html_page([Scene(PIXELS, (MENDED,))])
    page = Page(html_page([Scene(PIXELS, (trace,), text)], title=other))
    assert page.open == [] and set(page.tags) <= set(Page(plain).tags)
    assert len(page.links) == 1
    picture = draw_scenes([Scene(PIXELS, (trace,), text)], title=other)
    assert picture.width == 1800 and 300 < picture.height < 4000


@pytest.mark.parametrize("trace", [MENDED, UNMENDED, CUT_OFF, EMPTY])
def test_every_trace_can_be_drawn(trace):
    bare = draw_scenes([Scene(PIXELS, ())])
    picture = draw_scenes([Scene(PIXELS, (trace,))])
    assert picture.mode == "RGB" and picture.size[0] == bare.size[0]
    assert not np.array_equal(np.asarray(picture)[:bare.height], np.asarray(bare))


def test_the_picture_shows_the_scene_and_grows_with_its_cards():
    one, two = (np.asarray(draw_scenes([Scene(PIXELS, (MENDED,) * n)])) for n in (2, 4))
    assert two.shape[0] > 1.5 * one.shape[0]
    # Each pixel of the scene is a square of equal pixels in the picture.
    colours = {tuple(pixel) for pixel in one[100:600, 48:548].reshape(-1, 3)}
    assert len({tuple(pixel) for pixel in PIXELS.reshape(-1, 3)} & colours) > 3000


def test_files_are_the_same_each_time(tmp_path):
    scenes = [Scene(PIXELS, (MENDED, UNMENDED), "twice")]
    for name in ("a", "b"):
        write_html(tmp_path / f"{name}.html", scenes)
        write_png(tmp_path / f"{name}.png", scenes)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.html").stat().st_size < 100_000


def test_pictures_of_any_size_are_shown():
    assert picture_to_show(PIXELS).size == (MAX_SIDE, MAX_SIDE)
    assert picture_to_show(np.zeros((3000, 1000, 3), np.uint8)).size == (171, 512)
    assert picture_to_show(np.zeros((1, 1, 3), np.uint8)).size == (MAX_SIDE, MAX_SIDE)
    with pytest.raises(FormatError):
        picture_to_show("no such picture.png")


@pytest.mark.parametrize("p_wrong, said", [
    (0.0, "sure"), (0.2, "sure"), (0.3, "doubt"), (0.5, "doubt"), (0.51, "guess"), (1.0, "guess"),
])
def test_how_sure_it_sounds(p_wrong, said):
    assert verdict(p_wrong) == said


def test_percent_never_claims_certainty():
    said = [percent(share) for share in (0.0, 0.004, 0.5, 0.996, 1.0)]
    assert said == ["1 %", "1 %", "50 %", "99 %", "99 %"]


def test_right_ignores_case_and_blanks():
    assert tell(Trace(dataclasses.replace(ASKED, expected=" 7 "), [READ, CALL, END])).right
    assert tell(Trace(Run("", "?"), [READ])).right is None
