"""Logits, gradients, optimizer steps and files against Hugging Face Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from overnight.conversion.huggingface import read_huggingface, write_huggingface
from overnight.model import gpt
from overnight.model.gpt import GPT, Block
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.training import OptimizerConfig
from overnight.training.optim import build_optimizer, clip_gradients, step_if

SIZES = {
    "small": ModelConfig(n_layer=2, n_head=2, n_embd=48, context_length=96, vocab_size=301),
    "larger": ModelConfig(n_layer=4, n_head=8, n_embd=128, context_length=128, vocab_size=1000),
}
TOLERANCE = 1e-5


def build_theirs(config: ModelConfig, seed: int = 0) -> GPT2LMHeadModel:
    """Hugging Face's model with random weights, none at the 0 or 1 that would hide a mistake."""
    assert config.vocab_size is not None
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.context_length,
            vocab_size=config.vocab_size,
            bos_token_id=config.vocab_size - 1,
            eos_token_id=config.vocab_size - 1,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.04, generator=generator))
    return theirs.eval()


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, independently of the conversion that is tested below."""
    ours = {}
    for name, tensor in theirs.items():
        short = name.replace("transformer.", "", 1)
        if short != "lm_head.weight":
            is_conv1d = ".c_" in short and short.endswith(".weight")
            ours[short] = tensor.detach().t().clone() if is_conv1d else tensor.detach().clone()
    return ours


def build_pair(config: ModelConfig, seed: int = 0) -> tuple[GPT, GPT2LMHeadModel]:
    theirs = build_theirs(config, seed)
    ours = GPT(config)
    ours.load_weights(by_our_names(theirs.state_dict()))
    return ours.eval(), theirs


def random_ids(config: ModelConfig, rows: int, length: int | None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size or 0, (rows, length or config.context_length), generator=generator)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def logit_error(ours: GPT, theirs: GPT2LMHeadModel, ids: Tensor) -> float:
    return (ours(ids) - theirs(ids).logits).abs().max().item()


def gradient_error(ours: GPT, theirs: GPT2LMHeadModel, ids: Tensor) -> float:
    """The largest relative error of any tensor's gradient, by norm and by largest element."""
    targets = ids.roll(-1, dims=1)
    mean_loss(ours(ids), targets).backward()
    mean_loss(theirs(ids).logits, targets).backward()
    wanted = by_our_names({name: parameter.grad for name, parameter in theirs.named_parameters()})
    errors = []
    for name, parameter in ours.named_parameters():
        difference = parameter.grad[: len(wanted[name])] - wanted[name]
        errors.append(difference.norm() / wanted[name].norm())
        errors.append(difference.abs().max() / wanted[name].abs().max())
    return max(errors).item()


@pytest.mark.parametrize("length", [1, 7, None])  # None: the whole context
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_gradients_match(size, length):
    ours, theirs = build_pair(SIZES[size])
    ids = random_ids(SIZES[size], 3, length)
    assert logit_error(ours, theirs, ids) < TOLERANCE
    assert gradient_error(ours.train(), theirs.train(), ids) < TOLERANCE


def without_tanh(_ours: GPT, patch: pytest.MonkeyPatch) -> None:
    exact = SimpleNamespace(**{**vars(F), "gelu": lambda x, approximate: F.gelu(x)})
    patch.setattr(gpt, "F", exact)


def without_final_norm(ours: GPT, _patch: pytest.MonkeyPatch) -> None:
    ours.ln_f = nn.Identity()  # type: ignore[assignment]


def without_residual(_ours: GPT, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Block, x_BTC: Tensor, inputs: object) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), inputs)
        return self.mlp(self.ln_2(x_BTC))

    patch.setattr(Block, "forward", forward)


@pytest.mark.parametrize("mistake", [without_tanh, without_final_norm, without_residual])
def test_mistake_in_model_is_detected(mistake, monkeypatch):
    config = SIZES["small"]
    ours, theirs = build_pair(config)
    mistake(ours, monkeypatch)
    assert logit_error(ours, theirs, random_ids(config, 3, 7)) > 3 * TOLERANCE


def optimizer_losses(ours: GPT, theirs: GPT2LMHeadModel, decay_of_vectors: float) -> float:
    """The largest difference of the losses of ten AdamW steps."""
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": decay_of_vectors},
    ]
    their_optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    our_optimizer = build_optimizer(ours, OptimizerConfig(peak_learning_rate=1e-3, weight_decay=0.1))
    worst = 0.0
    for step in range(10):
        ids = random_ids(ours.config, 4, 32, seed=step)
        targets = ids.roll(-1, dims=1)
        our_loss, their_loss = mean_loss(ours(ids), targets), mean_loss(theirs(ids).logits, targets)
        worst = max(worst, abs(our_loss.item() - their_loss.item()))
        our_loss.backward()
        norm = clip_gradients(list(ours.parameters()), 1.0)
        step_if(our_optimizer, GradScaler(enabled=False), torch.isfinite(norm), 1e-3)
        our_optimizer.zero_grad()
        their_loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()
    return worst


@pytest.mark.parametrize(
    ("size", "decay", "fits"), [("small", 0, True), ("larger", 0, True), ("small", 0.1, False)]
)
def test_optimizer_steps_match(size, decay, fits):
    """The last one is the negative control."""
    assert (optimizer_losses(*build_pair(SIZES[size]), decay) < TOLERANCE) == fits


