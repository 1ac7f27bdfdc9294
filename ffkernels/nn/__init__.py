"""Modules: layers, a stack of them, and its step as one CUDA graph."""

from .conv import FFConv2d
from .graphs import GraphedStep
from .layer import FFLinear
from .network import FFNetwork
from .scff import SCFFConv2d
from .stack import Shortcut

__all__ = ["FFConv2d", "FFLinear", "FFNetwork", "GraphedStep", "SCFFConv2d", "Shortcut"]
