"""Recipes and what trains them: data, minibatches, loop, checkpoint, picture; nothing that the layers need."""
