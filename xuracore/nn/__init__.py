"""Modules and layers."""

from xuracore.nn import init
from xuracore.nn.blocks import MLP, GatedMLP, MultiheadAttention
from xuracore.nn.containers import GELU, Flatten, Identity, ModuleDict, ReLU, Sequential, Sigmoid, SiLU, Tanh
from xuracore.nn.image import (
    AdaptiveAvgPool2d, AvgPool2d, BatchNorm1d, BatchNorm2d, Conv1d, Conv2d, ConvTranspose2d, GroupNorm, MaxPool2d,
)
from xuracore.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from xuracore.nn.module import Module, ModuleList, Parameter
from xuracore.nn.recurrent import GRU, LSTM

__all__ = [
    "Module", "ModuleList", "ModuleDict", "Sequential", "Parameter", "init",
    "Linear", "Embedding", "LayerNorm", "RMSNorm", "Dropout", "Identity", "Flatten",
    "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid",
    "Conv1d", "Conv2d", "ConvTranspose2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
    "GroupNorm", "BatchNorm1d", "BatchNorm2d",
    "MultiheadAttention", "MLP", "GatedMLP", "GRU", "LSTM",
]
