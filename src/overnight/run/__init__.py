"""Training a recipe into a run directory, and resuming it."""

from overnight.recipe import Recipe as Recipe
