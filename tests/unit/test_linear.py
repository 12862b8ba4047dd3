"""LoRALinear: its forward against a float64 reference, its step size, and what it keeps for the backward."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from method_samples import LAYER_KINDS, as_rows, layers_of, linear, max_difference, numpy64, train_factors_
from reference import low_rank
from relora import LoRALinear, ReLoRAConfig, inject, merge_and_reinit_

RULES = ("alpha/r", "rslora", "matched", "learned")
SHAPES = [(5, 7, 3), (7, 5, 4), (2, 40, 1), (96, 64, 24)]  # in, out, rank


def injected(kind: str, in_features: int, out_features: int, config: ReLoRAConfig) -> LoRALinear:
    layer = LAYER_KINDS[kind](in_features, out_features)
    inject(layer, config)
    assert isinstance(layer, LoRALinear)
    return layer


def rows_and_factors(layer: LoRALinear) -> tuple[low_rank.Array, low_rank.Array, low_rank.Array, float]:
    """Return weight (out, in), lora_A, lora_B and the scaling as numbers, for the reference."""
    scaling = layer.scaling.item() if isinstance(layer.scaling, Tensor) else layer.scaling
    return as_rows(layer), numpy64(layer.lora_A), numpy64(layer.lora_B), scaling


def reference_output(layer: LoRALinear, x: Tensor) -> Tensor:
    weight, lora_a, lora_b, scaling = rows_and_factors(layer)
    bias = None if layer.bias is None else numpy64(layer.bias)
    return torch.from_numpy(low_rank.forward(numpy64(x), weight, bias, lora_a, lora_b, scaling))


# --- forward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SHAPES)
def test_forward_is_base_plus_delta(
    kind: str, in_features: int, out_features: int, rank: int, rule: str
) -> None:
    config = ReLoRAConfig(rank=rank, alpha=None if rule == "matched" else 5.0, scaling_rule=rule)  # type: ignore[arg-type]
    layer = injected(kind, in_features, out_features, config).double()
    train_factors_(layer)
    for shape in ((in_features,), (4, in_features), (2, 7, in_features), (2, 0, in_features)):
        x = torch.randn(shape, dtype=torch.float64)
        # float64 throughout: what differs is the order of summation.
        torch.testing.assert_close(layer(x), reference_output(layer, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("rule", "alpha", "wanted"),
    [
        ("alpha/r", None, 1.0),
        ("auto", 32.0, 32 / 4),
        ("auto", None, math.sqrt(9 / 4)),  # "matched" with orthonormal rows
        ("alpha/r", 32.0, 32 / 4),
        ("rslora", 32.0, 32 / math.sqrt(4)),
        ("rslora", None, 1.0),
        ("learned", 2.0, 2 / 4),
        ("learned", None, 1.0),
    ],
)
def test_scaling_follows_its_rule(rule: str, alpha: float | None, wanted: float) -> None:
    layer = injected("linear", 9, 7, ReLoRAConfig(rank=4, alpha=alpha, scaling_rule=rule))  # type: ignore[arg-type]
    scaling = rows_and_factors(layer)[3]
    assert scaling == wanted
    assert (layer.lora_scaling is not None) == (rule == "learned")


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_matched_scaling_is_the_formula_of_the_design(kind: str) -> None:
    def scaling(**changes: object) -> float:
        config = ReLoRAConfig(rank=4, scaling_rule="matched", **changes)  # type: ignore[arg-type]
        return rows_and_factors(injected(kind, 36, 7, config))[3]

    assert scaling(factors="B") == pytest.approx(math.sqrt(36 / 4))
    assert scaling(init="orthonormal") == pytest.approx(math.sqrt(36 / 4))
    assert scaling(init="kaiming") == pytest.approx(math.sqrt(3 * 36 / 4))
    assert scaling(factors="B", kappa=0.5) == pytest.approx(0.5 * math.sqrt(36 / 4))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_delta_is_scaling_times_the_product_in_float64(kind: str) -> None:
    layer = injected(kind, 9, 7, ReLoRAConfig(rank=3, alpha=2.0))
    train_factors_(layer)
    _, lora_a, lora_b, scaling = rows_and_factors(layer)
    wanted = low_rank.delta(lora_a, lora_b, scaling)
    with torch.autocast("cpu", torch.bfloat16):
        delta = layer.delta()
    assert delta.dtype == torch.float64 and not delta.requires_grad
    np.testing.assert_allclose(delta.numpy(), wanted, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(layer.delta(slice(2, 5)).numpy(), delta[2:5].numpy())


def test_dropout_touches_the_low_rank_branch_only_and_only_in_training() -> None:
    layer = injected("linear", 40, 30, ReLoRAConfig(rank=3, dropout=0.5))
    x = torch.randn(5, 40)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    train_factors_(layer)
    assert max_difference(layer(x), layer(x)) > 0
    many = torch.stack([layer(x) for _ in range(2000)]).mean(0) - plain
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    without = layer(x) - plain
    # Inverted dropout keeps the mean: 2000 draws leave about 2 % of noise.
    assert max_difference(many, without) < 0.1 * float(without.detach().abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_a_base_of_any_dtype_takes_and_gives_its_own_dtype(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer = LAYER_KINDS[kind](96, 64).to(dtype)
    inject(layer, ReLoRAConfig(rank=24))
    assert isinstance(layer, LoRALinear)
    train_factors_(layer)
    assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(2, 7, 96).to(dtype)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == dtype
    wanted = reference_output(layer, x)
    assert max_difference(out, wanted) <= tolerance * float(wanted.abs().max())
    assert layer.lora_B.grad is not None and layer.lora_B.grad.dtype == layer.lora_B.dtype


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_autocast_computes_in_bfloat16_and_trains_in_float32(kind: str) -> None:
    layer = injected(kind, 96, 64, ReLoRAConfig(rank=24, scaling_rule="learned", alpha=6.0))
    train_factors_(layer)
    x = torch.randn(2, 7, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().mean().backward()
    wanted = reference_output(layer, x)
    assert out.dtype == torch.bfloat16
    assert max_difference(out, wanted) <= 2**-6 * float(wanted.abs().max())
    for parameter in (layer.lora_A, layer.lora_B, layer.lora_scaling):
        assert parameter is not None and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_a_weight_that_is_not_contiguous_works_like_another() -> None:
    layer = linear(9, 7)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    inject(layer, ReLoRAConfig(rank=3))
    train_factors_(layer)
    x = torch.randn(4, 9)
    before = layer(x)
    merge_and_reinit_(layer, seed=0, restart_index=1)
    assert max_difference(layer(x), before) <= 1e-6
    layer.bfloat16()
    assert layer(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("factors", ["both", "B"])
def test_gradient_checkpointing_gives_the_same_gradients(factors: str, use_reentrant: bool) -> None:
    layer = injected("linear", 9, 7, ReLoRAConfig(rank=3, factors=factors))  # type: ignore[arg-type]
    train_factors_(layer)
    x = torch.randn(4, 9, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for name, gradient in wanted.items():
        assert torch.equal(layer.get_parameter(name).grad, gradient), name  # type: ignore[arg-type]


def test_it_is_called_as_nn_linear_is() -> None:
    layer = injected("linear", 9, 7, ReLoRAConfig(rank=3))
    x = torch.randn(4, 9)
    assert torch.equal(layer(input=x), layer(x))
    assert (layer.in_features, layer.out_features) == (9, 7)


def test_repr_shows_shape_rank_and_scaling() -> None:
    text = repr(injected("conv1d", 9, 7, ReLoRAConfig(rank=3, alpha=6.0, factors="B")))
    assert "in_features=9, out_features=7, bias=True, rank=3, scaling=2, factors='B'" in text


# --- matched steps -----------------------------------------------------------------------------------


def step_rms(layer: nn.Module, weight_of: Callable[[], low_rank.Array], lr: float) -> float:
    """Take one Adam step on a dense random gradient; return the RMS of the change of the weight."""
    x = torch.randn(64, 96)[:, : as_rows(layer).shape[1]]
    wanted = torch.randn(64, as_rows(layer).shape[0])
    before = weight_of()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
    (layer(x) * wanted).sum().backward()
    optimizer.step()
    return low_rank.rms(weight_of() - before)


def function_rows(layer: LoRALinear) -> low_rank.Array:
    weight, lora_a, lora_b, scaling = rows_and_factors(layer)
    return weight + low_rank.delta(lora_a, lora_b, scaling)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(
    ("in_features", "out_features", "rank"),
    [(5, 7, 1), (5, 7, 4), (7, 5, 3), (96, 33, 1), (96, 33, 8), (96, 64, 48), (96, 128, 95), (40, 96, 39)],
)
def test_one_sided_matched_step_moves_the_weight_as_full_rank_adam_does(
    kind: str, in_features: int, out_features: int, rank: int
) -> None:
    lr = 1e-3
    plain = LAYER_KINDS[kind](in_features, out_features)
    full_rank = step_rms(plain, lambda: as_rows(plain), lr)
    assert full_rank == pytest.approx(lr, rel=1e-3)
    for kappa in (1.0, 0.5):
        config = ReLoRAConfig(rank=rank, factors="B", scaling_rule="matched", kappa=kappa)
        layer = injected(kind, in_features, out_features, config)
        low_rank_step = step_rms(layer, partial(function_rows, layer), lr)
        assert low_rank_step == pytest.approx(kappa * full_rank, rel=0.02)


def test_kaiming_matched_step_is_right_where_the_rank_is_small_beside_the_width() -> None:
    # Rows that are not orthogonal add up: for gradients in general position the RMS grows by a factor
    # sqrt(1 + (rank - 1) * 2 / (pi * in_features)), 0.2 % here, and the draw itself varies by 0.5 %.
    torch.manual_seed(0)
    layer = linear(1024, 64)
    inject(layer, ReLoRAConfig(rank=8, init="kaiming", scaling_rule="matched"))
    assert isinstance(layer, LoRALinear)
    before = function_rows(layer)
    optimizer = torch.optim.Adam([layer.lora_B], lr=1e-3)
    (layer(torch.randn(32, 1024)) * torch.randn(32, 64)).sum().backward()
    optimizer.step()
    assert low_rank.rms(function_rows(layer) - before) == pytest.approx(1e-3, rel=0.02)


def test_adam_first_step_is_the_references() -> None:
    layer = injected("linear", 9, 7, ReLoRAConfig(rank=3, factors="B", scaling_rule="matched"))
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    layer(torch.randn(5, 9)).square().sum().backward()
    gradient = layer.lora_B.grad
    assert gradient is not None
    wanted = low_rank.adam_first_step(numpy64(gradient), lr=0.01)
    optimizer.step()
    np.testing.assert_allclose(numpy64(layer.lora_B), wanted, rtol=1e-5)


# --- one-sided training ------------------------------------------------------------------------------


def saved_activations(layer: LoRALinear, rows: int, *, dtype: torch.dtype | None) -> list[tuple[int, int]]:
    """Run forward and backward; return (width, bytes) of every activation kept, seen as (rows, width)."""
    kept: dict[tuple[int, torch.Size], Tensor] = {}
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[(tensor.data_ptr(), tensor.shape)] = tensor
        return tensor

    x = torch.randn(rows, layer.in_features, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = layer(x)
        out.sum().backward()
    activations = [t for t in kept.values() if t.ndim and t.shape[0] == rows]
    return sorted((t.numel() // rows, t.numel() * t.element_size()) for t in activations)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("path", ["factored", "effective"])
def test_a_frozen_lora_A_leaves_rank_wide_activations_for_the_backward(
    kind: str, dtype: torch.dtype | None, path: Literal["factored", "effective"]
) -> None:
    rows, rank, width = 31, 3, 40
    size = 4 if dtype is None else 2
    both = ReLoRAConfig(rank=rank, scaling_rule="matched", forward=path)
    one_sided = dataclasses.replace(both, factors="B")
    low, full = (rank, rows * rank * size), (width, rows * width * size)
    assert saved_activations(injected(kind, width, 24, one_sided), rows, dtype=dtype) == [low]
    wanted = [full] if path == "effective" else [low, full]
    assert saved_activations(injected(kind, width, 24, both), rows, dtype=dtype) == wanted


@pytest.mark.parametrize("rule", ["matched", "alpha/r"])
def test_one_sided_training_gives_gradient_and_state_to_lora_B_alone(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 11, bias=False), nn.Tanh(), nn.Linear(11, 7, bias=False))
    inject(model, ReLoRAConfig(rank=3, factors="B", scaling_rule=rule))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.endswith("lora_B")}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in optimizer.state} == {"0.lora_B", "2.lora_B"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.lora_B", "2.lora_B"}
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
    assert all(layer.lora_B.count_nonzero() > 0 for layer in layers_of(model).values())


# --- compiled ----------------------------------------------------------------------------------------


def test_a_compiled_model_is_not_compiled_again_after_a_restart() -> None:
    num_graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(linear(9, 11), nn.Tanh(), linear(11, 7)).bfloat16()
    inject(model, ReLoRAConfig(rank=3, scaling_rule="learned"))
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    x = torch.randn(4, 9).bfloat16()
    compiled(x).sum().backward()
    assert num_graphs == 1
    for restart_index in (1, 2, 3):
        train_factors_(model, seed=restart_index)
        report = merge_and_reinit_(compiled, seed=0, restart_index=restart_index)
        assert not report.unmoved_layers
        train_factors_(model, seed=-restart_index)
        out = compiled(x)
        out.sum().backward()
        assert torch.equal(out, model(x))
    assert num_graphs == 1
