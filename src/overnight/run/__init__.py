"""Training a recipe into a run directory, and resuming it."""
