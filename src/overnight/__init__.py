"""Reproduce GPT-2 while you sleep; keep the proof when you wake."""

__version__ = "0.1.0"
