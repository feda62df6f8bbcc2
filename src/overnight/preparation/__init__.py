"""From text to shards of tokens."""

from overnight.preparation.prepare_config import PrepareConfig as PrepareConfig