def test_gpt2_124m_parameter_count():
    config = PRESETS["gpt2-124m"]
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config())
        ours = GPT(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 124_439_808
    assert sum(weight.numel() for weight in ours.weights().values()) == 124_439_808
    assert config.parameter_count() == 124_439_808


def assert_equal_weights(found: GPT, wanted: dict[str, Tensor]) -> None:
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.weights().items())


TEXT = "First Citizen:\n  Grüße, 你好 🙂  <|endoftext|> isn't 1,024 "


def test_transformers_reads_and_writes_same_folder(tmp_path):
    """Every kind of tokenizer is in test_tokenizers.py."""
    tokenizer = build_tokenizer("bpe-300", [TEXT])
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=40, vocab_size=300)
    ours, _ = build_pair(config)
    write_huggingface(ours, tokenizer, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(theirs) is GPT2LMHeadModel
    assert theirs.dtype == torch.float32
    assert logit_error(ours, theirs, random_ids(config, 2, 40)) < TOLERANCE
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text
    ids = tokenizer.encode(TEXT)
    their_ids = their_tokenizer(TEXT, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert their_ids == ids
    assert their_tokenizer.decode(ids) == TEXT == tokenizer.decode(ids)
    theirs.save_pretrained(tmp_path / "theirs")
    their_tokenizer.save_pretrained(tmp_path / "theirs")
    found, read = read_huggingface(tmp_path / "theirs")
    assert not found.training
    assert found.config == config
    assert read.fingerprint == tokenizer.fingerprint
    assert_equal_weights(found, ours.weights())


@pytest.fixture
def written(tmp_path):
    """A small model in Hugging Face's format."""
    tokenizer = build_tokenizer("characters", ["abc"])
    config = ModelConfig(n_layer=2, n_head=2, n_embd=8, context_length=16, vocab_size=260, dropout=0.1)
    write_huggingface(build_pair(config)[0], tokenizer, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_is_exact(written, tmp_path, monkeypatch):
    model, tokenizer = read_huggingface(written)
    write_huggingface(model, tokenizer, tmp_path / "again")
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    again, read = read_huggingface(tmp_path / "again")
    assert_equal_weights(again, model.weights())
    assert again.config == model.config
    assert read.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="already exists"):
        write_huggingface(again, read, written)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("overnight.conversion.huggingface.write_atomically", fail)
    with pytest.raises(OSError, match="no space"):
        write_huggingface(model, tokenizer, tmp_path / "third")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "again"}, (
        "a failed conversion leaves nothing"
    )


def test_old_names_buffers_head_and_missing_keys_are_read(written):
    wanted, _ = read_huggingface(written)
    weights = load_file(written / "model.safetensors")
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old["lm_head.weight"] = old["wte.weight"].clone()
    old["h.0.attn.bias"] = torch.ones(16, 16, dtype=torch.uint8)
    old["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(written, old)
    # Missing keys have Transformers' defaults.
    content = json.loads((written / "config.json").read_text())
    sizes = ("model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    (written / "config.json").write_text(json.dumps({name: content[name] for name in sizes}))
    found, _ = read_huggingface(written)
    assert_equal_weights(found, wanted.weights())
    assert found.config.dropout == GPT2Config().resid_pdrop


def test_sharded_weights_are_read(written):
    wanted, _ = read_huggingface(written)
    weights = load_file(written / "model.safetensors")
    (written / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, written / file)
    index = written / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal_weights(read_huggingface(written)[0], wanted.weights())
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../model/config.json"}}))
    with pytest.raises(ValueError, match="weight_map"):
        read_huggingface(written)
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": "lost.safetensors"}}))
    with pytest.raises(ValueError, match=r"lost\.safetensors"):
        read_huggingface(written)


def change_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": ["gpt2"]}, "model_type"),
        ({"model_type": "llama"}, "num_hidden_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_inner": 17}, "n_inner"),
        ({"n_layer": "2"}, "n_layer"),
        ({"n_layer": None}, "n_layer"),
        ({"n_head": 3}, "n_head=3"),
        ({"n_layer": 10**9}, "n_layer=1000000000"),
        ({"vocab_size": 261}, "wte.weight"),
        ({"n_positions": 17}, "wpe.weight"),
        ({"resid_pdrop": "much"}, "resid_pdrop"),
    ],
)
def test_other_architecture_is_refused(written, changes, named):
    change_config(written, **changes)
    with pytest.raises(ValueError, match=named):
        read_huggingface(written)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lm_head.weight", torch.zeros(260, 8), r"lm_head\.weight"),
        ("transformer.h.0.ln_1.weight", torch.zeros(9), r"h\.0\.ln_1\.weight .*\(9,\)"),
        ("transformer.h.0.surprise", torch.zeros(1), "surprise is unknown"),
        ("transformer.ln_f.bias", torch.zeros(8, dtype=torch.int8), r"ln_f\.bias .*int8"),
        ("transformer.wpe.weight", None, r"wpe\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(written, name, changed, message):
    weights = {**load_file(written / "model.safetensors"), name: changed}
    rewrite(written, {name: weight for name, weight in weights.items() if weight is not None})
    with pytest.raises(ValueError, match=message):
        read_huggingface(written)


def test_damaged_weights_and_pickles_are_refused(written):
    file = written / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_huggingface(written)
    file.rename(written / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*code"):
        read_huggingface(written)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, None])
def test_damaged_config_is_refused(written, content):
    (written / "config.json").unlink()
    if content is not None:
        (written / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_huggingface(written)
