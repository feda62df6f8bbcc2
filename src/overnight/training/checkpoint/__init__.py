"""Saves a TrainState to a directory and loads it: atomic, verified, without pickle.

checkpoints/step-00001000/
  model.safetensors       GPT-2's parameter names, the vocabulary unpadded
  optimizer.safetensors   <parameter>.exp_avg, .exp_avg_sq; Muon: .momentum, .row_square
  state.json              step, updates, float16's loss scale, guard, model, format, the run's frozen settings
  MANIFEST.json           size and sha256 of all others

Each of several processes writes its part, model-00000-of-00004.safetensors and so on. Read together, the
files hold the same tensors for any number of writers and readers. A checkpoint appears under its name in one
rename, after all its bytes are on the disk, and is used only if its checksums match.
"""
