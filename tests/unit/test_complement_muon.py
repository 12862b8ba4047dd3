"""residual="muon": a momentum of the complement that lasts, is orthogonalised, and is accounted for."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loops import Loop, differing, tiny_model
from method_samples import LAYER_KINDS, Branches, as_rows, linear, mlp, numpy64
from reference.beyond import SplitMuon, newton_schulz
from relora import ConfigError, ReLoRAConfig, fold, inject
from relora.method.residuals import RESIDUALS, Pass, orthogonalised, rounded_at_random

CONFIG = ReLoRAConfig(
    rank=3, factors="B", residual="muon", scaling_rule="matched", reset="none", restart_every=100
)
LR = 1e-2


def momenta(loop):
    return {name: getattr(loop.model, name).weight_momentum for name in ("up", "down")}


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("init", ["orthonormal", "columns"])
@pytest.mark.parametrize("parts", [1, 4])
def test_adam_in_the_subspace_and_muon_outside_is_the_split_optimizer(kind, init, parts):
    torch.manual_seed(0)
    model = nn.Sequential(LAYER_KINDS[kind](13, 6)).double()
    weight = as_rows(model[0]).copy()
    config = replace(CONFIG, residual_scale=0.7, init=init)
    loop = Loop(config, model, lambda m: torch.optim.AdamW([m[0].lora_B], lr=LR, weight_decay=0.0))
    layer, target = loop.model[0], torch.randn(6, 13, dtype=torch.float64)
    assert layer.weight_momentum.dtype == torch.float64
    reference = SplitMuon(weight, numpy64(layer.lora_A), betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 9):
        x = torch.randn(20, 13, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loop.optimizers[0].zero_grad()
        for part in x.chunk(parts):
            ((loop.model(part) - layer.bias - part @ target.T).square().sum() / 2).backward()
        loop.optimizers[0].step()
        loop.relora.after_step(step)
        error = numpy64(x) @ (reference.weight - numpy64(target)).T
        reference.step(error.T @ numpy64(x), lr=LR, scaling=math.sqrt(13 / 3), rest_lr=0.7 * LR, decay=0.9)
        # Rows drawn in float32 are orthonormal to its precision; those that select inputs are exactly so.
        atol = 1e-9 if init == "columns" else 1e-6
        np.testing.assert_allclose(as_rows(layer) + numpy64(layer.delta()), reference.weight, atol=atol)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (24, 24), (1, 9)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape, size):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = orthogonalised(matrix.float() * size)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(numpy64(found), newton_schulz(numpy64(matrix.float())), atol=1e-4)
    u, s, vh = np.linalg.svd(numpy64(matrix), full_matrices=False)
    inner = u.T @ numpy64(found) @ vh.T
    large = s > 0.1 * s[0]
    assert np.abs(np.diag(inner)[large] - 1).max() < 0.35
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-4


def test_a_momentum_of_zeros_moves_nothing():
    assert not orthogonalised(torch.zeros(4, 6, dtype=torch.bfloat16)).any()


def test_what_a_step_does_is_reported_with_its_costs():
    loop = Loop(CONFIG)
    before = numpy64(loop.model.up.weight)
    with FlopCounterMode(display=False) as counter:
        loop.run(1, 1)
        seen = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loop.update(2)
    iterations = seen - counter.get_total_flops()
    report = loop.relora.complement_report
    change = numpy64(loop.model.up.weight) - before
    (up, down) = report.layers
    assert int(up.moved) == (change != 0).sum() == change.size
    assert float(up.square) == pytest.approx((change**2).sum(), rel=1e-5)
    # Singular values between 0.68 and 1.13, of at most 7 minus 3 directions: the complement of three rows.
    assert 0.6 * 0.2 * LR * math.sqrt(4 / 7) < np.sqrt((change**2).mean()) < 1.2 * 0.2 * LR
    assert (up.held_bytes, down.held_bytes) == (2 * 11 * 7, 2 * 9 * 11)
    projections = 2 * 4 * 3 * (77 + 99)  # of the momentum, and of what comes of it
    assert iterations - projections == sum(RESIDUALS["muon"].flops(*shape) for shape in ((11, 7), (9, 11)))
    assert report.flops == iterations + sum(16 * 2 * n + 4 * n * 3 for n in (77, 99))
    assert report.as_dict()["num_forgotten"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"residual_layers": 1}, {"init": "columns", "reset": "transport"}])
def test_resumed_in_mid_cycle_is_bit_equal(dtype, changes):
    config = replace(CONFIG, restart_every=4, **changes)
    whole = Loop(config, tiny_model(dtype))
    saved = {}
    for step in range(1, 11):
        whole.run(step, step)
        saved[step] = whole.state()
    expected = whole.everything()
    assert expected["up.weight_momentum"].any()
    for step in (2, 4, 7):
        for is_model_first in (True, False):
            resumed = Loop(config, tiny_model(dtype))
            resumed.load(saved[step], is_model_first=is_model_first)
            resumed.run(step + 1, 10)
            assert differing(expected, resumed.everything()) == [], step


def test_counters_loaded_after_a_backward_pass_leave_the_loaded_momentum_alone():
    """A loop that rolls back loads model and counters over a step that it has begun."""
    config = replace(CONFIG, restart_every=4)
    loop = Loop(config)
    loop.run(1, 5)
    saved = loop.state()
    loop.run(6, 8)
    expected = loop.everything()
    loop.loss(77).backward()
    loop.load(saved)
    loop.run(6, 8)
    assert differing(expected, loop.everything()) == []
    assert loop.relora.complement_report.num_forgotten == 0


@pytest.mark.parametrize("gives_up", ["discard_step", "after_step"])
def test_a_step_that_is_not_taken_costs_the_momentum_and_says_so(gives_up):
    loop = Loop(CONFIG)
    loop.run(1, 3)
    before = {name: getattr(loop.model, name).weight.clone() for name in ("up", "down")}
    loop.loss(77).backward()
    if gives_up == "discard_step":
        loop.relora.discard_step()
    else:
        loop.relora.after_step(4, was_taken=False)
    assert all(torch.equal(getattr(loop.model, name).weight, value) for name, value in before.items())
    assert not any(momentum.any() for momentum in momenta(loop).values())
    step = 4 if gives_up == "discard_step" else 5
    loop.run(step, step)
    assert loop.relora.complement_report.num_forgotten == 2
    loop.run(step + 1, step + 1)
    assert loop.relora.complement_report.num_forgotten == 0


def test_a_step_that_is_given_up_before_anything_was_seen_costs_nothing():
    loop = Loop(CONFIG)
    loop.run(1, 3)
    kept = {name: momentum.clone() for name, momentum in momenta(loop).items()}
    loop.relora.discard_step()
    assert all(torch.equal(kept[name], momentum) for name, momentum in momenta(loop).items())
    assert all(momentum.any() for momentum in kept.values())


def test_a_layer_that_no_backward_reached_stays_whatever_its_momentum_says():
    loop = Loop(CONFIG, Branches())
    with torch.no_grad():
        loop.model.idle.weight_momentum.fill_(1.0)
    idle = loop.model.idle.weight.detach().clone()
    loop.run(1, 2)
    assert loop.relora.complement_report.without_backward == ("idle",)
    assert torch.equal(loop.model.idle.weight, idle)
    assert loop.model.idle.weight_momentum[0, 0].item() == pytest.approx(0.81, rel=0.01)


def test_what_many_micro_batches_add_is_not_rounded_away():
    """Each of 128 adds less than the last bit of the mean, which would stop at 0.3 of the gradient."""
    passes = 128
    muon, held = RESIDUALS["muon"], torch.zeros(64, 64, dtype=torch.bfloat16)
    gradient = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        muon.begin_(held, 1)
        for before in range(passes):
            muon.add_(held, gradient / passes, Pass(num_before=before, world_size=1, generator=generator))
    slope = float((held.float() * gradient).sum() / gradient.square().sum())
    assert slope == pytest.approx(1 - 0.9**50, abs=0.01)
    assert float((held - gradient).square().mean().sqrt()) < 0.06 * float(gradient.square().mean().sqrt())


def test_rounding_at_random_keeps_what_bf16_has_and_the_mean_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, -3.0e38]).to(torch.bfloat16).repeat(1000, 1)
    assert torch.equal(rounded_at_random(exact.float(), generator), exact)
    between = torch.tensor([1 + 2**-9, -(1 + 2**-10), 3.3e-5]).repeat(20000, 1)
    found = rounded_at_random(between, generator).double()
    assert all(len(column.unique()) == 2 for column in found.T)
    np.testing.assert_allclose(found.mean(0), between[0].double(), rtol=1e-4)


def test_a_graph_of_a_step_that_is_over_adds_nothing():
    loop = Loop(CONFIG)
    loop.run(1, 2)
    late = loop.loss(3)
    loop.relora.discard_step()
    before = {name: momentum.clone() for name, momentum in momenta(loop).items()}
    late.backward()
    assert all(torch.equal(before[name], momentum) for name, momentum in momenta(loop).items())


def test_a_momentum_that_is_not_finite_is_healed_and_counted():
    loop = Loop(CONFIG)
    loop.run(1, 2)
    loop.model.up.weight_momentum[3, 4] = math.nan
    loop.run(3, 3)
    assert loop.relora.complement_report.num_non_finite == 1
    assert loop.model.up.weight.isfinite().all() and loop.model.up.weight_momentum.isfinite().all()


def test_a_step_under_autocast_is_the_step_without():
    inside, outside = Loop(CONFIG), Loop(CONFIG)
    for loop in (inside, outside):
        loop.update(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside.relora.after_step(1)
    outside.relora.after_step(1)
    assert differing(inside.everything(), outside.everything()) == []


def test_entries_that_are_not_finite_do_not_enter_the_momentum():
    loop = Loop(CONFIG)
    loop.run(1, 2)
    loop.loss(3).backward()
    momentum = loop.model.up.weight_momentum
    before = momentum.clone()
    bad = torch.zeros(2, 11)
    bad[:, 4], bad[:, 5] = math.inf, math.nan
    loop.model.up.observers[0].observe(torch.ones(2, 7), bad)
    assert torch.equal(momentum, before)
    loop.optimizers[0].step()
    loop.relora.after_step(3)
    assert loop.relora.complement_report.num_non_finite == 14
    assert loop.model.up.weight.isfinite().all()


def with_momentum():
    model = mlp()
    inject(model, CONFIG)
    for module in (model[0], model[3]):
        module.weight_momentum.normal_(generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_enters_the_rows_of_the_factors(dtype):
    """Though the momentum holds them since the cycle before."""
    loop = Loop(replace(CONFIG, restart_every=3), tiny_model(dtype))
    loop.run(1, 3)
    for step in (4, 5):
        before = loop.model.up.master_rows(slice(None)).double().clone()
        loop.run(step, step)
        moved = loop.model.up.master_rows(slice(None)).double() - before
        inside = moved @ loop.model.up.lora_A.double().T
        assert (loop.model.up.weight_momentum.double() @ loop.model.up.lora_A.double().T).norm() > 0.01
        assert inside.norm() < 1e-4 * moved.norm()


def test_only_layers_of_this_residual_have_a_momentum():
    model = mlp()
    inject(model, replace(CONFIG, residual="sign"))
    assert model[0].weight_momentum is None
    assert not any("momentum" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_leaves_it_as_it_is(dtype):
    model = with_momentum()
    before = model[0].weight_momentum.clone()
    model.to(dtype)
    assert model[0].weight_momentum.dtype == torch.bfloat16
    assert torch.equal(model[0].weight_momentum, before)


def test_copies_have_their_own_and_fold_leaves_none():
    model = with_momentum()
    twin = copy.deepcopy(model)
    twin[0].weight_momentum.zero_()
    assert model[0].weight_momentum.any()
    plain = fold(model)
    assert type(plain[0]) is nn.Linear and not any("momentum" in name for name in plain.state_dict())
    assert not hasattr(plain[0], "weight_momentum")


def test_a_plain_checkpoint_begins_it_anew_and_one_without_it_is_refused():
    model, plain = with_momentum(), mlp(seed=3)
    model.load_state_dict(plain.state_dict())
    assert not model[0].weight_momentum.any()
    other = mlp()
    inject(other, replace(CONFIG, residual="sign"))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_momentum"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_momentum"):
        other.load_state_dict(model.state_dict())


def test_injected_on_the_meta_device_it_begins_with_zeros():
    with torch.device("meta"):
        model = nn.Sequential(linear(9, 11))
    inject(model, CONFIG)
    assert model[0].weight_momentum.is_meta
    twin = copy.deepcopy(model)
    model.to_empty(device="cpu")
    assert not model[0].weight_momentum.any()
    state = {name: value for name, value in with_momentum().state_dict().items() if name.startswith("0.")}
    del state["0.weight_momentum"]
    twin.load_state_dict(state, strict=False, assign=True)
    assert twin[0].weight_momentum.device.type == "cpu" and not twin[0].weight_momentum.any()


def test_it_goes_with_frozen_rows_only():
    with pytest.raises(ConfigError, match="residual must be 'none' unless factors='B'"):
        replace(CONFIG, factors="both")
    model = torch.compile(tiny_model(), backend="eager")
    with pytest.raises(ConfigError, match=r"residual='muon' observes gradients in eager mode only"):
        Loop(CONFIG, model)


@pytest.mark.parametrize(
    "storage", [{"base_dtype": "int8", "master": "host"}, {"base_dtype": "bf16", "master": "host"}]
)
def test_a_base_in_few_bits_takes_the_same_steps_at_master_precision(storage):
    stored, plain = Loop(replace(CONFIG, **storage)), Loop(CONFIG)
    stored.model.load_state_dict(plain.model.state_dict())
    for loop in (stored, plain):
        before = loop.model.up.master_rows(slice(None)).clone()
        loop.run(1, 1)
        moved = loop.model.up.master_rows(slice(None)) - before
        assert 0.1 * LR < float(moved.square().mean().sqrt()) < 0.3 * LR
