#!/usr/bin/env bash
# The modern recipe against GPT-2 on one GPU, in about eight minutes: steps in turn, memory against the plan, and
# each part's cost. No text is read, nothing is downloaded.
#
#     bash benchmarks/gpu/modern.sh RESULTS_FOLDER
set -euo pipefail
results=${1:?the folder for the results}
mkdir -p "$results"
python=${PYTHON:-python3}
steps() { # name, then the words of recipe_steps.py
    local name=$1
    shift
    timeout 240 "$python" benchmarks/recipe_steps.py --json "$@" >"$results/$name.json" 2>"$results/$name.log" ||
        echo "$name failed: $(tail -n 1 "$results/$name.log")"
}

nvidia-smi >"$results/nvidia-smi.txt"
steps recipes gpt2-124m modern-124m modern-export --repeats 5
for part in "--optimizer muon" "--positions rotary" "--normalization rms --no-norm-gains" "--no-biases" "--qk-norm" \
    "--activation relu2" "--no-tied-head" "--logit-softcap 15" "--embedding-shortcut" "--value-embeddings alternate"; do
    name=$(tr -c '[:alnum:]\n' '-' <<<"${part#--}")
    # shellcheck disable=SC2086 # the words of an option
    steps "part-$name" gpt2-124m --repeats 3 -- --tokens-per-step 65536 $part
done
steps part-none gpt2-124m --repeats 3 -- --tokens-per-step 65536
for recipe in gpt2-124m modern-124m; do
    timeout 120 "$python" -m overnight plan $recipe --json >"$results/plan-$recipe.json" 2>"$results/plan-$recipe.log" ||
        echo "plan $recipe failed"
done
