"""The same run in any number of processes: with Muon, and with every part of the model under FSDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from overnight.recipe import with_settings
from overnight.run.resume import load_resumed
from overnight.run_directory import RunDirectory

Train = Callable[..., Any]
distributed = pytest.mark.distributed  # not in a plain run
STEPS = {"total_steps": 8, "checkpoint_every_steps": 4, "evaluate_every_steps": 8, "sample_every_steps": 8}
MUON: dict[str, Any] = {
    **STEPS,
    **{
        "optimizer": "muon",
        "row_normalization": True,
        "matrix_weight_decay": 0.1,
        "peak_learning_rate": 1e-2,
        "matrix_learning_rate": 0.1,
        "momentum_warmup_steps": 5,
    },
    **{"positions": "rotary", "normalization": "rms", "norm_gains": False, "biases": False, "qk_norm": True},
    **{"activation": "relu2", "tied_head": False, "embedding_norm": True, "logit_softcap": 15.0},
    **{"embedding_shortcut": True, "value_embeddings": "alternate", "n_kv_head": 1},
}
ROTARY = {"positions": "rotary"}
PARTS: dict[str, dict[str, Any]] = {
    "value embeddings": {"value_embeddings": "all", "embedding_shortcut": True, "tied_head": False},
    "experts": {"n_expert": 4, "shared_experts": 1, "balance_rate": 0.01},
    "latent attention": {**ROTARY, "latent_rank": 8, "latent_rotary_channels": 4},
    "windows": {"window_pattern": "SL", "short_window": 8, **ROTARY},
    "swiglu and grouped queries": {"activation": "swiglu", "n_kv_head": 1, "qk_norm": True},
    "rms without gains": {"normalization": "rms", "norm_gains": False, "biases": False},
    "soft cap": {"logit_softcap": 5.0, "embedding_norm": True, "zero_projections": True},
}
TEAMS = [
    (2, "zero1"),
    pytest.param(2, "none", marks=distributed),
    pytest.param(4, "zero1", marks=distributed),
]
QUICK = ("value embeddings", "experts")


@pytest.mark.parametrize(
    "size, sharding",
    [(2, "zero1"), *(pytest.param(*each, marks=distributed) for each in [(2, "none"), (4, "zero1")])],
)
def test_muon_is_the_same_but_for_rounding(trained, size, sharding):
    alone, run = trained(1, sharding="none", **MUON), trained(size, sharding=sharding, **MUON)
    assert run.ledger() == alone.ledger()
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-4, abs=0)  # products of 16 bits
    other = trained(1, sharding="none", **{**MUON, "momentum_warmup_steps": 50})
    assert other.losses() != pytest.approx(alone.losses(), rel=1e-4, abs=0), "negative control"


@pytest.mark.parametrize(
    "size, sharding",
    [(2, "zero1"), *(pytest.param(*each, marks=distributed) for each in [(2, "none"), (4, "zero1")])],
)
def test_deterministic_muon_is_the_same_to_the_bit(trained, size, sharding):
    alone = trained(1, sharding="none", deterministic_reduce=True, **MUON).record()
    assert trained(size, sharding=sharding, deterministic_reduce=True, **MUON).record() == alone
    assert trained(1, sharding="none", **MUON).record() != alone, "negative control"


@pytest.mark.parametrize(
    "chain",
    [
        [(2, "zero1"), (1, "none"), (3, "zero1")],
        pytest.param([(3, "none"), (2, "zero1"), (1, "none"), (3, "zero1")], marks=distributed),
    ],
    ids=str,
)
def test_muon_in_changing_teams_is_the_same_run(trained, team, recipe, tmp_path, chain):
    """Twelve rows a step, which one, two and three processes divide; the momentum goes with its matrix."""
    settings, steps = {**MUON, "tokens_per_step": 12 * 32}, 8 // len(chain)
    alone = trained(1, sharding="none", **settings)
    for number, (size, sharding) in enumerate(chain, start=1):
        begun = recipe(**settings) if number == 1 else load_resumed(tmp_path / "run")
        stop = steps if number < len(chain) else None
        team(
            "train", with_settings(begun, sharding=sharding), tmp_path / "run", stop, 3, number > 1, size=size
        )
    losses = [line["loss"] for line in RunDirectory(tmp_path / "run").read_metrics()]
    assert losses == pytest.approx(alone.losses(), rel=1e-4, abs=0)


@pytest.mark.parametrize("size, sharding", [(2, "zero1"), pytest.param(2, "none", marks=distributed)])
def test_step_that_is_not_finite_changes_nothing_in_any_process(team, recipe, tmp_path, size, sharding):
    asked = recipe(sharding=sharding, **{**MUON, "total_steps": 5})
    for digests in team("train_with_digests", asked, tmp_path / "run", 3, size=size):
        assert digests[3] == digests[4], "weights, momentum, moments and counts of updates"
        assert len({*digests}) == len(digests) - 1, "every other step changes them"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[distributed] * (name not in QUICK)) for name in PARTS]
)
def test_part_trains_the_same_in_fsdp(trained, name):
    settings = {**STEPS, "dropout": 0.0, **PARTS[name]}
    alone, run = trained(1, sharding="none", **settings), trained(2, sharding="fsdp", **settings)
    assert run.ledger() == alone.ledger()
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-5, abs=0)
    plain = trained(1, sharding="none", **{**STEPS, "dropout": 0.0})
    assert plain.losses() != pytest.approx(alone.losses(), rel=1e-5, abs=0), "the part is there"
