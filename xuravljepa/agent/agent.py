"""The agent: look at a picture, answer, doubt, call a tool, take in what it says, answer again.

    agent = Agent.from_pretrained("tiny")
    reply = agent.ask("scene.png", "what shape is nearest the red one?")
    reply.text, reply.confidence, reply.tool_calls, reply.trace

The agent owns the loop; the model knows nothing of tools.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import time
import uuid
from pathlib import Path

import numpy as np

from xuracore import io, no_grad
from xuracore.errors import FormatError, ShapeError
from xuracore.tensor import Tensor
from xuracore.threads import one_blas_thread
from xuravljepa import angn
from xuravljepa.agent import session
from xuravljepa.agent.arguments import speaks_of_earlier
from xuravljepa.agent.builtin import KnowledgeBase
from xuravljepa.agent.confusion import FOREIGN, at_least, foreign_words, monitor_features, views
from xuravljepa.agent.errors import ReplayError
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.injector import Injection
from xuravljepa.agent.recursion import Reading, RecursionConfig, RecursionLayer
from xuravljepa.agent.scene_tools import register_scene_tools
from xuravljepa.agent.tools import ToolRegistry, ToolResult, Usefulness
from xuravljepa.agent.trace import Replay, Run
from xuravljepa.agent.words import Writer, asks_for_text
from xuravljepa.model import CAPTION_QUERY, PRESETS, SHIPPED, VLJEPA

STATE_VERSION = 3
SMALL = 4e6  # parameters up to which a second BLAS thread gains nothing, and on a busy machine is long waited for


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer and how it came about.

    answer : the bare answer.   text : what to show a person; it says so where the answer is a guess.
    confidence : 1 - p(wrong), calibrated.   unsure : the answer is a guess.   reason : why the agent stopped.
    tool_calls : [{"tool", "arguments", "result", "ok", "error"}], in order, failed ones included; error is a
    text or None.   trace : every step, see ``trace.show()``.
    """

    answer: str
    text: str
    confidence: float
    unsure: bool
    reason: str
    tool_calls: list
    trace: object

    def __str__(self):
        return self.text


