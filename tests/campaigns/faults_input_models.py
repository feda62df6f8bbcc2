"""Tokenizer files, Hugging Face folders, runs and task files, changed at random; and what others read."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

from faults_input_texts import read_shards
from faults_input_trials import Outcome, Trial, damage
from faults_trials import DONE

TEXT = "Line 7 tells of 49. dignums, naïve 中文 🙂 don't 1,024  two\n\nCafe\u0301 \t x"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CLOSE = 2e-4  # of a logit


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def change_tokenizer(content: dict[str, Any], draw: random.Random) -> None:
    """One or two parts of a tokenizer.json are others."""
    split = {"type": "Split", "pattern": {"Regex": "\\d|\\s+|\\S+"}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    choices: dict[str, tuple[Any, ...]] = {
        "normalizer": (None, *({"type": each} for each in ("NFC", "NFKC", "Lowercase", "Nmt"))),
        "pre_tokenizer": (
            None, {**plain, "add_prefix_space": True}, {**plain, "use_regex": False}, {"type": "Whitespace"},
            {"type": "Sequence", "pretokenizers": [split, {**plain, "use_regex": False}]},
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, plain]},
        ),
        "decoder": (None, plain, {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        "post_processor": (None, {**plain}, {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]}),
        "truncation": ({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},),
        "padding": (None, {"strategy": {"Fixed": 60}, "direction": "Right", "pad_to_multiple_of": None,
                           "pad_id": 1, "pad_type_id": 0, "pad_token": "!"}),
    }  # fmt: skip
    model = content["model"]
    for _ in range(draw.choice((1, 1, 2))):
        part = draw.choice(("added", "added", "model", "merge", "merges", "vocab", *choices))
        if part in choices:
            content[part] = draw.choice(choices[part])
        elif part == "added":
            flags = {name: draw.random() < 0.3 for name in FLAGS}
            flags["special"] = draw.random() < 0.2
            name = draw.choice(("dignums", " 49", "tells", "é", "中", "\n\n", "x", "</s>", "", "dig"))
            if flags["special"]:  # which no text becomes: a promise that tokenizers does not make
                name = "<|s|>"
            content["added_tokens"].append({"id": max(model["vocab"].values()) + 1, "content": name, **flags})
        elif part == "model":
            name, values = draw.choice((
                ("dropout", (0.1, 0.0)), ("unk_token", ("!",)), ("continuing_subword_prefix", ("##", "")),
                ("byte_fallback", (True,)), ("ignore_merges", (True,)), ("fuse_unk", (True,)),
                ("end_of_word_suffix", ("</w>", "")), ("type", ("WordPiece", "Unigram")),
            ))  # fmt: skip
            model[name] = draw.choice(values)
        elif part == "merge" and model["merges"]:
            del model["merges"][draw.randrange(len(model["merges"]))]
        elif part == "merges":
            draw.shuffle(model["merges"])
        else:
            one, other = draw.sample(sorted(model["vocab"]), 2)
            model["vocab"][one], model["vocab"][other] = model["vocab"][other], model["vocab"][one]


def draw_tokenizer(draw: random.Random) -> Trial:
    """A tokenizer.json of others: the ids in the shards are those of `tokenizers`, or it is refused."""
    state, is_damaged = draw.random(), draw.random() < 0.15

    def arrange(folder: Path) -> None:
        again = random.Random(state)
        content = read(folder / "shards" / "tokenizer" / "tokenizer.json")
        change_tokenizer(content, again)
        data = json.dumps(content, ensure_ascii=again.random() < 0.5).encode()
        (folder / "mine").mkdir()
        (folder / "mine" / "tokenizer.json").write_bytes(damage(data, again) if is_damaged else data)
        (folder / "text" / "odd.txt").write_text(TEXT, encoding="utf-8")

    def judge(folder: Path, outcome: Outcome) -> str | None:
        if outcome.status != DONE:
            return None
        if is_damaged and not _is_read(folder / "mine"):
            return None  # a part that we do not use
        reference = Tokenizer.from_file(str(folder / "mine" / "tokenizer.json"))
        reference.no_truncation()
        reference.no_padding()
        texts = [path.read_bytes().decode() for path in (folder / "text").iterdir()]
        expected = {tuple(reference.encode(text, add_special_tokens=False).ids) for text in texts}
        found = set(map(tuple, read_shards(folder / "new")))
        wrong = sorted(expected - found)
        return f"difference: other ids than tokenizers gives, {wrong[0][:20]}" if wrong else None

    words = "prepare text --tokenizer mine --out new --workers 1 --validation-fraction 0.3"
    return Trial(tuple(words.split()), arrange, judge)


def _is_read(folder: Path) -> bool:
    with contextlib.suppress(Exception):  # the class that `tokenizers` raises
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        return True
    return False


def change_folder(folder: Path, draw: random.Random) -> None:
    """One or two facts of a Hugging Face folder are others."""
    for _ in range(draw.choice((1, 1, 2))):
        kind = draw.choice(("config", "config", "config", "weights", "weights", "bytes", "missing", "end"))
        if kind == "config":
            name, values = draw.choice(CONFIGS)
            content = read(folder / "config.json")
            content[name] = draw.choice(values)
            (folder / "config.json").write_text(json.dumps(content))
        elif kind == "weights":
            change_weights(folder / "model.safetensors", draw)
        elif kind == "end":
            name = draw.choice(("config.json", "generation_config.json"))
            content = read(folder / name) if (folder / name).is_file() else {}
            odd = ("3", [[3]], 3.5, True) if name == "generation_config.json" else ()
            content["eos_token_id"] = draw.choice((None, 3, [3, 5], 299, 10**6, -1, *odd))
            (folder / name).write_text(json.dumps(content))
        else:
            path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
            path.unlink() if kind == "missing" else path.write_bytes(damage(path.read_bytes(), draw))


CONFIGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("n_layer", (0, 2, -1, "1", 1.5, 10**9)), ("n_head", (1, 4, 3, 0, -2)), ("n_positions", (16, 64, 0)),
    ("layer_norm_epsilon", (1e-3, 0, 1e-12, "x", None)),
    ("activation_function", ("gelu", "gelu_new", "relu", "gelu_pytorch_tanh", 3)), ("n_ctx", (8,)),
    ("scale_attn_weights", (False, True)), ("scale_attn_by_inverse_layer_idx", (True, False)),
    ("reorder_and_upcast_attn", (True,)), ("tie_word_embeddings", (False, True)),
    ("vocab_size", (299, 301, 64, 0, "300")), ("layer_norm_eps", (1e-2,)),
    ("n_inner", (None, 64, 32, 0)), ("model_type", ("gpt_neo", "", None)),
    ("attn_pdrop", (0.5,)), ("dtype", ("float16", "bfloat16")),
    ("add_cross_attention", (True,)), ("n_embd", (32, 8, "16")), ("architectures", ([], ["GPT2Model"], None)),
    ("quantization_config", ({"quant_method": "bitsandbytes"},)),
)  # fmt: skip


def change_weights(path: Path, draw: random.Random) -> None:
    """The tensors of a file are of another type, name or shape, or one number is another."""
    with contextlib.suppress(Exception):  # it may be damaged already
        weights = load_file(path)
        name = draw.choice(sorted(weights))
        kind = draw.randrange(8)
        if kind == 0:
            cast = draw.choice((torch.float16, torch.bfloat16, torch.float64, torch.int8))
            weights = {each: weight.to(cast) for each, weight in weights.items()}
        elif kind == 1:
            weights[name].view(-1)[0] = draw.choice((float("nan"), float("inf"), 1e30, 3.0))
        elif kind == 2:
            del weights[name]
        elif kind == 3:
            weights["transformer.extra.weight"] = torch.ones(3)
        elif kind == 4:
            weights[name] = weights[name].t().contiguous()
        elif kind == 5:
            prefix = draw.choice(("", "transformer."))
            weights = {prefix + each.removeprefix("transformer."): weight for each, weight in weights.items()}
        elif kind == 6:
            weights["lm_head.weight"] = weights["transformer.wte.weight"] * draw.choice((1.0, 2.0))
        else:
            weights[name] = weights[name][..., :-1].contiguous()
        save_file(weights, path, metadata={"format": "pt"})


def find_logits(folder: Path) -> torch.Tensor:
    """Of a few ids, by Transformers."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[5, 7, 11, 250, 40, 41, 42]])).logits
    return logits


