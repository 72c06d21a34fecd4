"""Sizes that are known to fit together: ``tiny``, ``small`` and ``base``."""

from dataclasses import dataclass, field

from xuracore.config import Config, require
from xuracore.errors import ConfigError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.image import Preprocessing
from xuravljepa.predictor import PredictorConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VitConfig


@dataclass(frozen=True)
class VLJEPAConfig(Config):
    """All parts of a VL-JEPA, and the closed set of answers it was taught.

    answers : texts that ``answer`` chooses from; an empty tuple means free decoding.
    mean, std : normalisation of the pixels.   resize, short, filter : as in image.Preprocessing.
    """

    vision: VitConfig = field(default_factory=VitConfig.large)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    answers: tuple[str, ...] = ()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: str = "squash"
    short: int | None = None
    filter: str = "bicubic"

    def __post_init__(self):
        require(min(self.std) > 0, f"std is {self.std}; expected positive numbers")
        self.preprocessing  # refuses what is no recipe
        width = self.predictor.embed_dim
        require(self.text.embed_dim == width and self.decoder.embed_dim == width,
                f"embed_dim differs: predictor {width}, text {self.text.embed_dim}, "
                f"decoder {self.decoder.embed_dim}")
        require(self.predictor.vision_dim == self.vision.d_model,
                f"predictor.vision_dim {self.predictor.vision_dim} is not "
                f"vision.d_model {self.vision.d_model}")
        looks = self.decoder.look_dim, self.decoder.look_places
        seen = self.predictor.d_model, self.predictor.n_visual
        require(looks in ((0, 0), seen), f"decoder.look_dim and look_places are {looks}; expected (0, 0), or the "
                f"predictor's {seen}")
        vision = self.vision
        require(self.predictor.n_visual == vision.n_tokens,
                f"predictor.n_visual {self.predictor.n_visual} is not {vision.n_prefix} + {vision.n_patches} patches")

    @property
    def preprocessing(self):
        """How pictures are brought to the X-Encoder, an image.Preprocessing."""
        return Preprocessing(self.vision.image_size, self.mean, self.std, self.resize, filter=self.filter,
                             short=self.short)

    def with_encoder(self, encoder):
        """The same for another X-Encoder, a VisionTransformer: its sizes and its preprocessing.

        Raises ConfigError if the encoder is not at the size of its own preprocessing (``encoder.at_size``).
        """
        vision, recipe = encoder.config, encoder.preprocessing
        require(recipe.size == vision.image_size, f"the encoder takes {vision.image_size} pixels, its preprocessing "
                f"gives {recipe.size}: use encoder.at_size({recipe.size})")
        predictor = self.predictor.replace(vision_dim=vision.d_model, n_visual=vision.n_tokens)
        short = None if recipe.resized == recipe.size else recipe.resized
        decoder = self.decoder.replace(look_places=vision.n_tokens if self.decoder.look_dim else 0)
        return self.replace(vision=vision, predictor=predictor, decoder=decoder, mean=recipe.mean, std=recipe.std,
                            resize=recipe.resize, short=short, filter=recipe.filter)

    def looking(self):
        """The same with a Y-Decoder that looks at the picture."""
        sizes = {"look_dim": self.predictor.d_model, "look_places": self.predictor.n_visual}
        return self.replace(decoder=self.decoder.replace(**sizes))

    @classmethod
    def tiny(cls):
        """About 1.1 M parameters: learns generated scenes on two cores within the hour."""
        return cls(
            vision=VitConfig.tiny(),
            predictor=PredictorConfig(d_model=96, n_layers=4, d_state=32, headdim=32, vision_dim=96,
                                      query_dim=64, embed_dim=64, n_visual=65, n_salient=16, n_read=2,
                                      max_query=64),
            text=TextEncoderConfig(d_model=64, n_layers=1, d_state=16, headdim=32, max_length=160,
                                   embed_dim=64),
            decoder=DecoderConfig(d_model=64, n_layers=2, d_state=16, headdim=32, prefix_length=4,
                                  max_length=160, embed_dim=64),
        )

    @classmethod
    def small(cls):
        """ViT-S/16 at 224 pixels, a predictor of 6 layers × 384: for training on a workstation."""
        return cls(
            vision=VitConfig.small(),
            predictor=PredictorConfig(d_model=384, n_layers=6, d_state=64, vision_dim=384, query_dim=384,
                                      embed_dim=512, max_query=256),
            text=TextEncoderConfig(d_model=256, n_layers=4, d_state=64, max_length=256, embed_dim=512),
            decoder=DecoderConfig(d_model=256, n_layers=4, d_state=64, embed_dim=512),
        )

    @classmethod
    def base(cls):
        """ViT-L/16, 12 Mamba-3 layers × 1024 with 128 states, shared space of 1536."""
        return cls()

    @classmethod
    def preset(cls, name):
        """``tiny``, ``small`` or ``base``; ConfigError for any other name."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return getattr(cls, name)()


PRESETS = ("tiny", "small", "base")