class Agent:
    """See the module's text.

    model : VLJEPA with a closed set of answers.   heads : AgentHeads; without them the agent answers, but
    never doubts.   registry : ToolRegistry, empty by default.   recursion : RecursionConfig.
    auto_reset : mean activation of the gates (ANGN) under which the agent forgets the picture after its
    answer, or a stream begins a new segment; None: never.  memory : VisualMemory, see ``open_memory``.
    turns : how many questions in a row are read from one look.  A question without a picture is read from the
    states that the one before left behind, and the picture looked at again where that makes a doubtful answer,
    or after so many turns.  0: every question looks afresh.  ``looked`` says whether the last one did.

    In view are ``seen``, the visual tokens (views, n, d) of a picture, or None, and ``picture``, its digest; after
    ``turn`` more questions the predictor has ``states``.
    """

    def __init__(self, model, heads=None, registry=None, recursion=None, name="", auto_reset=None, turns=16):
        self.model, self.name = model.eval(), name
        self.trained = heads is not None
        if heads is None:
            heads = AgentHeads(AgentConfig.for_model(model.config), model.config.predictor)
        self.heads = heads.eval()
        self.tools = ToolRegistry() if registry is None else registry
        config = self.heads.config
        self.recursion = recursion or RecursionConfig(config.confident_below, config.abstain_above)
        self.auto_reset, self.memory, self.turns = auto_reset, None, turns
        self.reset()
        self._cards, self._prices, self._warm = {}, None, False
        self._blas_held = one_blas_thread if model.parameter_count() <= SMALL else contextlib.nullcontext

    @classmethod
    def from_pretrained(cls, source="tiny", recursion=None):
        """A folder with a model and, if it has them, the agent's heads and price list; or ``"tiny"``.

        Raises FormatError for damaged files, StateDictError where names or shapes do not fit.
        """
        shipped = str(source) in PRESETS and not Path(source).exists()
        folder = SHIPPED / str(source) if shipped else Path(source)
        model = VLJEPA.from_pretrained(source)
        if not (folder / "agent.json").exists():
            return cls(model, recursion=recursion, name=str(source))
        heads = load_heads(model, folder)
        agent = cls(model, heads, recursion=recursion, name=str(source))
        if (folder / "prices.json").exists():
            register_scene_tools(agent.tools, KnowledgeBase.from_json(folder / "prices.json"),
                                 usefulness=agent.usefulness)
            agent._prices = (folder / "prices.json").read_bytes()
        return agent

    def save_pretrained(self, directory):
        """Write the model, the heads if they were trained, and the price list it was loaded with.

        Tools that were registered later are code, and stay with the program that registers them.
        """
        self.model.save_pretrained(directory)
        if self.trained:
            save_heads(self.heads, directory)
        if self._prices is not None:
            (Path(directory) / "prices.json").write_bytes(self._prices)

    def register_tool(self, function, **settings):
        """Add a tool; see ``ToolRegistry.register`` for the settings."""
        settings.setdefault("usefulness", self.usefulness)
        return self.tools.register(function, **settings)

    @property
    def usefulness(self):
        """What taking in a tool's result was found to do on validation questions."""
        config = self.heads.config
        return Usefulness(config.fixes, config.breaks, config.cost, config.errs)

    # ------------------------------------------------------------------ asking
    @no_grad()
    def ask(self, image, question, expected=None, runner=None, clock=None):
        """Answer a question about a picture, with tools where the agent doubts itself.

        A request for a description or a list is answered in the Y-Decoder's words, without tools.
        image : path, array or PIL image, or a list of them, a video, where the X-Encoder reads these; None for
        what the last question was about.   expected : the right answer, if it is known, for the trace.
        runner, clock : of a Replay.
        Raises FormatError for an unreadable picture, ShapeError for an empty or overlong question.
        """
        with self._blas_held():
            return self._ask(image, question, expected, runner, {} if clock is None else {"clock": clock})

    def _ask(self, image, question, expected, runner, options):
        query = self.model.query_tokens([question])  # before the picture: a wrong question changes nothing
        visual = self._see(image)
        foreign, earlier = foreign_words(question, self.heads.config.words), speaks_of_earlier(question)
        monitor = _Monitor(self.heads, self.trained, foreign, earlier)
        injector, tools = _Injector(self.model, self.heads), self.tools
        written = asks_for_text(question) and not earlier
        carried = None if written else self._carried(image)
        reader = _Reader(self.model, self.heads, query, visual, carried,
                         lambda reading: monitor.p_wrong(reading, 0) >= self.recursion.confident_below)
        if not self._warm:
            # Kernels compile when they are first called; that is not time the question may be charged for.
            reading = reader.read(None)
            monitor.p_wrong(reading, 0)
            injector.inject(reading, ToolResult("", True, text="0"))
            self._warm = True
        if written:
            reader = monitor = Writer(self.model, self.heads.monitor if self.trained else None, query, visual, foreign)
            tools = ToolRegistry()
        layer = RecursionLayer(reader, monitor, _Selector(self), injector, tools, runner, self.recursion,
                               answers=frozenset(self.model.answer_bank()[0]), **options)
        run = Run(
            run_id=uuid.uuid4().hex[:12], question=question, model=self.name, config=self._config_digest(carried),
            image=self.picture, expected=expected,
            started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        outcome = layer.run(question, ask=lambda text: self.plain_answer(visual, text), run=run)
        # The states of the first reading: what a tool said counts for its question only.
        self.states, self.looked = reader.after, reader.looked
        self.turn = 0 if reader.looked else self.turn + 1
        calls = [{"tool": step.tool, "arguments": step.arguments, "result": step.result.text,
                  "ok": step.result.ok, "error": step.result.error and step.result.error.message}
                 for step in outcome.trace.calls()]
        if self._should_reset(outcome.reading):
            self.reset()
        text = outcome.answer
        if outcome.unsure:
            text = f"I am not sure. My best guess is: {outcome.answer}"
        return Reply(outcome.answer, text, outcome.confidence, outcome.unsure, outcome.reason, calls,
                     outcome.trace)

    def replay(self, image, trace):
        """Answer the question of a recorded run again, with what its tools said then; a Reply.

        image : the picture of that run.   trace : Trace.
        Raises ReplayError where picture or configuration are others, or the run takes another way.
        """
        with self._blas_held():  # as when the question was asked: the tokens are the same to the last bit
            self._see(image)
        if trace.run.image != self.picture:
            raise ReplayError("the trace is about another picture")
        if trace.run.config != self._config_digest(self._carried(None)):
            self.states = None
        if trace.run.config != self._config_digest(self._carried(None)):
            raise ReplayError("the trace belongs to an agent with another configuration, or goes on from states that "
                              "are not here: load what save_state wrote before that question")
        record = Replay(trace)
        return self.ask(None, trace.run.question, trace.run.expected, record, record.clock)

    def _see(self, image):
        """Visual tokens (views, n, d) of a picture, the first of it as it is, kept for later questions about it."""
        if image is None:
            if self.seen is None:
                raise ShapeError("there is no picture yet: give one with the first question")
            return self.seen
        pixels = self.model.pixels(image)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest != self.picture or self._pixels is None:  # tokens from a file are not taken for a picture's
            visual = self.view(pixels)
            if digest != self.picture or not np.array_equal(visual, self.seen):
                self.states = None
            self.seen, self.picture, self._pixels = visual, digest, pixels
        return self.seen

    def view(self, pixels):
        """pixels (1, 3, S, S) → visual tokens (views, n, d): of the picture and, for a monitor, of it moved."""
        return self.model.visual_tokens(views(pixels, self.heads.monitor.config.shift if self.trained else 0)[0])

    def glance(self, query, visual, told=()):
        """(Reading, confidence) without a loop; query : of ``model.query_tokens``, visual : of ``view``.

        told : ``ToolResult``s that are taken in one after the other.
        """
        reader = _Reader(self.model, self.heads, query, visual)
        reading = reader.read(None)
        for result in told:
            reading = reader.read(_Injector(self.model, self.heads).inject(reading, result)[0])
        return reading, 1 - _Monitor(self.heads, self.trained).p_wrong(reading, len(told))

    def reset(self):
        """Forget the picture: the next question needs one.  The memory on the disk stays."""
        self.seen, self.picture, self._pixels = None, "", None
        self.states, self.turn, self.looked = None, 0, False

    def _carried(self, image):
        """The states to go on from, or None to look: at a picture that is given, and after enough turns."""
        if image is not None or self.turn + 1 >= self.turns or self.model.config.predictor.bidirectional:
            return None
        return self.states

    def _should_reset(self, reading):
        gate = reading.hidden["gate"]
        return self.auto_reset is not None and bool(angn.context_reset(gate[None], self.auto_reset)[0])

    def plain_answer(self, visual, question):
        """The model's answer without doubt or tools: what fills a tool's argument."""
        reading = self.model.predictor(self.model.query_tokens([question]), visual[:1])
        return self.model.answer_bank()[0][int(self.model.similarities(reading.embedding).argmax())]

    def _config_digest(self, carried=None):
        text = repr(self.model.config) + repr(self.heads.config) + repr(self.recursion)
        digest = hashlib.sha256(text.encode())
        for part in session.parts(carried or ()).values():
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]

    def card_embeddings(self, tools):
        """(tools, E) embeddings of what the tools say they do, computed once each."""
        known = self.heads.config.cards
        texts = [known.get(tool.name, tool.description) for tool in tools]
        limit = self.model.config.text.max_length - 1
        for text in texts:
            if text not in self._cards:
                short = text.encode()[:limit].decode(errors="ignore")
                self._cards[text] = self.model.encode_answers([short]).data[0]
        return np.stack([self._cards[text] for text in texts])

    # ------------------------------------------------------------------ streams
    def stream(self, frames, question=CAPTION_QUERY, decoder=None, times=None, clip=1):
        """Watch frames and answer ``question`` only where something changed.

        frames : a folder, or an iterable of pictures.   decoder : SelectiveDecoder; its defaults suit the
        shipped model.   times : seconds since 1970 of the frames; by default those of a folder's files, or of
        the clock when a frame comes.   clip : frames that are read together, for an X-Encoder of videos.
        Yields (frame number, answer, confidence) at each decision to speak; the answer is that of all frames
        since the change.  With a memory, every new sight is remembered (of a clip its last frame), whether or
        not it changes the answer, and can be asked about with ``recall``.
        """
        from xuravljepa.agent.recall import Watching, in_clips, numbered, picture_of, sight
        from xuravljepa.agent.selective import SelectiveDecoder

        decoder = SelectiveDecoder() if decoder is None else decoder
        watching = Watching(self.memory)
        with no_grad():
            query = self.model.query_tokens([question])
        try:
            for number, frame, when, name in in_clips(numbered(frames, times, time.time), clip):
                with no_grad():  # not around the yield: the caller's own gradients are not ours to switch off
                    visual = self._see(frame)
                    reading, confidence = self.glance(query, visual)
                    moment = decoder.push(reading.hidden["embedding"])
                    key = sight(visual, self.model.config.vision)
                    watching.see(key, when, lambda: self.memory.add(
                        key, picture_of(self._pixels, self.model.config), name, question, reading.answer, confidence,
                        when))
                    if self._should_reset(reading):
                        decoder.reset()
                    if moment is not None:
                        nearest = int(self.model.similarities(moment.embedding[None]).argmax())
                        answer = self.model.answer_bank()[0][nearest]
                if moment is not None:
                    yield number, answer, confidence
        finally:
            watching.end()

    # ------------------------------------------------------------------ memory
    def open_memory(self, directory, config=None, read_only=False, tool=False):
        """Remember on the disk what streams show, for ``recall``; returns the VisualMemory.

        config : MemoryConfig.   read_only : while another process writes.   tool : register ``memory_search``
        for questions about earlier ("was there a red circle before?"), which the shipped heads know to call.
        Raises MemoryBusyError where another process writes, FormatError for another model's memory.
        """
        from xuravljepa.agent.recall import open_memory

        memory = open_memory(self, directory, config, read_only, tool)
        if self.memory is not None:
            self.memory.close()
        self.memory = memory
        return memory

    def look(self, image):
        """Bring a picture into view, for questions and ``save_state``; errors as in ``ask``."""
        self._see(image)

    def remember(self, source="", time=None):
        """Put the picture in view into the memory; its Memory.  time : seconds since 1970, now by default."""
        from xuravljepa.agent.recall import remember

        return remember(self, self.seen, self._pixels, source, time)

    def recall(self, question, k=5, since=None, until=None, like=None):
        """Ask remembered pictures: [Recollection], of the k seen last, newest first.

        since, until : seconds since 1970.   like : a picture; then of the k most like it, nearest first.
        Each answer is that of the picture, without tools.  ConfigError without a memory.
        """
        from xuravljepa.agent.recall import recall

        return recall(self, question, k, since, until, like)

    # ------------------------------------------------------------------ state
    def save_state(self, path):
        """Write what the agent has seen last and the predictor's states, so that questions go on after a restart."""
        session.save(self, path)

    def load_state(self, path):
        """Read what ``save_state`` wrote; FormatError if it is missing, damaged or from another X-Encoder.

        States of another predictor are left out: it looks at the picture's tokens afresh.
        """
        session.load(self, path)

    def restore(self, seen, picture, states, turn):
        """Put what ``session.load`` read into view."""
        self.seen, self.picture, self._pixels = seen, picture, None
        self.states, self.turn = states, turn

    def eyes(self):
        """SHA-256 of the X-Encoder's weights and of how pictures are prepared for it."""
        config = self.model.config
        return session.weights_digest(self.model.x_encoder, repr((config.vision, config.mean, config.std)))


