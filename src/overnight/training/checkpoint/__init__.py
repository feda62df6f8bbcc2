"""TrainState <-> a directory: verified, atomic, and never code.

checkpoints/step-00001000/
  model.safetensors       GPT-2's parameter names, the vocabulary unpadded
  optimizer.safetensors   AdamW's two moments: <parameter>.exp_avg, <parameter>.exp_avg_sq
  state.json              step, updates, float16's loss scale, how the last steps went, model, format; of a
                          run also its settings, those that may not change
  MANIFEST.json           size and sha256 of all others

Several processes write one file of each kind each, model-00000-of-00004.safetensors and so on, with what it
is to write of the tensors; read together they are the same, whoever wrote them and whoever reads.

A checkpoint appears under its name in one rename, after all its bytes are on the disk. It is used only
if every byte is still the one that was written.
"""
