"""The memory estimate: against torch's own allocations, and what is chosen by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from overnight.distributed.world import World
from overnight.model import loss_kernels
from overnight.model.gpt import GPT, init_weights
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.recipe import load_recipe
from overnight.run.setup import resolve
from overnight.training import Compute, OptimizerConfig
from overnight.training.activations import kept_per_token
from overnight.training.compute import NextTokenLoss
from overnight.training.memory import (
    MemoryEstimate,
    Resources,
    choose_sharding,
    estimate_memory,
    fits_into,
    largest_that_fits,
    rows_that_fit,
    suggest_fits,
    try_shardings,
)
from overnight.training.moments import reserve_moments, saved_bytes
from overnight.training.optim import build_optimizer
from overnight.training.sharding import assign_parameters, build_sharded_model

SIZES = ModelConfig(n_layer=3, n_head=4, n_embd=64, context_length=256, vocab_size=500)
ROWS = 4
TOKENS = ROWS * SIZES.context_length
FLOAT32 = 4
WIDE = ModelConfig(n_layer=6, n_head=4, n_embd=192, context_length=64, vocab_size=1000)
WIDE_PARAMETERS = sum(parameter.numel() for parameter in GPT(WIDE).parameters())
ON_H100 = Compute(device="cuda", precision="bf16", compile=True, attention="fused", loss="full")
GB = 10**9
LEVELS = ("none", "selective", "block")


def compute_of(**settings: Any) -> Compute:
    eager = Compute(device="cpu", precision="fp32", compile=False, attention="fused", loss="full")
    return replace(eager, **settings)


def bytes_kept_by_autograd(model: GPT, loss: Callable[[], torch.Tensor]) -> int:
    """What a forward pass keeps for the backward pass; parameters excepted, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert loss().requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def bytes_at_the_peak(action: Callable[[], object], trace: Path) -> int:
    """The most that tensors took while `action` ran, beyond what they took before, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    taken = peak = 0
    for change in (event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"):
        taken += change
        peak = max(peak, taken)
    return peak


def measure_and_estimate(
    model: GPT, compute: Compute, trace: Path, rows: int = ROWS, processes: int = 1
) -> tuple[int, MemoryEstimate]:
    """Bytes of a forward and a backward pass at their peak; unsharded gradients exist already."""
    sizes, loss = model.config, NextTokenLoss(model, compute)
    ids = torch.randint(500, (rows, sizes.context_length))
    loss(ids, ids).backward()
    peak = bytes_at_the_peak(lambda: loss(ids, ids).backward(), trace)
    return peak, estimate_memory(sizes, rows, compute, processes)


def passing(estimate: MemoryEstimate) -> int:
    """What is not there between two passes."""
    return estimate.activations + estimate.logits + estimate.copies


def take_step(model: GPT, names: set[str] | None = None) -> dict[str, int]:
    """Bytes of weights, gradients and moments (of `names`) after a step; of shards, this process's."""
    optimizer = build_optimizer(model, OptimizerConfig(), names=names)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()

    def nbytes(tensor: Any) -> int:
        return int((tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes)

    parameters, states = list(model.parameters()), optimizer.state.values()
    return {
        "weights": sum(map(nbytes, parameters)),
        "gradients": sum(nbytes(parameter.grad) for parameter in parameters),
        "moments": sum(nbytes(state[name]) for state in states for name in ("exp_avg", "exp_avg_sq")),
    }


def test_weights_gradients_and_moments_are_exact():
    assert take_step(GPT(SIZES)).items() <= vars(estimate_memory(SIZES, ROWS, compute_of())).items()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "precision, attention",
    [("fp32", "fused"), ("fp32", "math"), ("bf16", "fused"), ("bf16", "math"), ("bf16", "blocks")],
)
def test_activations_are_what_autograd_keeps(precision, attention, dropout):
    """Within 1%; it keeps the loss's logits once, as float32, and in 16 bits the weights that multiply."""
    sizes, compute = replace(SIZES, dropout=dropout), compute_of(precision=precision, attention=attention)
    model, ids = GPT(sizes, seed=0), torch.randint(500, (ROWS, SIZES.context_length))
    loss = NextTokenLoss(model, compute)
    estimate = estimate_memory(sizes, ROWS, compute)
    logits = FLOAT32 * TOKENS * sizes.vocabulary
    kept = bytes_kept_by_autograd(model, lambda: loss(ids, ids))
    assert estimate.activations + estimate.copies + logits == pytest.approx(kept, rel=0.01)
    assert estimate.activations == TOKENS * kept_per_token(sizes, compute)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_is_the_peak_of_an_eager_pass(precision, level, tmp_path):
    """Within 10%, and rather too much: gradients that grow while activations shrink are counted whole."""
    compute = compute_of(precision=precision, activation_checkpointing=level)
    peak, estimate = measure_and_estimate(GPT(SIZES), compute, tmp_path / "trace")
    assert 0.98 * peak < passing(estimate) < 1.10 * peak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("precision, level", [("fp32", "none"), ("bf16", "none"), ("bf16", "selective")])