def _check_fit(config, wanted, path):
    """FormatError if heads of this AgentConfig do not fit the model that ``wanted`` is for."""
    for part, name in (("monitor", "read_dim"), ("monitor", "vision_dim"), ("injector", "knowledge_dim"),
                       ("selector", "read_dim"), ("selector", "embed_dim")):
        found, fits = getattr(getattr(config, part), name), getattr(getattr(wanted, part), name)
        if found != fits:
            raise FormatError(f"{part}.{name} is {found}; the model beside it has {fits}", path)


def save_heads(heads, directory):
    """Write ``agent.json`` and ``agent.safetensors`` beside a model."""
    directory = Path(directory)
    io.save_safetensors(directory / "agent.safetensors", heads.state_dict())
    io.save_json(directory / "agent.json", heads.config.to_dict())


def load_heads(model, directory):
    """The AgentHeads that ``save_heads`` wrote; FormatError or StateDictError where they do not fit the model."""
    directory = Path(directory)
    config = AgentConfig.from_dict(io.load_json(directory / "agent.json"))
    _check_fit(config, AgentConfig.for_model(model.config), directory / "agent.json")
    heads = AgentHeads(config, model.config.predictor)
    heads.load_state_dict(io.load_safetensors(directory / "agent.safetensors"))
    return heads.eval()