def draw_folder(draw: random.Random) -> Trial:
    """A Hugging Face folder of others: what is converted has its logits, and the same greedy text."""
    state, is_converted = draw.random(), draw.random() < 0.6
    words = "convert mine --to hf --out new-hf"
    if not is_converted:
        words = "generate mine Line --json --temperature 0 --precision fp32 --device cpu --max-new-tokens 6"

    def arrange(folder: Path) -> None:
        (folder / "hf").rename(folder / "mine")
        with contextlib.suppress(ValueError, FileNotFoundError):  # the first change has damaged or removed it
            change_folder(folder / "mine", random.Random(state))

    def judge(folder: Path, outcome: Outcome) -> str | None:
        if outcome.status != DONE:
            return None
        try:
            expected = find_logits(folder / "mine")
        except Exception as error:  # noqa: BLE001 - of any library
            return f"difference: read, though Transformers refuses it: {type(error).__name__} {error!s:.200}"
        if is_converted:
            ours, rows = find_logits(folder / "new-hf"), expected.shape[-1]
            same = torch.allclose(ours[..., :rows], expected, atol=CLOSE, rtol=1e-3, equal_nan=True)
            return None if same else f"difference: logits by {(ours[..., :rows] - expected).abs().max():.4f}"
        return compare_text(folder / "mine", json.loads(outcome.out.splitlines()[0]))

    return Trial(tuple(words.split()), arrange, judge, may_fail=True)


