"""The calendar of restarts, and the jagged cosine as a torch scheduler."""

import pytest
import torch
from torch import nn

from loops import Loop
from relora import ConfigError, JaggedCosineLR, ReLoRAConfig, jagged_cosine
from relora.method.schedule import Calendar

SETTINGS = {
    "total_steps": 31,
    "warmup_steps": 4,
    "restart_every": 9,
    "rewarmup_steps": 3,
    "min_ratio": 0.2,
    "start": 6,
}


def test_readme_recipe_of_the_paper_restarts_twice():
    calendar = Calendar(restart_every=5000, start=5000, end=20000)
    assert [step for step in range(20001) if calendar.restarts_at(step)] == [10000, 15000]


def test_last_step_restarts_only_where_no_end_is_named():
    assert Calendar(restart_every=5).restarts_at(10)
    assert not Calendar(restart_every=5, end=10).restarts_at(10)
    assert Calendar(restart_every=5, end=11).restarts_at(10)


def test_a_restart_later_than_the_last_allowed_leaves_calendar_and_rate_alone():
    calendar = Calendar(restart_every=5, start=5, end=24, last_restart=17)
    assert [step for step in range(25) if calendar.restarts_at(step)] == [10, 15]
    settings = {"total_steps": 24, "warmup_steps": 2, "restart_every": 5, "rewarmup_steps": 4, "start": 5}
    values = [jagged_cosine(t, **settings, last_restart=17) for t in range(25)]
    assert [t for t, value in enumerate(values) if value == 0] == [0, 5, 10, 15]
    assert values[19:] == [jagged_cosine(t, **(settings | {"rewarmup_steps": 0})) for t in range(19, 25)]
    assert jagged_cosine(20, **settings) == 0


def test_growing_cycles_last_the_rounded_geometric_series():
    calendar = Calendar(restart_every=4, restart_growth=1.5, start=10)
    # 4, 6, 9, 13.5 -> 14, 20.25 -> 20
    assert calendar.restarts_until(70) == (14, 20, 29, 43, 63)
    assert [step for step in range(71) if calendar.restarts_at(step)] == [14, 20, 29, 43, 63]


def test_step_of_injection_is_no_restart():
    assert not Calendar(restart_every=3).restarts_at(0)
    assert not Calendar(restart_every=3, start=3).restarts_at(3)
    assert Calendar(restart_every=3, start=3).restarts_at(6)


def test_every_violation_of_a_calendar_is_listed_at_once():
    with pytest.raises(ConfigError) as refusal:
        Calendar(restart_every=0, restart_growth=-1.0, start=-2, end=-3)
    for field in ("restart_every", "restart_growth", "start", "end"):
        assert field in str(refusal.value)


@pytest.mark.parametrize("growth", [0.0, float("nan"), float("inf")])
def test_growth_that_is_no_growth_is_refused(growth):
    with pytest.raises(ConfigError, match="restart_growth"):
        Calendar(restart_every=3, restart_growth=growth)


def test_every_violation_of_a_schedule_is_listed_at_once():
    with pytest.raises(ConfigError) as refusal:
        jagged_cosine(
            -1,
            total_steps=10,
            warmup_steps=11,
            restart_every=0,
            rewarmup_steps=-1,
            min_ratio=1.5,
            start=-1,
            restart_growth=0.0,
        )
    names = "updates_done warmup_steps restart_every rewarmup_steps min_ratio start restart_growth"
    assert [name for name in names.split() if name not in str(refusal.value)] == []


def test_switch_within_a_run_ramps_like_a_restart():
    values = [jagged_cosine(t, **SETTINGS) for t in range(16)]
    assert values[5] > 0.9
    assert values[6] == values[15] == 0.0
    assert 0 < values[7] < values[8] < values[9]


def test_a_ramp_that_the_end_cuts_off_aims_at_min_ratio():
    values = [
        jagged_cosine(t, total_steps=10, warmup_steps=0, restart_every=8, rewarmup_steps=5, min_ratio=0.3)
        for t in range(10)
    ]
    assert values[8] == 0.0
    assert values[9] == pytest.approx(0.3 / 5)


def two_groups(lr=1e-2):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 5 * lr}]
    return torch.optim.SGD(groups, lr=lr)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_scheduler_sets_every_groups_peak_times_the_multiplier_for_a_whole_run():
    optimizer = two_groups()
    scheduler = JaggedCosineLR(optimizer, **SETTINGS)
    for updates_done in range(SETTINGS["total_steps"]):
        multiplier = jagged_cosine(updates_done, **SETTINGS)
        assert rates(optimizer) == [1e-2 * multiplier, 5e-2 * multiplier]
        assert scheduler.get_last_lr() == rates(optimizer)
        optimizer.step()
        scheduler.step()


def test_scheduler_refuses_to_go_past_the_end():
    optimizer = two_groups()
    scheduler = JaggedCosineLR(optimizer, **SETTINGS)
    for _ in range(SETTINGS["total_steps"]):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ConfigError, match="updates_done"):
        scheduler.step()


@pytest.mark.parametrize("saved_after", [0, 1, 5, 6, 14, 15, 16, 30])
def test_state_dict_round_trip_goes_on_with_the_same_rates(saved_after):
    optimizer = two_groups()
    scheduler = JaggedCosineLR(optimizer, **SETTINGS)
    for _ in range(saved_after):
        optimizer.step()
        scheduler.step()
    resumed = two_groups()
    resumed_scheduler = JaggedCosineLR(resumed, **SETTINGS)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for _ in range(saved_after, SETTINGS["total_steps"]):
        assert rates(resumed) == rates(optimizer)
        for one, schedule in ((optimizer, scheduler), (resumed, resumed_scheduler)):
            one.step()
            schedule.step()


def test_optimizer_made_at_the_switch_joins_the_run_with_last_epoch():
    optimizer = two_groups()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scheduler = JaggedCosineLR(optimizer, **SETTINGS, last_epoch=SETTINGS["start"] - 1)
    seen = []
    for _ in range(SETTINGS["start"], SETTINGS["total_steps"]):
        seen.append(rates(optimizer)[0])
        optimizer.step()
        scheduler.step()
    expected = [jagged_cosine(t, **SETTINGS) for t in range(SETTINGS["start"], SETTINGS["total_steps"])]
    assert seen == [1e-2 * multiplier for multiplier in expected]


def test_in_a_loop_the_rate_is_zero_exactly_for_the_update_after_each_restart():
    config = ReLoRAConfig(rank=2, restart_every=4)
    schedule = {"total_steps": 14, "warmup_steps": 2, "restart_every": 4, "rewarmup_steps": 2}
    loop = Loop(config, schedule=schedule, end=14)
    used = {}
    for step in range(1, 15):
        used[step] = rates(loop.optimizers[0])[0]
        loop.run(step, step)
    assert [report.step for report in loop.reports] == [4, 8, 12]
    # Step 1 is the start of the first warm-up.
    assert [step for step, rate in used.items() if rate == 0] == [1, 5, 9, 13]