def test_estimate_is_the_peak_of_a_compiled_pass(precision, level, tmp_path):
    """Within 20%: what is kept is the compiler's choice."""
    compute = compute_of(precision=precision, activation_checkpointing=level, compile=True)
    peak, estimate = measure_and_estimate(GPT(SIZES), compute, tmp_path / "trace")
    assert passing(estimate) + estimate.new_gradients == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunked_loss_takes_a_chunk_of_logits_and_a_weight_gradient(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_kernels, "CHUNK_BYTES_AT_LEAST", 1)  # or these few positions would be one chunk
    sizes, taken = replace(SIZES, n_layer=1, vocab_size=8_000), {}
    for loss in ("full", "chunked"):
        compute = compute_of(precision=precision, loss=loss)
        peak, estimate = measure_and_estimate(GPT(sizes), compute, tmp_path / "trace")
        taken[loss] = passing(estimate)
        assert 0.98 * peak < taken[loss] < 1.15 * peak
    assert taken["chunked"] < 0.4 * taken["full"]


@pytest.fixture
def one_of():
    """`one_of(n)` makes this process the first of n; the others are torch's fakes."""

    def open_group(processes):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)

    yield open_group
    dist.destroy_process_group()


def build_fsdp_model(processes: int) -> GPT:
    """The first process's shard of a new model."""
    world = World(0, processes, "cpu", 0, processes, is_distributed=True)
    return build_sharded_model(WIDE, init_weights(WIDE, 0), world, "fsdp")


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")  # not written to
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_fsdp_shards_are_exact(one_of, processes):
    """Rows are rounded up: of 192 biases 3 processes hold 64 each, of 1,024 ids the first holds 342."""
    one_of(processes)
    held = take_step(build_fsdp_model(processes))
    assert held.items() <= vars(estimate_memory(WIDE, 1, compute_of(sharding="fsdp"), processes)).items()
    assert held["weights"] >= 4 * WIDE_PARAMETERS / processes


@pytest.mark.parametrize("precision, at_most", [("fp32", 1.25), ("bf16", 1.35)])
@pytest.mark.parametrize("level", LEVELS)
def test_estimate_is_the_peak_of_a_sharded_pass(one_of, precision, at_most, level, tmp_path):
    """Rather too much: whole gradients that come while 16-bit copies go are counted whole."""
    one_of(8)
    compute = compute_of(precision=precision, activation_checkpointing=level, sharding="fsdp")
    peak, estimate = measure_and_estimate(build_fsdp_model(8), compute, tmp_path / "trace", 1, 8)
    assert 0.98 * peak < passing(estimate) + estimate.gathered < at_most * peak
    assert passing(estimate) < 0.7 * peak, "what is gathered is most of it here"


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_zero1_moments_are_exact(processes):
    model = GPT(WIDE)
    owner = assign_parameters({name: weight.numel() for name, weight in model.named_parameters()}, processes)
    shares = [{name for name in owner if owner[name] == rank} for rank in range(processes)]
    held = [take_step(model, names)["moments"] for names in shares]
    estimate = estimate_memory(WIDE, 1, compute_of(sharding="zero1"), processes)
    assert estimate.moments == max(held)
    assert sum(held) == 8 * WIDE_PARAMETERS, "none is left out, none held twice"
    assert estimate.weights == estimate.gradients == 4 * WIDE_PARAMETERS


def test_hsdp_divides_within_a_machine_and_a_single_process_nothing():
    fsdp, hsdp = compute_of(sharding="fsdp"), compute_of(sharding="hsdp")
    assert estimate_memory(WIDE, 1, hsdp, 64, 8) == estimate_memory(WIDE, 1, fsdp, 8)
    assert estimate_memory(WIDE, 1, hsdp, 64, 8) != estimate_memory(WIDE, 1, fsdp, 64, 8)
    alone = estimate_memory(SIZES, 2, compute_of())
    for sharding in ("none", "zero1", "fsdp", "hsdp"):
        assert estimate_memory(SIZES, 2, compute_of(sharding=sharding)) == alone
    assert try_shardings(SIZES, 2, compute_of(), Resources("cpu", 1)) == {"none": alone.together}


