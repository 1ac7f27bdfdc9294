"""Modules: layers, a stack of them, and its step as one CUDA graph."""

from .graphs import GraphedStep
from .layer import FFLinear
from .network import FFNetwork

__all__ = ["FFLinear", "FFNetwork", "GraphedStep"]
