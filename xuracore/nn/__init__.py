"""Modules and layers."""

from xuracore.nn import init
from xuracore.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from xuracore.nn.module import Module, ModuleList, Parameter

__all__ = [
    "Module", "ModuleList", "Parameter", "Linear", "Embedding", "LayerNorm", "RMSNorm", "Dropout", "init",
]