def test_micro_batch_is_the_largest_divisor_that_fits():
    """43 of 512 rows would fit."""
    recipe, resources = load_recipe("gpt2-124m"), Resources("cuda", 24 * GB)
    resolved = resolve(recipe, PRESETS["gpt2-124m"], recipe.data, ON_H100, resources)
    assert resolved.plan.micro_batch_size == resolved.recipe.batch.micro_batch_size == 32


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-774m", "gpt2-1558m"])
@pytest.mark.parametrize("gigabytes", [1, 16, 40, 80])
@pytest.mark.parametrize("processes", [1, 8])
def test_rows_that_fit_are_the_most_that_fit(name, gigabytes, processes):
    resources = Resources("cuda", gigabytes * GB, processes, processes)
    rows = rows_that_fit(PRESETS[name], ON_H100, resources)
    needed = {
        count: estimate_memory(PRESETS[name], count, ON_H100, processes, processes).together
        for count in range(1, 65)
    }
    assert rows == max((count for count in needed if fits_into(gigabytes * GB, needed[count])), default=1)


@pytest.mark.parametrize("context_length, rows", [(256, 16), (1024, 4), (8192, 1)])
def test_micro_batch_on_a_cpu_has_at_most_4096_tokens(context_length, rows):
    sizes = replace(SIZES, context_length=context_length)
    assert rows_that_fit(sizes, compute_of(), Resources("cpu", 1000 * GB)) == rows


def test_suggestions_fit_and_more_costly_ones_fit_more_rows():
    sizes, compute, possible = PRESETS["gpt2-774m"], compute_of(precision="bf16"), [1, 2, 4, 8, 16]
    assert not fits_into(24 * GB, estimate_memory(sizes, 16, compute).together)
    found = list(suggest_fits(sizes, compute, possible, Resources("cuda", 24 * GB)))
    assert found[0].options == "--micro-batch-size 2"
    assert found[-1].options.startswith("--activation-checkpointing block ")
    assert all(fits_into(24 * GB, each.needed_bytes) for each in found)
    rows = [int(each.options.split()[-1]) for each in found]
    assert rows == sorted({*rows} & {*possible})


def test_sharding_is_suggested_to_several_processes_and_nothing_where_weights_do_not_fit():
    sizes = PRESETS["gpt3-6.7b"]
    first, *_ = suggest_fits(sizes, ON_H100, [1, 2], Resources("cuda", 80 * GB, 8, 8))
    assert first.options == "--sharding fsdp --micro-batch-size 2"
    assert fits_into(80 * GB, first.needed_bytes)
    assert list(suggest_fits(sizes, ON_H100, [1, 2], Resources("cuda", 80 * GB))) == []


def test_largest_model_that_fits_is_found():
    compute = compute_of(precision="bf16")
    name, needed = largest_that_fits(compute, Resources("cuda", 80 * GB)) or ("", 0)
    assert name == "gpt3-2.7b"
    assert fits_into(80 * GB, needed)
    assert (largest_that_fits(replace(ON_H100, sharding="fsdp"), Resources("cuda", 80 * GB, 64, 64)) or [""])[
        0
    ] == "gpt3-13b"
    assert largest_that_fits(compute, Resources("cuda", 1 * GB)) is None


@pytest.mark.parametrize(
    "name, gigabytes, processes, per_machine, chosen",
    [
        ("gpt2-124m", 80, 8, 8, "none"),
        ("gpt2-1558m", 80, 8, 8, "none"),
        ("gpt2-1558m", 36, 8, 8, "zero1"),
        ("gpt2-1558m", 24, 8, 8, "fsdp"),
        ("gpt3-13b", 80, 64, 8, "fsdp"),
        ("gpt3-13b", 141, 8, 8, "fsdp"),
        ("gpt3-13b", 141, 64, 8, "hsdp"),
        ("gpt3-13b", 141, 64, 1, "fsdp"),
        ("gpt3-6.7b", 80, 64, 8, "hsdp"),
        ("gpt3-175b", 80, 8, 8, "fsdp"),
        ("gpt3-175b", 80, 1, 1, "none"),
    ],
)
def test_first_sharding_that_fits_is_chosen(name, gigabytes, processes, per_machine, chosen):
    available = gigabytes * GB
    resources = Resources("cuda", available, processes, per_machine)
    tried = try_shardings(PRESETS[name], 1, ON_H100, resources)
    asked: Any = replace(ON_H100, sharding="fsdp")  # what was asked for does not matter
    assert choose_sharding(PRESETS[name], 1, asked, resources) == chosen
    *before, last = tried
    assert last == chosen
    assert not any(fits_into(available, tried[sharding]) for sharding in before)
    assert list(tried.values()) == sorted(tried.values(), reverse=True), "each takes less than the one before"


