"""Prepared models against the originals, and products with rounded weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from overnight.generation import SamplingConfig, quantize
from overnight.generation.generate import Decoding, generate
from overnight.generation.quantize import (
    GenerationPrecision,
    HalfLinear,
    PackedLinear,
    QuantizedLinear,
    generation_precisions,
    prepare_for_generation,
    unsuitable_reason,
)
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

HERE = generation_precisions("cpu")
# Greatest difference of a logit, in standard deviations of all logits. Measured: 3e-6, 0.003, 0.05, 0.09.
TOLERANCES: dict[GenerationPrecision, float] = {"fp32": 2e-5, "fp16": 0.01, "bf16": 0.15, "int8": 0.25}
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GREEDY = SamplingConfig(temperature=0)

every_precision = pytest.mark.parametrize("precision", [each for each in TOLERANCES if each in HERE])
needs_int8 = pytest.mark.skipif("int8" not in HERE, reason="not on this CPU")


def build_model() -> GPT:
    """Logits spread like a trained model's; 101 ids, so that the embedding is padded."""
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=101, context_length=64))
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval()


MODEL = build_model()
IDS = torch.randint(101, (3, 64), generator=torch.Generator().manual_seed(1))
PROMPTS = IDS[:, :20].tolist()


def prepared(precision: GenerationPrecision, device: str = "cpu") -> GPT:
    model = copy.deepcopy(MODEL).to(device)
    prepare_for_generation(model, precision)
    return model


@torch.inference_mode()
def error_of(model: GPT) -> float:
    wanted, logits = MODEL(IDS), model(IDS.to(model.wte.weight.device))
    assert logits.shape == wanted.shape
    assert logits.dtype == torch.float32
    return float((logits.cpu() - wanted).abs().max() / wanted.std())


@every_precision
def test_prepared_model_has_same_logits(precision: GenerationPrecision) -> None:
    model = prepared(precision)
    assert error_of(model) < TOLERANCES[precision]
    assert error_of(MODEL) == 0
    changed = {
        name for name, module in model.named_modules() if type(module) is not type(MODEL.get_submodule(name))
    }
    assert changed == {f"h.{layer}.{name}" for layer in range(4) for name in LINEARS}
    kind = {"fp16": HalfLinear, "int8": QuantizedLinear}.get(precision, PackedLinear)
    assert {type(model.get_submodule(name)) for name in changed} == {kind}


@needs_int8
def test_coarser_rounding_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: one scale for all rows of a matrix."""
    initialize_correctly = QuantizedLinear.__init__

    def with_one_scale(self: QuantizedLinear, weight: Tensor, bias: Tensor | None) -> None:
        scale = 8 * weight.abs().max() / 127
        initialize_correctly(self, (weight / scale).round() * scale, bias)

    monkeypatch.setattr(QuantizedLinear, "__init__", with_one_scale)
    assert error_of(prepared("int8")) > 2 * TOLERANCES["int8"]


@every_precision
def test_prepared_model_generates(precision: GenerationPrecision) -> None:
    model, beyond_context = prepared(precision), Decoding(max_new_tokens=80, sampling=GREEDY)
    generated = generate(model, PROMPTS, beyond_context)
    assert [len(ids) for ids in generated] == [80, 80, 80]
    if precision == "fp32":
        assert generated == generate(MODEL, PROMPTS, beyond_context)
    assert generated == [generate(model, [prompt], beyond_context)[0] for prompt in PROMPTS]


@needs_int8
def test_int8_rounds_only_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(100, 64, generator=generator) * torch.rand(100, 1, generator=generator)
    weight[5] = 0.0
    bias, x = torch.randn(100, generator=generator), torch.randn(7, 3, 64, generator=generator)
    x[..., 10] *= 40  # an outlier channel, as in trained models
    x[2, 1] = 0.0
    steps = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30).double() / 127
    wanted = x.double() @ ((weight / steps).round() * steps).T + bias
    product = QuantizedLinear(weight, bias)(x)
    of_activations = float((product - wanted).abs().max())
    of_weights = float((x.double() @ weight.double().T + bias - wanted).abs().max())
    assert of_activations < 0.1 * of_weights
    assert torch.equal(product[2, 1], bias)
    assert torch.equal(QuantizedLinear(weight, None)(x), QuantizedLinear(weight, torch.zeros(100))(x))


@pytest.mark.parametrize(
    ("native", "device", "has_libraries", "supported"),
    [
        ("bf16", "cuda", True, ("bf16", "fp16", "fp32")),
        ("fp16", "cuda", True, ("fp16", "fp32")),
        ("fp32", "mps", True, ("fp32",)),
        ("bf16", "cpu", True, ("fp16", "bf16", "fp32", "int8")),
        ("fp32", "cpu", True, ("fp16", "fp32", "int8")),
        ("bf16", "cpu", False, ("fp32",)),
    ],
)
def test_generation_precisions_of_device(
    monkeypatch: pytest.MonkeyPatch, native: str, device: str, has_libraries: bool, supported: tuple[str, ...]
) -> None:
    monkeypatch.setattr(quantize, "native_precision", lambda _: native)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_libraries)
    engines = ["none", "fbgemm"] if has_libraries else ["none"]
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=engines))
    assert generation_precisions(device) == supported
    if not has_libraries:
        assert error_of(prepared("fp32")) == 0, "the matrices stay as they are"


def test_gpu_conversion_keeps_head_in_fp32() -> None:
    """Run on the CPU."""
    model, all_bf16 = copy.deepcopy(MODEL), copy.deepcopy(MODEL).to(torch.bfloat16)
    quantize._convert_on_gpu(model, torch.bfloat16)
    assert error_of(model) < TOLERANCES["bf16"]
    generated = generate(model, PROMPTS, Decoding(max_new_tokens=3, sampling=GREEDY))
    assert [len(ids) for ids in generated] == [3, 3, 3]
    with torch.inference_mode():
        hidden = model.trunk(IDS)
        distinct = [len(torch.unique(each.head(hidden))) for each in (model, all_bf16)]
    assert distinct[0] > 5 * distinct[1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gpu_prepared_model_has_same_logits(precision: GenerationPrecision) -> None:
    model = prepared(precision, "cuda")
    assert error_of(model) < 0.15
    assert [len(ids) for ids in generate(model, PROMPTS, Decoding(max_new_tokens=5))] == [5, 5, 5]


def rescaled(scale: float) -> GPT:
    """The same function: the matrices after the layer norms times `scale`, the norms divided by it."""
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        for block in model.h:
            for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                norm.weight.div_(scale)
                norm.bias.div_(scale)
                linear.weight.mul_(scale)
    return model


@pytest.mark.parametrize(
    "scale, unsuitable",
    [(1.0, set()), (1e6, {"fp16"}), (1e-7, {"fp16"})],
)
def test_precision_that_cannot_hold_the_weights_is_found(scale: float, unsuitable: set[str]) -> None:
    model = rescaled(scale)
    torch.testing.assert_close(model(IDS), MODEL(IDS), atol=1e-3, rtol=1e-3)
    reasons = {precision: unsuitable_reason(model, precision) for precision in TOLERANCES}
    assert {precision for precision, reason in reasons.items() if reason} == unsuitable
    for precision in unsuitable & set(HERE):  # the control: it would be another model
        prepare_for_generation(model, precision)
        assert not error_of(model) < TOLERANCES[precision]
