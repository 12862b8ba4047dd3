"""LoRALinear's state: checkpoints of plain and injected models, casts, moves, and edits behind its back."""

import copy

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from method_samples import (
    as_rows,
    conv1d,
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
from relora import ConfigError, LoRALinear, ReLoRAConfig, inject, lora_parameters, merge_and_reinit_
from relora.method.spectrum import function_weights

R3 = ReLoRAConfig(rank=3)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = [(source, target) for source in DTYPES for target in DTYPES]
HALVES = (torch.bfloat16, torch.float16)
# What one weight loses when it is stored: float32 is what a half-precision base's master holds.
STORED = {torch.float64: 0.0, torch.float32: 2**-24, torch.bfloat16: 2**-24, torch.float16: 2**-24}


def stack(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(linear(9, 11, seed=seed), nn.Tanh(), conv1d(11, 7, seed=seed + 1)).to(dtype)


def trained(dtype: torch.dtype = torch.float32, *, merges: int = 2, seed: int = 0) -> nn.Sequential:
    """Return an injected model in mid-cycle, some restarts in, so that residuals are not zero."""
    model = stack(dtype, seed=seed)
    inject(model, R3)
    for restart_index in range(1, merges + 1):
        train_factors_(model, seed=restart_index)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)
    train_factors_(model, seed=99)
    return model


def assert_same_function(left: nn.Module, right: nn.Module, *, relative: float) -> None:
    """Compare what the layers apply, base and delta, master included; `relative` to the largest weight."""
    wanted = function_weights(right)
    for name, weights in function_weights(left).items():
        bound = relative * float(wanted[name].abs().max())
        assert max_difference(weights, wanted[name]) <= bound, name


# --- checkpoints of the injected model ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_dict_gives_the_same_model_bit_for_bit(dtype: torch.dtype) -> None:
    model = trained(dtype)
    other = trained(dtype, merges=0, seed=5)
    other.load_state_dict(snapshot(model))
    assert same_bits(snapshot(other), snapshot(model))
    for each in (model, other):
        merge_and_reinit_(each, seed=0, restart_index=3)
    assert same_bits(snapshot(other), snapshot(model))


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("assign", [False, True])
def test_an_injected_checkpoint_of_any_dtype_loads_into_an_injected_model_of_any_other(
    source: torch.dtype, target: torch.dtype, assign: bool
) -> None:
    saved, model = trained(source), trained(target, merges=1, seed=5)
    model.load_state_dict(copy.deepcopy(saved.state_dict()), strict=True, assign=assign)
    narrowest = max(STORED[source], STORED[target])
    assert_same_function(model, saved, relative=4 * narrowest)
    report = merge_and_reinit_(model, seed=0, restart_index=3)
    assert report.relative_merge_error < 1e-4
    merge_and_reinit_(saved, seed=0, restart_index=3)
    assert_same_function(model, saved, relative=8 * narrowest)
    assert all(p.requires_grad for _, p in lora_parameters(model))
    if not assign:
        assert {layer.weight.dtype for layer in layers_of(model).values()} == {target}


def test_a_checkpoint_taken_on_a_restart_equals_one_taken_beside_it() -> None:
    model, other = trained(), trained(seed=5)
    merge_and_reinit_(model, seed=0, restart_index=3)
    other.load_state_dict(snapshot(model))
    x = torch.randn(4, 9)
    assert torch.equal(other(x), model(x))
    for each in (model, other):
        train_factors_(each, seed=7)
        merge_and_reinit_(each, seed=0, restart_index=4)
    assert same_bits(snapshot(other), snapshot(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_safetensors_file_holds_the_whole_state(dtype: torch.dtype) -> None:
    model, other = trained(dtype), trained(dtype, merges=1, seed=5)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())), assign=True)
    assert same_bits(snapshot(other), snapshot(model))
    for each in (model, other):
        merge_and_reinit_(each, seed=0, restart_index=3)
    assert same_bits(snapshot(other), snapshot(model))


# --- checkpoints of the plain model -------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_into_an_injected_model_and_brings_its_own_function(
    source: torch.dtype, target: torch.dtype, assign: bool
) -> None:
    plain, model = stack(source, seed=3), trained(target)
    lora_As = {name: layer.lora_A.detach().clone() for name, layer in layers_of(model).items()}
    model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True, assign=assign)
    assert_same_function(model, plain, relative=max(STORED[source], STORED[target]))
    for name, layer in layers_of(model).items():
        assert layer.lora_B.count_nonzero() == 0 and torch.equal(layer.lora_A, lora_As[name])
        assert layer.lora_A.requires_grad and not layer.weight.requires_grad
    if source == target:
        x = torch.randn(4, 9).to(target)
        assert torch.equal(model(x), plain(x))