@pytest.mark.parametrize("gigabytes, level", [(80, "selective"), (141, "none")], ids=["h100", "h200"])
def test_13b_fits_on_eight_gpus(gigabytes, level):
    """With 80 GB selective recomputation is needed: 16-bit copies are what does not get smaller."""
    computes = [replace(ON_H100, sharding="fsdp", activation_checkpointing=each) for each in LEVELS]
    needed = [estimate_memory(PRESETS["gpt3-13b"], 1, compute, 8, 8).together for compute in computes]
    fitting = [fits_into(gigabytes * GB, each) for each in needed]
    assert LEVELS[fitting.index(True)] == level


# Every part of the model, and Muon

QUICK_PARTS = [
    *(("modern, all", "fp32"), ("modern, all", "bf16"), ("latent attention, rms", "bf16")),
    *(("swiglu experts", "bf16"), ("windows", "fp32"), ("soft cap, chunked loss", "bf16")),
]


@pytest.fixture
def step_sizes(programs):
    """Sizes at which the logits, the blocks and the weights each are a part of the peak that counts."""
    return partial(programs["memory"].Sizes, replace(SIZES, n_head=8, n_embd=128, vocab_size=1000), 4)


@pytest.mark.parametrize("name, precision", QUICK_PARTS)
def test_estimate_is_the_peak_of_a_step_with_a_part(name, precision, step_sizes, programs):
    """Within 1%: the whole step, update included."""
    estimate, peak = programs["memory"].measure_part(
        programs["memory"].PARTS[name], step_sizes(precision, is_compiled=False)
    )
    assert estimate.together == pytest.approx(peak, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_is_the_peak_of_a_step_with_each_part(precision, step_sizes, programs):
    sizes, ratios = step_sizes(precision, is_compiled=False), {}
    for name, settings in programs["memory"].PARTS.items():
        estimate, peak = programs["memory"].measure_part(settings, sizes)
        ratios[name] = estimate.together / peak
    assert {name for name, ratio in ratios.items() if not 0.98 < ratio < 1.02} == set()
    of_gpt2, _ = programs["memory"].measure_part({}, sizes)
    assert of_gpt2.together < 0.9 * peak, "of GPT-2 it is another"


@pytest.mark.parametrize("row_normalization", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
def test_moments_of_muon_are_exact(row_normalization, processes):
    """Of matrices one number each, of the rest two, of the balance none; as a checkpoint has them."""
    sizes = replace(SIZES, n_expert=4, activation="swiglu", tied_head=False, vocab_size=512)
    config = OptimizerConfig(optimizer="muon", row_normalization=row_normalization)
    model = GPT(sizes)
    owner = assign_parameters({name: each.numel() for name, each in model.named_parameters()}, processes)
    held = []
    for rank in range(processes):
        optimizer = build_optimizer(model, config, names={name for name in owner if owner[name] == rank})
        model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
        reserved = reserve_moments(optimizer, model)
        optimizer.step()
        states = [each for state in optimizer.state.values() for each in state.items() if each[0] != "step"]
        held.append(sum(tensor.nbytes for _, tensor in states))
        assert sum(tensor.nbytes for tensor in reserved) == held[-1]
        assert reserve_moments(optimizer, model) == []
    sharding = "none" if processes == 1 else "zero1"
    found = estimate_memory(sizes, 1, compute_of(sharding=sharding), processes, optimizer=config)
    assert found.moments == max(held)
    assert saved_bytes(sizes, config) == 4 * sizes.parameter_count() + sum(held)
    assert saved_bytes(sizes, OptimizerConfig()) > 1.2 * saved_bytes(sizes, config), "AdamW keeps more"


@pytest.mark.parametrize("per_machine", [1, 8])
def test_muon_is_never_divided_by_rows(per_machine):
    """Not even where nothing fits; AdamW is."""
    resources, muon = Resources("cuda", 1 * GB, 8, per_machine), OptimizerConfig(optimizer="muon")
    sizes = PRESETS["gpt2-1558m"]
    assert [*try_shardings(sizes, 1, ON_H100, resources, muon)] == ["none", "zero1"]
    assert choose_sharding(sizes, 1, ON_H100, resources, muon) == "zero1"
    assert choose_sharding(sizes, 1, ON_H100, resources) == "fsdp"
    enough = Resources("cuda", 80 * GB, 8, per_machine)
    assert not any("fsdp" in each.options for each in suggest_fits(sizes, ON_H100, [1, 2], enough, muon))
    assert any("fsdp" in each.options for each in suggest_fits(PRESETS["gpt3-6.7b"], ON_H100, [1], enough))