def compare_text(folder: Path, found: dict[str, Any]) -> str | None:
    """How a greedy completion differs from that of Transformers."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Line", return_tensors="pt").input_ids
    with torch.no_grad():
        new = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    text = tokenizer.decode([each for each in new if each not in ends])
    return None if text == found["completion"] else f"difference: {found['completion']!r}, not {text!r}"


# ---------------------------------------------------------------- runs and tasks

OF_RUNS = (
    "report runs/small", "runs --json", "evaluate runs/small --json",
    "generate runs/small Line --json --max-new-tokens 2",
    "train --resume runs/small --total-steps 6", "convert runs/small --to hf --out new-hf", "inspect shards",
    "train small.toml --run-name new",
)  # fmt: skip


def draw_run(draw: random.Random) -> Trial:
    """A file of a run or of its shards is damaged, or is a folder, a link to nothing, or a pipe's name."""
    state, words = draw.random(), draw.choice(OF_RUNS)

    def arrange(folder: Path) -> None:
        again = random.Random(state)
        top = folder / ("shards" if "shards" in words or "small.toml" in words else "runs")
        path = again.choice(sorted(path for path in top.rglob("*") if path.is_file()))
        data, kind = path.read_bytes(), again.random()
        if kind < 0.8:
            path.write_bytes(damage(data, again))
            return
        path.unlink()
        path.mkdir() if kind < 0.9 else path.symlink_to("nowhere")

    return Trial(tuple(words.split()), arrange, may_fail=True)


TASKS = {
    "hellaswag": ("hellaswag_val.jsonl", {"ctx": "Line 3", "endings": [" a", " b", " c", " d"], "label": 1}),
    "lambada": ("lambada_test.jsonl", {"text": "Line 3 tells of 21."}),
    "boolq": ("boolq_val.jsonl", {"passage": "Line", "question": "is it", "label": True}),
}


def draw_task(draw: random.Random) -> Trial:
    """A task's file: as many examples as json reads lines, or it is refused."""
    task = draw.choice(sorted(TASKS))
    name, record = TASKS[task]
    lines = [json.dumps(record) for _ in range(5)]
    if draw.random() < 0.5:
        odd = {
            **record,
            draw.choice(sorted(record)): draw.choice((None, 7, "", [], "x", -1, {}, [""], 1e400)),
        }
        lines[draw.randrange(5)] = draw.choice((json.dumps(odd), "", "null", "[]", "7", "{", "[" * 9000))
    data = ("\n".join(lines) + "\n").encode()
    if draw.random() < 0.4:
        data = damage(data, draw)

    def arrange(folder: Path) -> None:
        (folder / "files").mkdir()
        (folder / "files" / name).write_bytes(data)

    def judge(_folder: Path, outcome: Outcome) -> str | None:
        if outcome.status != DONE:
            is_sound = data == ("\n".join([json.dumps(record)] * 5) + "\n").encode()
            return f"refused: {outcome.said[-300:]}" if is_sound else None
        texts = [json.loads(line) for line in data.decode().lstrip("\ufeff").split("\n") if line.strip()]
        counted = json.dumps(json.loads(outcome.out))
        return (
            None
            if f": {len(texts)}" in counted
            else f"difference: not {len(texts)} examples: {counted[:300]}"
        )

    words = f"evaluate runs/small --tasks {task} --task-files files --json"
    return Trial(tuple(words.split()), arrange, judge, may_fail=True)
