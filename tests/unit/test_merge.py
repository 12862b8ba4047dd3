"""merge_and_reinit_: the base takes exactly the delta, the function stays, new factors start."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from method_samples import (
    LAYER_KINDS,
    as_rows,
    layers_of,
    linear,
    max_difference,
    mlp,
    numpy64,
    same_bits,
    snapshot,
    train_factors_,
)
from reference import low_rank
from relora import LoRALinear, NonFiniteError, ReLoRAConfig, inject, merge_and_reinit_
from relora.method import base as base_module
from relora.method.merge import merge_

R3 = ReLoRAConfig(rank=3, scaling_rule="alpha/r")
SHAPES = [(5, 7, 3), (7, 5, 4), (2, 40, 1), (96, 64, 24)]  # in, out, rank
BFLOAT16_HALF_ULP = 2**-8  # of a value: 8 significant bits


def injected(kind: str, in_features: int, out_features: int, **config: Any) -> LoRALinear:
    layer = LAYER_KINDS[kind](in_features, out_features)
    inject(layer, ReLoRAConfig(**config))
    assert isinstance(layer, LoRALinear)
    return layer


def delta_of(layer: LoRALinear) -> low_rank.Array:
    scaling = layer.scaling.item() if isinstance(layer.scaling, torch.Tensor) else layer.scaling
    return low_rank.delta(numpy64(layer.lora_A), numpy64(layer.lora_B), scaling)


# --- what a merge does -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["alpha/r", "rslora", "matched", "learned"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SHAPES)
def test_the_base_changes_by_exactly_the_delta_to_float32_rounding(
    kind: str, in_features: int, out_features: int, rank: int, rule: str
) -> None:
    layer = injected(kind, in_features, out_features, rank=rank, scaling_rule=rule)
    train_factors_(layer)
    wanted = as_rows(layer) + delta_of(layer)
    merge_and_reinit_(layer, seed=0, restart_index=1)
    got = as_rows(layer)
    # One rounding: within half a unit in the last place of float32 (and of float64 before it).
    assert np.all(np.abs(got - wanted) <= np.spacing(np.abs(wanted).astype(np.float32)) * 0.5000001)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_a_float64_base_takes_the_delta_in_float64(kind: str) -> None:
    layer = LAYER_KINDS[kind](9, 7).double()
    inject(layer, R3)
    assert isinstance(layer, LoRALinear)
    train_factors_(layer)
    wanted = as_rows(layer) + delta_of(layer)
    assert merge_and_reinit_(layer, seed=0, restart_index=1).relative_merge_error < 1e-14
    np.testing.assert_allclose(as_rows(layer), wanted, rtol=1e-14)


@pytest.mark.parametrize("rule", ["alpha/r", "matched", "learned"])
@pytest.mark.parametrize("factors", ["both", "B"])
def test_the_function_is_preserved_over_many_restarts(rule: str, factors: str) -> None:
    model = mlp()
    inject(model, ReLoRAConfig(rank=3, scaling_rule=rule, factors=factors))  # type: ignore[arg-type]
    x = torch.randn(5, 9)
    for restart_index in range(1, 6):
        train_factors_(model, seed=restart_index)
        before = model(x)
        report = merge_and_reinit_(model, seed=0, restart_index=restart_index)
        assert max_difference(model(x), before) <= 1e-5
        assert report.max_function_change <= 1e-6


def test_the_function_of_a_bfloat16_model_moves_by_half_a_unit_in_the_last_place_of_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 33)).bfloat16()
    inject(model, ReLoRAConfig(rank=24, scaling_rule="alpha/r"))
    train_factors_(model, std=0.02)
    x = torch.randn(50, 96).bfloat16()
    before, weights = model(x), {n: as_rows(m) + delta_of(m) for n, m in layers_of(model).items()}
    report = merge_and_reinit_(model, seed=0, restart_index=1)
    for name, layer in layers_of(model).items():
        change = np.abs(as_rows(layer) - weights[name])
        assert np.all(change <= BFLOAT16_HALF_ULP * np.abs(weights[name]))
        assert report.max_function_change >= change.max()
    # The stated bound for outputs: 2 % of their spread, of which bfloat16 activations alone make most.
    assert max_difference(model(x), before) <= 0.02 * float(before.detach().float().std())


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_new_factors_start_and_only_base_and_factors_change(kind: str) -> None:
    layer = injected(kind, 9, 7, rank=3, scaling_rule="learned", alpha=6.0)
    train_factors_(layer)
    with torch.no_grad():
        assert layer.lora_scaling is not None
        layer.lora_scaling.fill_(1.25)
    before, old_A = snapshot(layer), layer.lora_A.detach().clone()
    merge_and_reinit_(layer, seed=0, restart_index=1)
    assert layer.lora_B.count_nonzero() == 0
    assert not torch.isin(layer.lora_A, old_A).any() and layer.lora_A.count_nonzero() == layer.lora_A.numel()
    after = snapshot(layer)
    assert torch.equal(after["bias"], before["bias"])
    assert torch.equal(after["lora_scaling"], before["lora_scaling"])


def test_everything_survives_in_place() -> None:
    model = mlp()
    inject(model, R3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(torch.randn(5, 9)).sum().backward()
    optimizer.step()
    places = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    merge_and_reinit_(model, seed=0, restart_index=1)
    assert {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == places
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("context", ["inference_mode", "autocast", "default_dtype"])
def test_a_merge_does_not_depend_on_where_it_is_called(context: str) -> None:
    models = [mlp(), mlp()]
    for model in models:
        inject(model, ReLoRAConfig(rank=3, init="orthonormal"))
        train_factors_(model)
    merge_and_reinit_(models[0], seed=0, restart_index=1)
    if context == "inference_mode":
        with torch.inference_mode():
            merge_and_reinit_(models[1], seed=0, restart_index=1)
    elif context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            merge_and_reinit_(models[1], seed=0, restart_index=1)
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            merge_and_reinit_(models[1], seed=0, restart_index=1)
        finally:
            torch.set_default_dtype(torch.float32)
    assert same_bits(snapshot(models[0]), snapshot(models[1]))
    models[1](torch.randn(2, 9)).sum().backward()


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layers_are_merged_in_blocks_with_the_same_result(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    for entries in (1 << 22, 20, 1):
        monkeypatch.setattr(base_module, "_LEAST_BLOCK_ENTRIES", entries)
        monkeypatch.setattr(base_module, "_BLOCKS", 1 << 40)
        layer = LAYER_KINDS[kind](9, 7).to(dtype)
        inject(layer, R3)
        assert isinstance(layer, LoRALinear)
        train_factors_(layer)
        report = merge_and_reinit_(layer, seed=0, restart_index=1)
        layers.append((layer.weight.detach().float().numpy(), report.layers[0]))
    assert len(list(layer.row_blocks())) == 7
    for weight, report in layers[1:]:
        np.testing.assert_allclose(weight, layers[0][0], rtol=1e-6)
        assert report.delta_norm == pytest.approx(layers[0][1].delta_norm, rel=1e-12)
        assert report.max_abs_delta == pytest.approx(layers[0][1].max_abs_delta, rel=1e-12)


def test_decay_of_the_base_is_applied_with_its_merge() -> None:
    layer = injected("linear", 9, 7, rank=3)
    train_factors_(layer)
    wanted = 0.9 * as_rows(layer) + delta_of(layer)
    merge_([layer], keep=0.9)
    np.testing.assert_allclose(as_rows(layer), wanted, rtol=1e-6)


# --- rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(9, 11, 3), (40, 24, 5), (17, 23, 7)])
def test_rank_grows_with_restarts_and_stays_without(
    kind: str, in_features: int, out_features: int, rank: int
) -> None:
    layer = injected(kind, in_features, out_features, rank=rank)
    start = as_rows(layer).copy()
    for restarts in range(1, 7):
        train_factors_(layer, seed=restarts)
        merge_and_reinit_(layer, seed=0, restart_index=restarts)
        grown = low_rank.numerical_rank(as_rows(layer) - start, relative=1e-5)
        assert grown == min(restarts * rank, in_features, out_features)
    lora = injected(kind, in_features, out_features, rank=rank)
    start = as_rows(lora).copy()
    for step in range(6):
        train_factors_(lora, seed=step)
        assert low_rank.numerical_rank(as_rows(lora) + delta_of(lora) - start, relative=1e-5) == rank


# --- what a half-precision base keeps ----------------------------------------------------------------


def merged_sums(layer: LoRALinear, merges: int) -> tuple[low_rank.Array, float]:
    """Merge deltas of relative size 1e-3; return their float64 sum and the relative error of what is kept."""
    start = numpy64(layer.master_rows(slice(None))).copy()
    total = np.zeros_like(start)
    for restart_index in range(1, merges + 1):
        train_factors_(layer, seed=restart_index)
        with torch.no_grad():
            layer.lora_B.mul_(1e-3 * np.linalg.norm(start) / np.linalg.norm(delta_of(layer)))
        total += delta_of(layer)
        merge_and_reinit_(layer, seed=0, restart_index=restart_index)
    kept = numpy64(layer.master_rows(slice(None))) - start
    return total, float(np.linalg.norm(kept - total) / np.linalg.norm(total))


@pytest.mark.filterwarnings("ignore:merge_precision='native'")
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(96, 64, 24), (17, 23, 3)])
def test_twenty_small_merges_into_bfloat16_keep_what_native_rounds_away(
    kind: str, in_features: int, out_features: int, rank: int
) -> None:
    errors = {}
    for precision in ("float32", "native"):
        layer = LAYER_KINDS[kind](in_features, out_features).bfloat16()
        inject(layer, ReLoRAConfig(rank=rank, merge_precision=precision))  # type: ignore[arg-type]
        assert isinstance(layer, LoRALinear)
        _, errors[precision] = merged_sums(layer, 20)
    assert errors["float32"] < 1e-3
    assert errors["native"] > 0.3
    # What the forward pass sees is the nearest bfloat16 of what was kept.
    half = injected(kind, in_features, out_features, rank=rank).bfloat16()
    assert isinstance(half, LoRALinear)
    merged_sums(half, 5)
    kept = numpy64(half.master_rows(slice(None))).astype(np.float32)
    np.testing.assert_array_equal(as_rows(half), low_rank.nearest_bfloat16(kept))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 1e-3), (torch.float32, 1e-3), (torch.float64, 1e-12)]
)
def test_twenty_small_merges_into_other_dtypes_are_kept_too(dtype: torch.dtype, bound: float) -> None:
    layer = linear(96, 64).to(dtype)
    inject(layer, ReLoRAConfig(rank=24))
    assert isinstance(layer, LoRALinear)
    assert merged_sums(layer, 20)[1] < bound


@pytest.mark.filterwarnings("ignore:merge_precision='native'")
def test_native_merges_as_plain_bfloat16_arithmetic_does() -> None:
    layer = linear(17, 23).bfloat16()
    inject(layer, ReLoRAConfig(rank=3, merge_precision="native"))
    assert isinstance(layer, LoRALinear) and layer.weight_residual is None
    train_factors_(layer)
    wanted = low_rank.merge_in_bfloat16(as_rows(layer).astype(np.float32), delta_of(layer))
    report = merge_and_reinit_(layer, seed=0, restart_index=1)
    np.testing.assert_array_equal(as_rows(layer), wanted)
    assert report.relative_merge_error > 1e-3


# --- the report --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merge_precision='native'")
@pytest.mark.parametrize("precision", ["float32", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_measures_what_happened(dtype: torch.dtype, precision: str) -> None:
    model = mlp().to(dtype)
    inject(model, ReLoRAConfig(rank=3, merge_precision=precision))  # type: ignore[arg-type]
    train_factors_(model)
    with torch.no_grad():
        layers_of(model)["3"].lora_B.zero_()
    seen = {name: (as_rows(m), delta_of(m)) for name, m in layers_of(model).items()}
    report = merge_and_reinit_(model, seed=0, restart_index=1)
    assert [layer.name for layer in report.layers] == ["0", "3"]
    assert report.unmoved_layers == ("3",)
    for merged in report.layers:
        start, delta = seen[merged.name]
        layer = layers_of(model)[merged.name]
        assert merged.delta_norm == pytest.approx(np.linalg.norm(delta))
        assert merged.max_abs_delta == pytest.approx(np.abs(delta).max())
        change = np.abs(as_rows(layer) - (start + delta)).max()
        assert merged.max_function_change == pytest.approx(change, rel=1e-6, abs=1e-12)
        lost = numpy64(layer.master_rows(slice(None))) - (start + delta)
        error = np.linalg.norm(lost) / np.linalg.norm(delta) if delta.any() else 0.0
        assert merged.relative_merge_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert report.max_function_change == max(layer.max_function_change for layer in report.layers)
    assert report.relative_merge_error == max(layer.relative_merge_error for layer in report.layers)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "lora_scaling", "weight"])
def test_a_delta_that_is_not_finite_is_refused_with_every_weight_unchanged(leaf: str, value: float) -> None:
    model = mlp().bfloat16()
    inject(model, ReLoRAConfig(rank=3, scaling_rule="learned"))
    train_factors_(model)
    merge_and_reinit_(model, seed=0, restart_index=1)
    train_factors_(model)
    with torch.no_grad():
        layers_of(model)["3"].get_parameter(leaf).view(-1)[0] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"no weight was changed.* in 3\."):
        merge_and_reinit_(model, seed=0, restart_index=2)
    after = snapshot(model)
    untouched = [k for k in before if k not in (f"3.{leaf}", "3.weight_residual")]
    assert all(torch.equal(after[k], before[k]) for k in untouched)
    torch.testing.assert_close(after[f"3.{leaf}"], before[f"3.{leaf}"], rtol=0, atol=0, equal_nan=True)


def test_every_layer_that_is_not_finite_is_named() -> None:
    model = mlp()
    inject(model, R3)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="in 0, 3"):
        merge_and_reinit_(model, seed=0, restart_index=1)
    bare = injected("linear", 9, 7, rank=3)
    with torch.no_grad():
        bare.lora_B.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="in the layer"):
        merge_and_reinit_(bare, seed=0, restart_index=1)


def test_a_merge_that_would_overflow_float16_is_refused() -> None:
    layer = linear(9, 7).half()
    inject(layer, R3)
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    before = snapshot(layer)
    with pytest.raises(NonFiniteError):
        merge_and_reinit_(layer, seed=0, restart_index=1)
    assert same_bits(snapshot(layer), before)


def test_large_factors_whose_product_is_small_are_merged() -> None:
    # Beyond what the bound on the merged weight can tell: decided entry by entry.
    layer = linear(9, 7).half()
    inject(layer, R3)
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_B.fill_(1e-2)
        layer.lora_B[:, 0] = 1e6
        layer.lora_A[0] = 0
    wanted = layer.weight.double() + layer.delta()
    merge_and_reinit_(layer, seed=0, restart_index=1)
    torch.testing.assert_close(layer.master_rows(slice(None)).double(), wanted, rtol=1e-6, atol=1e-7)