# ---------------------------------------------------------------------- what plugs into the recursion loop
class _Reader:
    """Reads one question about one picture, all views of it at once; the state is an Injection."""

    def __init__(self, model, heads, query, visual, carried=None, doubtful=None):
        self.model, self.visual, self.carried, self.doubtful = model, visual, carried, doubtful
        self.after, self.looked = None, False
        self.query = np.repeat(query, len(visual), axis=0)
        self.residual_layer = heads.config.injector.residual_layer
        self.strangeness = heads.monitor.familiarity(visual[:1])

    def read(self, state):
        if state is not None:
            return self._read(state)
        if self.carried is not None:
            reading, self.looked = self._read(Injection(self.carried)), False
            if not self.doubtful(reading):
                return reading
        self.looked = True
        return self._read(Injection(self.model.predictor.look(self.query, self.visual)))

    def _read(self, state):
        predictor = self.model.predictor
        reading = state.read(predictor, self.query, self.residual_layer)
        if state.bias is None and state.offsets is None and not np.any(state.change):
            self.after = reading.states
        cosines = self.model.similarities(reading.embedding)
        gate = predictor.gate_activation()
        answers = self.model.answer_bank()[0]
        order = np.argsort(-cosines[0], kind="stable")
        hidden = {"pooled": reading.pooled.data[:1], "embedding": reading.embedding.data[0], "cosines": cosines[:1],
                  "moved": cosines[1:, None], "scale": self.model.scale,
                  "gate": np.full(1, 0.5) if gate is None else gate.mean(axis=0)[:1],
                  "strangeness": self.strangeness, "change": state.change}
        return Reading(answers[order[0]], tuple((answers[i], float(cosines[0, i])) for i in order[:8]),
                       state, hidden)


