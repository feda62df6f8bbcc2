"""True GPT-2: its configuration, its attention, the module itself, and how its weights begin."""
