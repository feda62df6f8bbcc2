"""The outside world's model formats, in both directions."""
