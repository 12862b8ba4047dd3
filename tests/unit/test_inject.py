"""inject and fold: what is wrapped, what trains, what the report says, and that fold gives it all back."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from method_samples import (
    LAYER_KINDS,
    TOWER_IDS,
    as_rows,
    conv1d,
    layers_of,
    linear,
    max_difference,
    mlp,
    numpy64,
    snapshot,
    structure,
    tower,
    train_factors_,
)
from reference import low_rank
from relora import (
    LoRALinear,
    NonFiniteError,
    ReLoRAConfig,
    fold,
    inject,
    lora_parameters,
    merge_and_reinit_,
)

R3 = ReLoRAConfig(rank=3, scaling_rule="alpha/r")
RULES = ("alpha/r", "rslora", "matched", "learned")


# --- what injection does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_outputs_are_bit_equal_after_injection(kind: str, dtype: torch.dtype) -> None:
    layer = LAYER_KINDS[kind](5, 7).to(dtype)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = layer(x)
    inject(layer, ReLoRAConfig(rank=2))
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factors", ["both", "B"])
def test_lora_B_gets_a_gradient_on_the_first_backward_of_every_cycle(rule: str, factors: str) -> None:
    model = tower()
    inject(model, ReLoRAConfig(rank=3, scaling_rule=rule, factors=factors))  # type: ignore[arg-type]
    for restart_index in (1, 2):
        model.zero_grad()
        model(TOWER_IDS).square().mean().backward()
        for name, layer in layers_of(model).items():
            assert layer.lora_B.grad is not None and layer.lora_B.grad.count_nonzero() > 0, name
            assert layer.weight.grad is None, name
        train_factors_(model)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)


def test_only_factors_and_what_trained_outside_the_targets_train() -> None:
    model = tower()
    model.norm.weight.requires_grad_(False)
    report = inject(model, ReLoRAConfig(rank=3, scaling_rule="learned"))
    factors = {name for name, _ in lora_parameters(model)}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {"blocks.0.up_proj.bias", "blocks.1.up_proj.bias", "down.bias"}
    outside = {"embed.weight", "norm.bias", "lm_head.weight", "experts.gate_up"}
    assert trains == factors | biases | outside
    assert set(report.full_rank) == biases | outside
    wrapped = ["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj", "down"]
    assert factors == {f"{n}.{leaf}" for n in wrapped for leaf in ("lora_A", "lora_B", "lora_scaling")}


def test_with_factors_B_lora_A_is_frozen() -> None:
    model = mlp()
    inject(model, ReLoRAConfig(rank=3, factors="B"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n} == {
        "0.lora_B",
        "3.lora_B",
    }
    assert {n for n, _ in lora_parameters(model)} == {"0.lora_A", "0.lora_B", "3.lora_A", "3.lora_B"}


def test_the_base_keeps_its_objects_and_names_and_factors_stand_beside_it() -> None:
    model = tower()
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    inject(model, R3)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("bare", [linear(5, 7), conv1d(5, 7)], ids=["linear", "conv1d"])
def test_the_model_may_be_the_layer_itself(bare: nn.Module) -> None:
    layer = copy.deepcopy(bare)
    report = inject(layer, R3)
    assert [name for name, _ in lora_parameters(layer)] == ["lora_A", "lora_B"]
    assert [w.name for w in report.wrapped] == [""]
    assert type(fold(layer)) is type(bare)


def test_hooks_of_a_wrapped_layer_survive_injection_and_fold() -> None:
    model = mlp()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    x = torch.randn(2, 9, requires_grad=True)
    for change in (lambda: inject(model, R3), lambda: fold(model)):
        change()
        calls.clear()
        model(x).sum().backward()
        assert calls == ["forward", "backward"]


def test_attributes_of_a_users_layer_come_back_at_fold() -> None:
    layer = linear(5, 7)
    layer.name, layer.config, layer.note = "mine", {"a": 1}, "kept"  # type: ignore[assignment]
    attributes = set(vars(layer))
    fold(inject(layer, R3) and layer)
    assert (layer.name, layer.config, layer.note) == ("mine", {"a": 1}, "kept")
    assert set(vars(layer)) == attributes


def test_a_copy_of_an_injected_model_is_independent_and_equal() -> None:
    model = mlp()
    inject(model, R3)
    train_factors_(model)
    x = torch.randn(4, 9)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = model(x)
    for other in copies:
        assert torch.equal(other(x), before)
        merge_and_reinit_(other, seed=0, restart_index=1)
        assert type(fold(other)[0]) is nn.Linear
    assert torch.equal(model(x), before) and isinstance(model[0], LoRALinear)


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_counts_and_names_everything() -> None:
    model = tower(tied=True)
    num_base = sum(p.numel() for p in model.parameters())
    report = inject(model, ReLoRAConfig(rank=3, alpha=6.0, exclude=("blocks.1.*",)))
    factors = {"blocks.0.q_proj": (8, 8), "blocks.0.up_proj": (8, 12), "down": (12, 8)}
    assert {w.name: (w.in_features, w.out_features) for w in report.wrapped} == factors
    assert {(w.rank, w.scaling) for w in report.wrapped} == {(3, 2.0)}
    assert report.num_base_parameters == num_base
    assert report.num_factor_parameters == sum(3 * (i + o) for i, o in factors.values())
    frozen = sum(i * o for i, o in factors.values())
    assert report.num_trainable_parameters == num_base - frozen + report.num_factor_parameters
    left = {w.name: (w.shape, w.reason) for w in report.left_alone}
    assert left == {
        "embed.weight": ((23, 8), "embedding"),
        "blocks.1.q_proj.weight": ((8, 8), "not among the targets"),
        "blocks.1.up_proj.weight": ((12, 8), "not among the targets"),
        "experts.gate_up": ((2, 8, 10), "ParameterDict is not a linear layer"),
    }
    assert "3 layers wrapped" in str(report) and "experts.gate_up [2, 8, 10]" in str(report)


def test_linear_layers_that_cannot_carry_factors_are_listed_with_the_reason() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Plus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = nn.Sequential()
    model.add_module("good", nn.Linear(8, 8))
    model.add_module("scaled", Scaled(8, 8))
    model.add_module("normed", nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model.add_module("shifted", nn.Linear(8, 8))
    nn.utils.parametrize.register_parametrization(model.shifted, "bias", Plus())
    model.add_module("patched", nn.Linear(8, 8))
    model.patched.forward = lambda x: x  # type: ignore[method-assign]
    model.add_module("scorer", Scorer())
    model.add_module("attention", nn.MultiheadAttention(8, 2))
    report = inject(model, R3)
    assert [w.name for w in report.wrapped] == ["good"]
    reasons = {w.name.split(".")[0]: w.reason for w in report.left_alone if "in_proj" not in w.name}
    assert "in its own way" in reasons["scaled"] and "in its own way" in reasons["patched"]
    assert "Parametrization" in reasons["normed"] and "parametrization" in reasons["shifted"]
    assert reasons["scorer"] == "Scorer is not a linear layer"
    assert "without calling it" in reasons["attention"]
    assert "attention.in_proj_weight" in {w.name for w in report.left_alone}


def test_a_subclass_with_nn_linears_own_forward_is_wrapped_and_given_back() -> None:
    class Named(nn.Linear):
        pass

    model = nn.Sequential(Named(8, 8))
    inject(model, R3)
    assert isinstance(model[0], LoRALinear)
    assert type(fold(model)[0]) is Named


# --- fold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factors", ["both", "B"])
def test_fold_keeps_the_function_and_gives_back_kinds_keys_and_what_trained(rule: str, factors: str) -> None:
    model = tower()
    model.blocks[0].q_proj.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = structure(model)
    keys = list(model.state_dict())
    inject(model, ReLoRAConfig(rank=3, scaling_rule=rule, factors=factors))  # type: ignore[arg-type]
    merge_and_reinit_(model, seed=0, restart_index=1)
    train_factors_(model)
    wanted = model(TOWER_IDS)
    assert fold(model) is model
    assert max_difference(model(TOWER_IDS), wanted) <= 1e-5
    assert structure(model) == before
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    inject(model, R3)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_fold_of_a_bfloat16_layer_rounds_the_sum_once(kind: str) -> None:
    layer = LAYER_KINDS[kind](9, 7).bfloat16()
    inject(layer, R3)
    assert isinstance(layer, LoRALinear)
    train_factors_(layer)
    base, delta = as_rows(layer), low_rank.delta(numpy64(layer.lora_A), numpy64(layer.lora_B), 1.0)
    fold(layer)
    np.testing.assert_array_equal(as_rows(layer), low_rank.merge_in_bfloat16(base.astype(np.float32), delta))


def test_fold_refuses_what_is_not_finite_and_leaves_the_model_injected() -> None:
    model = mlp()
    inject(model, R3)
    train_factors_(model)
    with torch.no_grad():
        layers_of(model)["3"].lora_B[2, 1] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"no weight was changed.*\b3\b"):
        fold(model)
    after = snapshot(model)
    assert all(torch.equal(after[k], before[k]) for k in before if not k.endswith("3.lora_B"))
    assert isinstance(model[0], LoRALinear)