def test_a_plain_checkpoint_of_some_layers_leaves_the_others_as_they_were() -> None:
    model = trained(torch.bfloat16)
    before = snapshot(model)
    plain = {k: v for k, v in stack(torch.bfloat16, seed=3).state_dict().items() if k.startswith("0.")}
    result = model.load_state_dict(plain, strict=False)
    after = snapshot(model)
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("2."))
    assert {k for k in result.missing_keys if "lora" in k} == {"2.lora_A", "2.lora_B"}
    assert not result.unexpected_keys
    assert torch.equal(after["0.weight"], plain["0.weight"])
    assert after["0.lora_B"].count_nonzero() == 0 and after["0.weight_residual"].count_nonzero() == 0


def test_a_users_state_dict_is_not_changed_by_loading_it() -> None:
    plain = stack().state_dict()
    keys = list(plain)
    trained(torch.bfloat16).load_state_dict(plain)
    assert list(plain) == keys
    layer = linear(9, 11)
    plain_layer = dict(layer.state_dict())
    inject(layer, R3)
    layer.load_state_dict(plain_layer)
    assert set(plain_layer) == {"weight", "bias"}


def test_a_checkpoint_of_another_shape_is_refused_by_torch_and_the_factors_stay() -> None:
    model = trained()
    before = snapshot(model)
    wrong = snapshot(model) | {"0.weight": torch.zeros(11, 10)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(wrong)
    assert same_bits(snapshot(model), before)


def test_an_injected_checkpoint_does_not_load_into_a_plain_model_unnoticed() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*0\.lora_A.*0\.lora_B"):
        stack().load_state_dict(trained().state_dict())


# --- casts and moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cast_keeps_the_function_the_factors_and_the_way_back(
    source: torch.dtype, target: torch.dtype
) -> None:
    model = trained(source)
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 9)
    model.to(target)
    assert_same_function(model, before, relative=STORED[target])
    assert model(x.to(target)).dtype == target
    wide = torch.float64 if target == torch.float64 else torch.float32
    for layer in layers_of(model).values():
        assert layer.weight.dtype == target
        assert {layer.lora_A.dtype, layer.lora_B.dtype} == {wide}
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.to(source)
    assert_same_function(model, before, relative=max(STORED[source], STORED[target]))
    train_factors_(model, seed=3)
    assert merge_and_reinit_(model, seed=0, restart_index=3).relative_merge_error < 1e-4


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_to_the_dtype_a_model_has_changes_nothing(dtype: torch.dtype) -> None:
    model = trained(dtype)
    before = snapshot(model)
    model.to(dtype)
    assert same_bits(snapshot(model), before)


def test_casting_after_injection_is_injecting_after_the_cast() -> None:
    first, second = stack().bfloat16(), stack()
    inject(first, R3)
    inject(second, R3)
    second.bfloat16()
    second.load_state_dict(first.state_dict())
    assert same_bits(snapshot(first), snapshot(second))


def test_gradients_of_the_factors_follow_their_dtype() -> None:
    model = trained()
    model(torch.randn(4, 9)).sum().backward()
    for target in (torch.bfloat16, torch.float64, torch.float16):
        model.to(target)
        for name, parameter in lora_parameters(model):
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
        model(torch.randn(4, 9).to(target)).sum().backward()


def test_training_goes_on_after_a_cast() -> None:
    model = trained()
    optimizer = torch.optim.AdamW((p for _, p in lora_parameters(model)), lr=1e-4, weight_decay=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        before = [layer.lora_B.detach().clone() for layer in layers_of(model).values()]
        model(torch.randn(4, 9).to(dtype)).square().mean().backward()
        optimizer.step()
        for old, layer in zip(before, layers_of(model).values(), strict=True):
            # lr 1e-4 on values of 0.1 is lost in bfloat16 factors, not in float32 ones.
            assert 1e-5 < max_difference(layer.lora_B, old) < 2e-4


def test_a_dtype_no_merge_can_write_is_refused_before_the_layer_is_cast() -> None:
    layer = linear(9, 7)
    inject(layer, R3)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="cannot be merged into"):
        layer.to(torch.float8_e4m3fn)
    assert same_bits(snapshot(layer), before)


