"""init="gradient": the new lora_A spans the top of the gradient that the last step of a cycle had."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from loops import Loop, adamw, batch, differing, tiny_model
from method_samples import Branches, as_rows
from reference.beyond import captured
from relora import ReLoRA, ReLoRAConfig, inject, merge_and_reinit_
from relora.method.gradient_init import Sketch

GRADIENT = ReLoRAConfig(
    rank=3, factors="B", init="gradient", restart_every=4, reset="none", scaling_rule="matched"
)


def replaced(**changes):
    return replace(GRADIENT, **changes)


def random_gradient(out, width, *, decay, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = min(out, width)
    left, _ = torch.linalg.qr(torch.randn(out, side, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(width, side, generator=generator))
    return (left * torch.arange(1, side + 1) ** -decay) @ right.T


def rows_of(gradient, *, rank, mix=0.0, restart_index=1, parts=1):
    """What a layer whose base has this gradient gets; `parts` micro batches make it up."""
    out, width = gradient.shape
    layer = nn.Linear(width, out, bias=False)
    inject(layer, replaced(rank=rank, init_mix=mix))
    sketch = Sketch(layer, seed=0, restart_index=restart_index)
    for x, g in zip(torch.eye(width).chunk(parts), gradient.T.chunk(parts), strict=True):
        sketch.observe(x, g)
    drawn = sketch.rows()
    assert drawn is not None
    rows, kept = drawn
    np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=1e-10)
    return rows.numpy(), kept


# The least energy that one pass over twice the rank must capture of what an SVD would, by spectrum i^-decay;
# docs/beyond.md has the means. Random rows capture 0.15 to 0.25.
@pytest.mark.parametrize(("decay", "least"), [(0.5, 0.6), (1.0, 0.9), (2.0, 0.99)])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (64, 96)])
def test_the_rows_hold_the_energy_of_the_top_singular_vectors(decay, least, out, width):
    for seed in range(3):
        gradient = random_gradient(out, width, decay=decay, seed=seed)
        rows, kept = rows_of(gradient, rank=8)
        assert kept == 8
        assert captured(gradient.double().numpy(), rows) > least


def test_a_gradient_of_lower_rank_is_captured_whole_and_the_other_rows_are_random():
    gradient = random_gradient(40, 30, decay=0.0)
    left, values, right = torch.linalg.svd(gradient)
    gradient = (left[:, :3] * values[:3]) @ right[:3]
    (first, kept), (second, _) = (rows_of(gradient, rank=6, restart_index=i) for i in (1, 2))
    assert kept == 3
    exact = right[:3].double().numpy()
    np.testing.assert_allclose(exact @ first[:3].T @ first[:3], exact, atol=1e-4)
    assert np.abs(first[3:] @ second[3:].T).max() < 0.9


def test_micro_batches_add_up_to_the_whole_gradient():
    gradient = random_gradient(20, 15, decay=1.0)
    whole, _ = rows_of(gradient, rank=4)
    for parts in (2, 5, 15):
        rows, _ = rows_of(gradient, rank=4, parts=parts)
        np.testing.assert_allclose(np.abs(rows @ whole.T), np.eye(4), atol=1e-3)


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_sign_of_a_row_is_not_left_to_the_linear_algebra(mix):
    gradient = random_gradient(40, 30, decay=1.0)
    rows, _ = rows_of(gradient, rank=6, mix=mix)
    negated, _ = rows_of(-gradient, rank=6, mix=mix)
    np.testing.assert_allclose(negated, rows, atol=1e-6)
    assert (rows[np.arange(6), np.abs(rows).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize(("mix", "kept"), [(0.0, 8), (0.25, 6), (0.5, 4), (1.0, 0)])
def test_init_mix_is_the_fraction_of_rows_that_are_random(mix, kept):
    gradient = random_gradient(96, 64, decay=1.0)
    rows, num_kept = rows_of(gradient, rank=8, mix=mix)
    assert num_kept == kept
    if kept:
        assert captured(gradient.double().numpy(), rows[:kept]) > 0.9
    # The random rows see about their share of what is left, not its top.
    rest = gradient.double().numpy() - gradient.double().numpy() @ rows[:kept].T @ rows[:kept]
    if kept < 8:
        assert captured(rest, rows[kept:]) < 0.5


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_restart_takes_the_gradient_of_its_own_step_alone(accumulate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    inject(model, GRADIENT)
    optimizer = adamw(model)
    relora = ReLoRA(model, optimizer, GRADIENT)
    for step in range(1, 9):
        generator = torch.Generator().manual_seed(step)
        # Each step's inputs lie in three directions of their own, so its gradient has rank 3.
        directions = torch.randn(3, 24, generator=generator)
        x = torch.randn(16, 3, generator=generator) @ directions
        optimizer.zero_grad()
        for part in x.chunk(accumulate):
            (model(part).square().mean() / accumulate).backward()
        optimizer.step()
        report = relora.after_step(step)
        if step % 4 == 0:
            span = torch.linalg.qr(directions.T)[0].T
            overlap = torch.linalg.svdvals(model[0].lora_A.detach() @ span.T)
            torch.testing.assert_close(overlap, torch.ones(3), rtol=0, atol=1e-4)
            assert report.gradient_init.gradient_rows == report.gradient_init.rows == 3
            assert report.gradient_init.without_gradient == ()
            assert "3 of 3 rows from gradients" in str(report)
            assert report.as_dict()["gradient_init"]["gradient_rows"] == 3
    assert relora.restart_index == 2


def test_only_the_last_step_of_a_cycle_is_observed():
    loop = Loop(GRADIENT)
    for step in range(1, 12):
        assert bool(loop.model.up.observers) == (step % 4 == 0)
        loop.run(step, step)


def test_a_layer_without_a_gradient_gets_random_rows_and_is_named():
    loop = Loop(GRADIENT, Branches())
    before = loop.model.idle.lora_A.detach().clone()
    loop.run(1, 4)
    (report,) = loop.reports
    assert report.gradient_init.without_gradient == ("idle",)
    assert (report.gradient_init.gradient_rows, report.gradient_init.rows) == (3, 6)
    idle = loop.model.idle.lora_A.detach()
    assert not torch.isclose(idle, before).all()
    torch.testing.assert_close(idle @ idle.T, torch.eye(3), rtol=0, atol=1e-6)


def test_a_gradient_that_is_not_finite_counts_as_none():
    loop = Loop(GRADIENT)
    loop.run(1, 3)
    loop.update(4)
    loop.model.up.observers[0].total[0, 0] = math.nan
    report = loop.relora.after_step(4)
    assert report.gradient_init.without_gradient == ("up",)
    assert loop.model.up.lora_A.isfinite().all()


def test_rows_that_are_all_random_by_choice_are_no_sign_of_a_missing_gradient():
    loop = Loop(replaced(init_mix=1.0))
    loop.run(1, 4)
    assert loop.reports[0].gradient_init.without_gradient == ()
    assert loop.reports[0].gradient_init.gradient_rows == 0


def test_the_first_cycle_and_the_public_merge_are_random_orthonormal():
    model, plain = tiny_model(), tiny_model()
    inject(model, GRADIENT)
    inject(plain, replaced(init="orthonormal"))
    for restart_index in (0, 1):
        if restart_index:
            merge_and_reinit_(model, seed=0, restart_index=1)
            merge_and_reinit_(plain, seed=0, restart_index=1)
        assert torch.equal(model.up.lora_A, plain.up.lora_A)


def test_a_restart_that_is_caught_up_on_is_random_and_says_so():
    shorter = Loop(GRADIENT, end=4)
    shorter.run(1, 4)
    longer = Loop(GRADIENT, end=20)
    longer.model.load_state_dict(shorter.model.state_dict())
    longer.optimizers[0].load_state_dict(shorter.optimizers[0].state_dict())
    longer.relora.load_state_dict(shorter.relora.state_dict())
    report = longer.relora.catch_up()
    assert report.gradient_init.without_gradient == ("up", "down")
    assert report.gradient_init.gradient_rows == 0
    longer.run(5, 8)
    assert longer.reports[0].gradient_init.without_gradient == ()


def test_both_factors_may_begin_from_the_gradient():
    loop = Loop(replaced(factors="both", reset="zero", scaling_rule="alpha/r"))
    loop.run(1, 9)
    assert [report.gradient_init.gradient_rows for report in loop.reports] == [6, 6]


def test_growing_cycles_are_observed_at_their_ends():
    loop = Loop(replaced(restart_every=2, restart_growth=1.5))
    loop.run(1, 17)
    assert [report.step for report in loop.reports] == [2, 5, 9, 16]
    assert all(report.gradient_init.gradient_rows == 6 for report in loop.reports)


def test_a_given_up_step_leaves_no_trace():
    tried, plain = Loop(GRADIENT), Loop(GRADIENT)
    for loop in (tried, plain):
        loop.run(1, 3)
    tried.loss(99).backward()
    tried.relora.discard_step()
    for loop in (tried, plain):
        loop.run(4, 6)
    assert differing(tried.everything(), plain.everything()) == []


def test_the_gradient_is_that_of_the_function_not_of_the_base_alone():
    # After a cycle base and delta differ; what counts is where W, their sum, wants to go.
    loop = Loop(GRADIENT)
    loop.run(1, 3)
    plain = tiny_model()
    with torch.no_grad():
        for name in ("up", "down"):
            layer = getattr(loop.model, name)
            getattr(plain, name).weight.copy_(layer.weight + layer.delta().float())
            getattr(plain, name).bias.copy_(layer.bias)
        plain.norm.load_state_dict(loop.model.norm.state_dict())
    x, y = batch(4)
    (plain(x) - y).square().mean().backward()
    loop.run(4, 4)
    gradient = plain.up.weight.grad.double().numpy()
    # up has 7 inputs: 6 sketched rows hold nearly all of its gradient.
    assert captured(gradient, loop.model.up.lora_A.detach().double().numpy()) > 0.95
    assert as_rows(loop.model.up).shape == gradient.shape
