"""Sequence models with a state: every layer is ``y, state = mixer(x, state=None)``."""

from xuramamba import discretize, rotary, state
from xuramamba.bidirectional import Bidirectional, BidirectionalState
from xuramamba.block import Block, GatedMLP, Stack, StackConfig
from xuramamba.byte_tokenizer import ByteTokenizer
from xuramamba.language_model import LanguageModel, LanguageModelConfig
from xuramamba.mamba1 import Mamba1, Mamba1Config, Mamba1State
from xuramamba.mamba2 import Mamba2, Mamba2Config, Mamba2State
from xuramamba.mamba3 import Mamba3, Mamba3Config, Mamba3State
from xuramamba.s4 import S4, S4Config, S4State
from xuramamba.s4d import S4D, S4DConfig, S4DState
from xuramamba.tokenizer import ByteLevelBPE, load_tokenizer

__all__ = [
    "Bidirectional", "BidirectionalState", "Block", "ByteLevelBPE", "ByteTokenizer", "GatedMLP",
    "LanguageModel", "LanguageModelConfig",
    "Mamba1", "Mamba1Config", "Mamba1State",
    "Mamba2", "Mamba2Config", "Mamba2State", "Mamba3", "Mamba3Config", "Mamba3State",
    "S4", "S4Config", "S4D", "S4DConfig", "S4DState", "S4State", "Stack", "StackConfig",
    "discretize", "load_tokenizer", "rotary", "state",
]  # fmt: skip
