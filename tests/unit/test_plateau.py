"""A warm start that ends itself: the rule on its losses."""

import math

import pytest

from relora.errors import ConfigError
from relora.train.phase import Plan
from relora.train.plateau import steepness, take_loss_
from tiny_run import tiny_recipe


def ended_at(losses, longest):
    means, pending = [], []
    for step, loss in enumerate(losses, start=1):
        found = take_loss_(means, pending, loss, longest=longest)
        if found is not None:
            return step, found
    return None


def test_a_line_never_ends_and_a_plateau_does():
    assert ended_at([10 - 0.01 * step for step in range(200)], 200) is None
    # Falls for 100 steps, then stays: windows of 10, and the last two are flat at step 120 or before.
    step, found = ended_at([10 - 0.05 * min(step, 100) for step in range(200)], 200)
    assert step == 120 and 0 <= found < 0.5


def test_a_power_law_ends_where_its_steepness_has_halved():
    losses = [3 + 5 * (step + 20) ** -0.5 for step in range(1000)]
    step, _ = ended_at(losses, 1000)
    window = 50
    means = [sum(losses[first : first + window]) / window for first in range(0, step, window)]
    assert step == len(means) * window and steepness(means) < 0.5
    assert len(means) == 5 or steepness(means[:-1]) >= 0.5
    assert 250 <= step < 1000


def test_a_loss_that_rises_ends_it_and_few_windows_say_nothing():
    assert ended_at([float(step) for step in range(100)], 100) == (25, 0.0)
    assert steepness([3.0, 2.0, 1.0, 0.5]) is None
    assert steepness([4.0, 3.0, 2.0, 2.0, 2.0]) == 0.0
    assert steepness([5.0, 4.0, 3.0, 2.0, 1.0]) == 1.0


def test_the_plan_moves_its_switch_and_restarts_and_no_rate_before_it(tmp_path):
    relora = {"warm_start_until": "plateau", "warm_start_steps": 9}
    recipe = tiny_recipe(tmp_path, relora=relora)
    longest, ended = Plan(recipe=recipe), Plan(recipe=recipe, ended_at=7)
    assert [step for step in range(1, 13) if longest.watches_loss(step)] == [3, 4, 5, 6, 7, 8]
    assert not any(ended.watches_loss(step) for step in range(1, 13))
    assert (longest.switch_step, ended.switch_step) == (9, 7)
    assert ended.phase(7) == "warm_start" and ended.phase(8) == "low_rank"
    assert ended.restart_steps == (9,)
    assert all(longest.multiplier(step) == ended.multiplier(step) for step in range(1, 8))
    assert ended.multiplier(8) == 0 and not math.isclose(longest.multiplier(8), 0)


def test_a_warm_start_too_short_to_judge_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"warm_start_steps must be above 7 with relora\.warm_start_until"):
        tiny_recipe(tmp_path, relora={"warm_start_until": "plateau", "warm_start_steps": 7})
