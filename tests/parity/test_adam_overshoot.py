"""Why an optimizer reset without a re-warm diverges (paper.md 2): the arithmetic, in torch's Adam."""

import pytest
import torch
from torch import nn

from reference.adam import updates_after_reset
from relora import reset_optimizer_state_

LR, GRADIENT, COUNT = 1e-3, -0.37, 1_000_000


def measured_updates(optimizer_class, *, betas, num_steps, reset_step_count):
    """Sizes of the updates after a reset, in units of the learning rate, from an optimizer in equilibrium."""
    factor = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = optimizer_class([factor], lr=LR, betas=betas, eps=0.0, weight_decay=0.0)
    factor.grad = torch.full_like(factor, GRADIENT)
    optimizer.step()
    state = optimizer.state[factor]
    state["step"].fill_(COUNT)
    state["exp_avg"].fill_(GRADIENT)
    state["exp_avg_sq"].fill_(GRADIENT**2)
    reset_optimizer_state_(optimizer, [factor], method="zero", reset_step_count=reset_step_count)
    sizes = []
    for _ in range(num_steps):
        before = factor.detach().clone()
        optimizer.step()
        moved = (factor.detach() - before).abs() / LR
        assert moved.min() == moved.max()
        sizes.append(moved[0, 0].item())
    return sizes


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_kept_count_overshoots_6_57_times_at_step_12(optimizer_class):
    sizes = measured_updates(optimizer_class, betas=(0.9, 0.999), num_steps=50, reset_step_count=False)
    assert sizes[0] == pytest.approx(3.16, abs=5e-3)
    assert max(sizes) == pytest.approx(6.57, abs=5e-3)
    assert sizes.index(max(sizes)) + 1 == 12
    assert sizes[49] == pytest.approx(4.5, abs=5e-2)


def test_kept_count_with_a_short_second_moment_hardly_overshoots():
    sizes = measured_updates(torch.optim.AdamW, betas=(0.9, 0.95), num_steps=100, reset_step_count=False)
    assert sizes[0] == pytest.approx(0.45, abs=5e-3)
    assert max(sizes) == pytest.approx(1.10, abs=5e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_reset_count_makes_every_update_the_learning_rate(betas):
    sizes = measured_updates(torch.optim.AdamW, betas=betas, num_steps=50, reset_step_count=True)
    # (1 - b^n) / (1 - b^n) is 1; what is left is float64 rounding of moments and of differences of weights.
    assert sizes == pytest.approx([1.0] * 50, rel=1e-10)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99)])
@pytest.mark.parametrize("reset_step_count", [False, True])
def test_whole_transient_is_that_of_the_closed_form(betas, reset_step_count):
    sizes = measured_updates(torch.optim.AdamW, betas=betas, num_steps=60, reset_step_count=reset_step_count)
    count = 0 if reset_step_count else COUNT
    expected = updates_after_reset(betas=betas, num_steps=60, count_at_reset=count)
    assert sizes == pytest.approx(expected, rel=1e-9)
