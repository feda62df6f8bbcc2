"""Text to token ids and back: GPT-2's BPE, characters, trained BPE, tokenizer.json."""
