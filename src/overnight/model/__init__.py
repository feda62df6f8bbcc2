"""GPT-2: configuration, module, loss and attention kernels."""
