"""Recipes and what trains them: data, minibatches, loop, checkpoint, picture; nothing that the layers need."""

from .catalogue import RECIPES, Recipe
from .data import Dataset, load
from .train import Minibatch, Trainer

__all__ = ["RECIPES", "Dataset", "Minibatch", "Recipe", "Trainer", "load"]