class _Monitor:
    def __init__(self, heads, trained, foreign=(), earlier=False):
        self.monitor, self.trained, self.note = heads.monitor, trained, ""
        self.reason = "it asks about earlier" if earlier else ""
        if foreign:
            self.reason = f"words it was not taught: {', '.join(foreign)}"
        self.foreign = foreign if trained else ()

    def p_wrong(self, reading, depth):
        """A question with words that no training had is not understood, and one about earlier is not answered by the
        picture, until a tool has answered it."""
        if not self.trained:
            return 0.0
        self.note = self.reason if depth == 0 else ""
        seen = reading.hidden
        features = monitor_features(seen["pooled"], seen["cosines"], seen["scale"], seen["gate"],
                                    seen["strangeness"], depth, seen["change"], seen["moved"])
        p = float(self.monitor.p_wrong(features)[0])
        return float(at_least(FOREIGN, p)) if self.note else p


class _Selector:
    def __init__(self, agent):
        self.agent = agent

    def rank(self, reading, question, tools):
        cards = self.agent.card_embeddings(tools)
        return self.agent.heads.selector.rank(reading.hidden["pooled"], cards, tools, question)


class _Injector:
    def __init__(self, model, heads):
        self.model, self.injector = model, heads.injector

    def inject(self, reading, result):
        text = result.text.strip().lower()
        count = len(reading.state.states[0][0])  # views
        knowledge = Tensor(np.repeat(self.model.encode_answers([text]).data, count, axis=0))
        after = self.injector.take_in(self.model.predictor, lambda: self.model.tool_tokens([text] * count), knowledge,
                                      reading.state.states)
        change = float(after.change[0])
        return after._replace(change=change), change
