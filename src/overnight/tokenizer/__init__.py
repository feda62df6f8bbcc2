"""Text to ids and back: GPT-2's BPE, characters, BPE learned from your text, tokenizer.json files."""
