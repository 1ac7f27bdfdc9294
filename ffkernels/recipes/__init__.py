"""Recipes and what trains them: data, minibatches, loop, checkpoint, picture; nothing that the layers need."""

from .batches import Minibatch
from .catalogue import RECIPES, Recipe
from .data import Dataset, load
from .train import Trainer

__all__ = ["RECIPES", "Dataset", "Minibatch", "Recipe", "Trainer", "load"]
