"""VL-JEPA: X-Encoder, predictor, Y-Encoder and Y-Decoder as one model.

The model answers by meaning: it predicts the embedding of the answer, and the nearest known answer (or
the decoder's text) is what it says.  It knows nothing of tools; the agent owns that loop.
"""

import math
from pathlib import Path

import numpy as np

from xuracore import io, nn, no_grad
from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuracore.tensor import Tensor
from xuravljepa import image as images
from xuravljepa.decoder import Decoder
from xuravljepa.predictor import Predictor
from xuravljepa.presets import PRESETS, VLJEPAConfig
from xuravljepa.text import TextEncoder
from xuravljepa.tokenizer import PAD, SEP, TOOL, WORD_BYTES, ByteTokenizer, pad_rows
from xuravljepa.vit import VisionTransformer

CAPTION_QUERY = "what is in the image?"
SHIPPED = Path(__file__).parent / "pretrained"
_LOG_SCALE = (0.0, math.log(100.0))  # bounds of the learned inverse temperature, as in CLIP


class VLJEPA(nn.Module):
    """See the module's text.  ``x_encoder`` is frozen in every phase but 0."""

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.x_encoder = VisionTransformer(config.vision, rng=rng)
        self.predictor = Predictor(config.predictor, rng=rng)
        self.y_encoder = TextEncoder(config.text, rng=rng)
        self.y_decoder = Decoder(config.decoder, rng=rng)
        self.log_scale = nn.Parameter(np.array(math.log(1 / 0.07), np.float32))
        self._tokenizer = ByteTokenizer()
        self._bank = None

    # ------------------------------------------------------------------ inputs
    def pixels(self, image):
        """A path, array or PIL image → (1, 3, S, S) float32, normalised for this model.

        A list of them is a video, (1, F, 3, S, S), for an X-Encoder of tubelets; the last frame is repeated
        until F is a whole number of these.  ConfigError where the X-Encoder reads pictures alone.
        """
        if not isinstance(image, (list, tuple)):
            return images.prepare(image, self.config.preprocessing)[None]
        tubelet = self.config.vision.tubelet_size
        if not tubelet:
            raise ConfigError(f"a list of {len(image)} frames is a video; this model's X-Encoder reads pictures")
        if not image:
            raise ShapeError("the video has no frames")
        frames = [images.prepare(frame, self.config.preprocessing) for frame in image]
        return np.stack(frames + frames[-1:] * (-len(frames) % tubelet))[None]

    def query_tokens(self, questions):
        """Texts → (B, W, P) bytes of their words, padded with PAD.

        Raises ShapeError for a question that is too long or empty, DTypeError for one that is no text.
        """
        rows = []
        for question in questions:
            if not isinstance(question, str):
                raise DTypeError(f"a question is a text, got {type(question).__name__}")
            words = self._tokenizer.words(question.lower(), self.config.predictor.max_query)
            if not len(words):
                raise ShapeError("the question is empty")
            rows.append(words)
        return _padded_words(rows)

    def tool_tokens(self, results):
        """Texts of tool results → (B, W, P): TOOL, the bytes of the words, SEP."""
        first, last = pad_rows([[TOOL]], WORD_BYTES), pad_rows([[SEP]], WORD_BYTES)
        limit = self.config.predictor.max_query
        return _padded_words([np.concatenate([first, self._tokenizer.words(text.lower(), limit), last])
                              for text in results])

    @no_grad()
    def visual_tokens(self, pixels):
        """pixels (B, 3, S, S), or videos (B, F, 3, S, S) → (B, n_tokens, d) array; the X-Encoder is frozen."""
        return self.x_encoder(pixels).data

    # ------------------------------------------------------------------ answers
    def encode_answers(self, texts):
        """Texts → (n, E) Tensor, on the tape while training."""
        return self.y_encoder.encode(list(texts))

    @no_grad()
    def answer_bank(self):
        """(answers, their embeddings (n, E)), computed once; ``forget_bank`` after the Y-Encoder changed."""
        if not self.config.answers:
            raise ConfigError("this model was taught no closed set of answers; use decode=True")
        if self._bank is None:
            self._bank = list(self.config.answers), self.encode_answers(self.config.answers).data
        return self._bank

    def forget_bank(self):
        """Let the next ``answer_bank`` encode the answers again."""
        self._bank = None

    def similarities(self, embedding):
        """(B, E) array or Tensor → (B, n) cosines to the answers of the bank."""
        embedding = embedding.data if isinstance(embedding, Tensor) else embedding
        return embedding @ self.answer_bank()[1].T

    @property
    def scale(self):
        """Inverse temperature of the answers' softmax."""
        return float(np.exp(np.clip(self.log_scale.data, *_LOG_SCALE)))

    def clamp_scale(self):
        """Keep the learned temperature within its bounds; called after each optimizer step."""
        np.clip(self.log_scale.data, *_LOG_SCALE, out=self.log_scale.data)

    # ------------------------------------------------------------------ what users call
    @no_grad()
    def embed(self, image, question=CAPTION_QUERY):
        """The predicted embedding (E,) of the answer to ``question`` about ``image``."""
        return self._embed(None if image is None else self.visual_tokens(self.pixels(image)), question)

    def _embed(self, visual, question):
        return self.predictor(self.query_tokens([question]), visual).embedding.data[0]

    @no_grad()
    def answer(self, image, question, decode=False, constrained=True):
        """The answer as text: the nearest of the known answers.

        decode : let the Y-Decoder write it; ``constrained`` then limits it to the known answers.
        """
        visual = None if image is None else self.visual_tokens(self.pixels(image))
        embedding = self._embed(visual, question)
        if decode:
            allowed = list(self.config.answers) if constrained and self.config.answers else None
            sight = None if visual is None else self.predictor.sight(visual)
            return self.y_decoder.generate(embedding, allowed=allowed, sight=sight)[0]
        return self.answer_bank()[0][int(self.similarities(embedding[None]).argmax())]

    @no_grad()
    def classify(self, image, labels, question=CAPTION_QUERY):
        """(the best of ``labels``, cosines (n,)) for an open set of label texts.

        Raises ShapeError without labels, DTypeError for one text instead of a list of them.
        """
        if isinstance(labels, str):
            raise DTypeError(f"labels are a list of texts, got the text {labels!r}")
        labels = list(labels)
        if not labels:
            raise ShapeError("no labels were given to choose from")
        cosines = self.encode_answers(labels).data @ self.embed(image, question)
        return labels[int(cosines.argmax())], cosines

    @no_grad()
    def retrieve(self, text, bank, k=5):
        """The ``k`` entries of ``bank`` that fit ``text`` best: [(index, cosine)], best first.

        bank : (n, E) embeddings, as ``embed`` gives them, or a list of images.  ShapeError if it is empty.
        """
        if not len(bank):
            raise ShapeError("the bank is empty")
        if not isinstance(bank, np.ndarray) or bank.ndim != 2:
            bank = np.stack([self.embed(image) for image in bank])
        if bank.shape[1] != self.config.text.embed_dim:
            raise ShapeError(f"the bank is {bank.shape}; expected (n, {self.config.text.embed_dim})")
        cosines = bank @ self.encode_answers([text]).data[0]
        order = np.argsort(-cosines, kind="stable")[:k]
        return [(int(i), float(cosines[i])) for i in order]

    # ------------------------------------------------------------------ files
    def save_pretrained(self, directory, metadata=None):
        """Write ``config.json`` and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        io.save_safetensors(directory / "model.safetensors", self.state_dict(), metadata)
        io.save_json(directory / "config.json", {"model_type": "xura-vljepa", **self.config.to_dict()})

    @classmethod
    def from_pretrained(cls, source):
        """A folder written by ``save_pretrained``, or the name of a preset.

        ``"tiny"`` comes trained, with the package; ``"small"`` and ``"base"`` start from random weights.
        Raises FormatError for no such folder or damaged files, FileNotFoundError where one is missing,
        ConfigError for settings that no model has, StateDictError where names or shapes do not fit.
        """
        if str(source) in PRESETS and not Path(source).exists():
            if not (SHIPPED / str(source) / "model.safetensors").exists():
                return cls(VLJEPAConfig.preset(str(source))).eval()
            source = SHIPPED / str(source)
        source = Path(source)
        if not source.is_dir():
            raise FormatError(f"no such folder, and no preset (presets: {', '.join(PRESETS)})", source)
        settings = io.load_json(source / "config.json")
        kind = settings.pop("model_type", None) if isinstance(settings, dict) else None
        if kind != "xura-vljepa":
            raise FormatError(f"model_type is {kind!r}; expected 'xura-vljepa'", source / "config.json")
        config = VLJEPAConfig.from_dict(settings)
        state = io.load_safetensors(source / "model.safetensors")
        _check_sizes(config, sum(array.size for array in state.values()), source / "config.json")
        model = cls(config, rng=_Zeros())  # drawing numbers for a large model takes longer than reading its own
        model.load_state_dict(state)
        return model.eval()

    def looking(self, rng=None):
        """The same model with a Y-Decoder that looks at the picture, and does not yet know what to look for.

        What it writes stays as it was until it is trained.  A model whose decoder can look is returned as it is.
        """
        if self.config.decoder.look_dim:
            return self
        model = VLJEPA(self.config.looking(), rng=rng)
        model.load_state_dict({**model.state_dict(), **self.state_dict()})
        return model


def _check_sizes(config, stored, path):
    """FormatError if ``config`` asks for much more than the ``stored`` numbers of its file could fill.

    Hostile sizes would otherwise take all memory before names and shapes are compared.  Each product is that
    of a matrix, or of one matrix a layer, which a model of these sizes has.
    """
    least = config.vision.parameter_count
    for part in (config.predictor, config.text, config.decoder):
        sizes = {name: n for name, n in part.to_dict().items() if type(n) is int and name[:4] != "max_"}
        layers, width = sizes.pop("n_layers"), sizes.pop("d_model")
        least = max(least, layers * width * max(part.expand * width, part.d_state),
                    width * max(sizes.values()))
    prefix = config.decoder.prefix_length * config.decoder.d_model * config.decoder.embed_dim
    if max(least, prefix) > stored:
        raise FormatError(f"its sizes are those of a model of {max(least, prefix):,} parameters or more, "
                          f"but model.safetensors holds {stored:,}", path)


def parameter_counts(config):
    """{part: number of parameters} of a VLJEPAConfig of any size, without the memory of such a model.

    A model with one layer per stack is built from zeros; the layers that it lacks are copies of that one.
    """
    depths = {"x_encoder": config.vision.depth, "predictor": config.predictor.n_layers,
              "y_encoder": config.text.n_layers, "y_decoder": config.decoder.n_layers}
    flat = config.replace(
        vision=config.vision.replace(depth=1), predictor=config.predictor.replace(n_layers=1),
        text=config.text.replace(n_layers=1), decoder=config.decoder.replace(n_layers=1))
    counts = {}
    for name, parameter in VLJEPA(flat, rng=_Zeros()).named_parameters():
        part, _, rest = name.partition(".")
        copies = depths[part] if rest.startswith(("layers.", "blocks.", "looks.")) else 1
        counts[part] = counts.get(part, 0) + copies * parameter.size
    return counts


class _Zeros:
    """Stands for a random generator where only shapes count."""

    def uniform(self, low, high, shape):
        return np.zeros(shape)

    def standard_normal(self, shape):
        return np.zeros(shape)

    def random(self, shape):
        return np.zeros(shape)


def _padded_words(rows):
    """Arrays (words, P) → (B, W, P), padded with PAD."""
    ids = np.full((len(rows), max(map(len, rows)), WORD_BYTES), PAD, np.int64)
    for row, page in zip(rows, ids):
        page[: len(row)] = row
    return ids