# --- edits behind the residual's back -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reader", ["merge", "cast", "checkpoint"])
def test_a_weight_written_by_somebody_else_is_right_and_its_residual_forgotten(
    dtype: torch.dtype, reader: str
) -> None:
    model = trained(dtype, merges=3)
    layer = layers_of(model)["0"]
    assert layer.weight_residual is not None and layer.weight_residual.count_nonzero() > 0
    with torch.no_grad():
        layer.weight.mul_(2**-10)
    edited = as_rows(layer)
    scaling = layer.scaling
    assert isinstance(scaling, float)
    delta = low_rank.delta(numpy64(layer.lora_A), numpy64(layer.lora_B), scaling)
    if reader == "merge":
        merge_and_reinit_(model, seed=0, restart_index=4)
        wanted = edited + delta
    elif reader == "cast":
        model.float()
        wanted = edited + delta
    else:
        saved = snapshot(model)
        model = trained(torch.float32)
        model.load_state_dict(saved)
        wanted = edited + delta
    got = function_weights(model)["0"]
    assert max_difference(got, torch.from_numpy(wanted)) <= 2**-22 * abs(wanted).max()


def test_a_loop_that_loads_weights_and_never_restarts_is_not_stale() -> None:
    model = mlp().bfloat16()
    inject(model, R3)
    train_factors_(model)
    merge_and_reinit_(model, seed=0, restart_index=1)
    fresh = mlp(seed=4).bfloat16()
    model.load_state_dict(fresh.state_dict())
    x = torch.randn(4, 9).bfloat16()
    assert torch.equal(model(x), fresh(x))
    assert_same_function(model, fresh, relative=0.0)


def test_the_residual_travels_only_with_half_precision() -> None:
    def keys(dtype: torch.dtype) -> set[str]:
        return {k for k in trained(dtype).state_dict() if k.endswith("residual")}

    assert keys(torch.float32) == keys(torch.float64) == set()
    assert keys(torch.bfloat16) == keys(torch.float16) == {"0.weight_residual", "2.weight_residual"}


def test_a_layers_buffers_and_parameters_are_all_in_its_state_dict() -> None:
    layer = linear(9, 7).bfloat16()
    inject(layer, ReLoRAConfig(rank=3, scaling_rule="learned"))
    assert isinstance(layer, LoRALinear)
    state: dict[str, Tensor] = layer.state_dict()
    assert set(state) == {"weight", "bias", "lora_A", "lora_B", "lora_scaling", "weight_residual"}


COLUMNS = ReLoRAConfig(rank=3, factors="B", init="columns")


def injected(config: ReLoRAConfig, *, seed: int = 0) -> LoRALinear:
    layer = linear(9, 11)
    inject(layer, config, seed=seed)
    assert isinstance(layer, LoRALinear)
    return layer


def test_rows_that_select_no_input_are_refused_where_they_are_taken_to() -> None:
    source, target = injected(ReLoRAConfig(rank=3, factors="B")), injected(COLUMNS)
    rows = target.lora_A.detach().clone()
    with pytest.raises(RuntimeError, match="lora_A is of another init"):
        target.load_state_dict(source.state_dict())
    assert torch.equal(target.lora_A, rows)
    other = injected(COLUMNS, seed=5)
    target.load_state_dict(other.state_dict())
    assert target.selected is not None and torch.equal(target.selected, other.lora_A.argmax(1))


def test_a_merge_refuses_rows_that_were_written_to_behind_the_forward_pass() -> None:
    layer = injected(COLUMNS)
    train_factors_(layer)
    with torch.no_grad():
        layer.lora_A[0, :2] = 0.5
    before = layer.weight.detach().clone()
    with pytest.raises(ConfigError, match="no weight was changed: lora_A was written to"):
        merge_and_reinit_(layer, seed=0, restart_index=1)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("tokens", [3, 300])
def test_rows_that_somebody_trains_get_their_gradient(tokens: int) -> None:
    layer = injected(COLUMNS)
    train_factors_(layer)
    layer.lora_A.requires_grad_()
    layer(torch.randn(tokens, 9)).square().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.count_nonzero() == layer.lora_A.numel()
