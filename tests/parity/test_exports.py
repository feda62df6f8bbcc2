"""Models with switches as folders of Transformers: logits, greedy ids, tokenizer, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from overnight.conversion import block_layouts, llama_format, nanochat_format
from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import open_model
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, generate
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

TOLERANCE, MISTAKE = 1e-5, 1e-3  # relative to the largest logit
TEXT = "First Citizen: Before we proceed any further, dignums, hear me speak. <|x|> Grüße, 你好"
V, T, NEW_TOKENS = 320, 64, 24
BASE = ModelConfig(
    **{"n_layer": 3, "n_head": 4, "n_embd": 64, "context_length": T, "vocab_size": V},
    **{"positions": "rotary", "normalization": "rms", "biases": False},
)
NANOCHAT = replace(
    BASE,
    **{"norm_gains": False, "qk_norm": True, "activation": "relu2", "embedding_norm": True},
    **{"tied_head": False, "logit_softcap": 8.0},
)
YARN = {"rotary_scaling": "yarn", "trained_context_length": 24}
QWEN = replace(BASE, qk_norm=True, activation="swiglu", n_kv_head=2, tied_head=False)

CASES: dict[str, tuple[str, ModelConfig, dict[str, Any]]] = {
    "NanoChat": ("NanoChat", NANOCHAT, {}),
    "NanoChat, tied": (
        "NanoChat",
        replace(NANOCHAT, tied_head=True, n_kv_head=2, activation="gelu", logit_softcap=None, dropout=0.1),
        {},
    ),
    "Qwen3": ("Qwen3", QWEN, {}),
    "Qwen3 of relu2": ("Qwen3", replace(NANOCHAT, logit_softcap=None, **YARN), {"embedding_norm": False}),
    "Qwen3, tied": (
        "Qwen3",
        replace(QWEN, tied_head=True, embedding_norm=True, window_pattern="SL", short_window=7),
        {"tied_head": False, "embedding_norm": False},
    ),
    "Llama": ("Llama", replace(BASE, activation="swiglu", n_kv_head=2, rotary_base=5e4), {}),
    "Llama with YaRN": (
        "Llama",
        replace(BASE, activation="relu2", biases=True, tied_head=False, zero_projections=True, **YARN),
        {"zero_projections": False},
    ),
    "Qwen3Moe": ("Qwen3Moe", replace(QWEN, n_expert=4, balance_rate=0.0, feed_forward_width=32), {}),
    "Qwen3Moe of relu2": (
        "Qwen3Moe",
        replace(
            QWEN, activation="relu2", n_expert=5, experts_per_token=3, balance_rate=0.0, norm_gains=False
        ),
        {},
    ),
    "DeepseekV3": (
        "DeepseekV3",
        replace(BASE, activation="swiglu", latent_rank=24, latent_rotary_channels=6, tied_head=False),
        {},
    ),
    "DeepseekV3 with YaRN": (
        "DeepseekV3",
        replace(BASE, activation="relu2", latent_rank=24, feed_forward_width=100, rotary_base=300.0, **YARN),
        {},
    ),
}
"""By name: the class, the model, and the switches that its folder has instead."""


@cache
def tokenizer():
    return build_tokenizer(f"bpe-{V}", [TEXT * 4])


@cache
def build(name: str) -> GPT:
    """A model whose weights are all random, and whose greedy text does not repeat one token."""
    model = GPT(CASES[name][1])
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            scale = (20 if "c_proj" in parameter_name else 2) * parameter.shape[-1] ** -0.5
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else scale * noise)
    model.zero_padding()
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`written(name)`: the folder of a case, written once."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def write(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        assert write_huggingface(build(name), tokenizer(), path) == f"{CASES[name][0]}ForCausalLM"
        return path

    return write


def load_theirs(folder: Path) -> Any:
    """Transformers' model; no tensor is missing or left over."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def difference(ours: GPT, theirs: Any) -> float:
    """Of the logits, relative to the largest."""
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
    wanted = theirs(ids)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
    return float((ours(ids) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_same_from_folder(written: Callable[[str], Path], name: str) -> None:
    theirs = load_theirs(written(name))
    assert type(theirs).__name__ == f"{CASES[name][0]}ForCausalLM"
    assert difference(build(name), theirs) <= TOLERANCE
    their_tokenizer = AutoTokenizer.from_pretrained(written(name))
    prompt = tokenizer().encode(TEXT)[:20]
    ids = their_tokenizer(TEXT, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer().encode(TEXT)
    end = tokenizer().end_of_text
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == end
    prompts = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": end}
    found = theirs.generate(prompts, max_new_tokens=NEW_TOKENS, **settings)[0, len(prompt) :].tolist()
    decoding = Decoding(max_new_tokens=NEW_TOKENS, sampling=SamplingConfig(temperature=0), end_of_text=end)
    (greedy,) = generate(build(name), [prompt], decoding)
    assert [id for id in found if id != end] == [id for id in greedy if id != end]
    assert len(set(greedy)) > 2, "the text would hide a mistake"


@pytest.mark.parametrize("name", CASES)
def test_folder_is_read_again(written: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """As the same model, and from what Transformers writes of it; written again to the byte."""
    opened = open_model(str(written(name)))
    _, config, changed = CASES[name]
    assert opened.model.config == replace(config, **changed)
    own = build(name).weights()
    for weight_name, weight in opened.model.weights().items():
        if "embedding_norm" not in changed or weight_name != "wte.weight":
            assert torch.equal(weight, own["wte.weight" if weight_name not in own else weight_name])
    assert difference(opened.model, build(name)) <= TOLERANCE
    write_huggingface(opened.model, opened.tokenizer, tmp_path / "again")
    for path in written(name).iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    load_theirs(written(name)).save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(written(name)).save_pretrained(tmp_path / "theirs")
    read = open_model(str(tmp_path / "theirs"))
    assert read.model.config == opened.model.config
    assert read.end_ids == opened.end_ids
    for weight_name, weight in read.model.weights().items():
        assert torch.equal(weight, opened.model.weights()[weight_name]), weight_name


def gate_of_ones(config: ModelConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = export_gated(config, own)
    return {**found, "mlp.up_proj.weight": torch.ones_like(found["mlp.up_proj.weight"])}


def queries_and_keys_swapped(config: ModelConfig, own: Mapping[str, Tensor], *_: object) -> dict[str, Tensor]:
    found, query = export_heads(config, own), "self_attn.q_proj.weight"
    return {**found, query: found[query].flip(0)}


def another_base(config: ModelConfig, *arguments: object) -> Any:
    fields = shared_fields(config, *arguments)
    return {**fields, "rope_theta": 999.0, "rope_parameters": {"rope_type": "default", "rope_theta": 999.0}}


export_gated, export_heads = block_layouts.export_gated, block_layouts.export_heads
shared_fields = llama_format.shared_fields
SAME_ORDER = block_layouts.same_order
MISTAKES: dict[str, tuple[str, Any, str, Any]] = {
    "halves not swapped": ("NanoChat", nanochat_format, "swap_halves", SAME_ORDER),
    "rotation by pairs": ("NanoChat", nanochat_format, "swap_halves", block_layouts.halves_to_neighbours),
    "heads in another order": ("Llama", llama_format, "export_heads", queries_and_keys_swapped),
    "gate missing": ("Qwen3", llama_format, "export_gated", gate_of_ones),
    "embedding not normalized": ("Qwen3 of relu2", llama_format, "rms_norm", lambda rows: rows.clone()),
    "embedding normalized with a mean": (
        *("Qwen3, tied", llama_format, "rms_norm"),
        lambda rows: torch.nn.functional.layer_norm(rows, rows.shape[-1:]),
    ),
    "another base": ("Llama", llama_format, "shared_fields", another_base),
    "gate and up swapped": (
        *("Qwen3Moe", block_layouts, "_gate_and_up"),
        lambda _config, wide: tuple(reversed(wide.chunk(2))),
    ),
    "rotated channels in halves": ("DeepseekV3", block_layouts, "halves_to_neighbours", SAME_ORDER),
}
"""By name: the case, and what is replaced where."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_export_is_found(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, place, replacement = MISTAKES[mistake]
    monkeypatch.setattr(module, place, replacement)
    write_huggingface(build(name), tokenizer(), tmp_path / "wrong")
    assert difference(build(name), load_theirs(tmp_path / "wrong")) > MISTAKE


@pytest.mark.parametrize("field", ["final_logit_softcapping", "sliding_window", "factor"])
def test_each_field_of_config_counts(written: Callable[[str], Path], field: str) -> None:
    """Negative control: a model of Transformers with another value computes something else."""
    name = {"final_logit_softcapping": "NanoChat", "sliding_window": "Qwen3, tied"}.get(
        field, "Llama with YaRN"
    )
    theirs = load_theirs(written(name))
    config = theirs.config.to_dict()
    if field == "factor":
        config["rope_parameters"]["factor"] *= 2
    else:
        config[field] += 1
    other = type(theirs)(type(theirs.config)(**config)).eval()
    other.load_state_dict(theirs.state_dict())
    assert difference(build(name), other) > MISTAKE


def test_llama_of_others_is_read(written: Callable[[str], Path], tmp_path: Path) -> None:
    """With the fields of Transformers 4 only, weights in bfloat16, and the buffer of old versions."""
    config = LlamaConfig(
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 100},
        **{"vocab_size": V, "max_position_embeddings": T, "rms_norm_eps": 1e-6, "eos_token_id": [3, 7]},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(written("Llama")).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/generation_config.json").unlink()

    file = tmp_path / "llama/model.safetensors"
    weights = {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights, file, metadata={"format": "pt"})
    content = json.loads((tmp_path / "llama/config.json").read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "dtype", "attention_bias", "mlp_bias"):
        content.pop(name, None)
    (tmp_path / "llama/config.json").write_text(
        json.dumps({**content, "rope_theta": 5e5, "rope_scaling": None})
    )
    opened = open_model(str(tmp_path / "llama"))
    assert opened.end_ids == {3, 7}
    assert opened.model.config.rotary_base == 5e5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    assert difference(opened.model, theirs) <= TOLERANCE
