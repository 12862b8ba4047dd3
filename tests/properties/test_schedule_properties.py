"""What holds of every schedule and calendar, not only of the paper's."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.schedule import cycle_lengths, jagged_multipliers, plain_cosine, restart_steps
from relora import jagged_cosine
from relora.method.schedule import Calendar

quick = settings(max_examples=60, deadline=None, database=None)


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 160))
    return {
        "total_steps": total,
        "warmup_steps": draw(st.integers(0, total)),
        "restart_every": draw(st.integers(1, 70)),
        "rewarmup_steps": draw(st.integers(0, 30)),
        "min_ratio": draw(st.floats(0, 1)),
        "start": draw(st.one_of(st.just(0), st.integers(0, total + 5))),
        "restart_growth": draw(st.sampled_from([1.0, 1.0, 0.7, 1.2, 2.0])),
        "last_restart": draw(st.one_of(st.none(), st.integers(0, total))),
    }


def values_of(schedule):
    return [jagged_cosine(t, **schedule) for t in range(schedule["total_steps"] + 1)]


def restarts_of(schedule):
    return restart_steps(
        cycle=schedule["restart_every"],
        growth=schedule["restart_growth"],
        start=schedule["start"],
        last=schedule["total_steps"],
        last_restart=schedule["last_restart"],
    )


def cosine_of(schedule):
    return plain_cosine(
        total=schedule["total_steps"], warmup=schedule["warmup_steps"], min_ratio=schedule["min_ratio"]
    )


@quick
@given(schedules())
def test_every_value_is_that_of_the_independent_walk(schedule):
    expected = jagged_multipliers(
        total=schedule["total_steps"],
        warmup=schedule["warmup_steps"],
        cycle=schedule["restart_every"],
        rewarmup=schedule["rewarmup_steps"],
        min_ratio=schedule["min_ratio"],
        start=schedule["start"],
        growth=schedule["restart_growth"],
        last_restart=schedule["last_restart"],
    )
    assert values_of(schedule) == pytest.approx(list(expected), abs=1e-12)


@quick
@given(schedules())
def test_the_update_after_every_restart_and_after_the_switch_has_multiplier_zero(schedule):
    if not schedule["rewarmup_steps"]:
        return
    switch = [schedule["start"]] if 0 < schedule["start"] <= schedule["total_steps"] else []
    for step in switch + restarts_of(schedule):
        assert jagged_cosine(step, **schedule) == 0.0


@quick
@given(schedules())
def test_the_ramp_ends_on_the_cosine_without_a_jump(schedule):
    rewarmup, total = schedule["rewarmup_steps"], schedule["total_steps"]
    cosine = cosine_of(schedule)
    for begin, end in pairwise([*restarts_of(schedule), total]):
        ramp_end = begin + rewarmup
        if not rewarmup or ramp_end >= end:
            continue
        slope = cosine[ramp_end] / rewarmup
        assert jagged_cosine(ramp_end, **schedule) == pytest.approx(cosine[ramp_end], abs=1e-12)
        for t in range(begin, ramp_end):
            rise = jagged_cosine(t + 1, **schedule) - jagged_cosine(t, **schedule)
            assert rise == pytest.approx(slope, abs=1e-12)


@quick
@given(schedules())
def test_it_is_never_above_the_cosine_nor_below_zero(schedule):
    for value, bound in zip(values_of(schedule), cosine_of(schedule), strict=True):
        assert 0 <= value <= bound + 1e-12


@quick
@given(schedules())
def test_the_end_is_min_ratio_where_no_ramp_reaches_it(schedule):
    total = schedule["total_steps"]
    begins = [step for step in (schedule["start"], *restarts_of(schedule)) if 0 < step <= total]
    if begins and begins[-1] + schedule["rewarmup_steps"] > total:
        return
    if schedule["warmup_steps"] < total:
        assert jagged_cosine(total, **schedule) == pytest.approx(schedule["min_ratio"], abs=1e-12)


@quick
@given(schedules())
def test_without_a_ramp_restarts_leave_the_cosine_alone(schedule):
    assert values_of(schedule | {"rewarmup_steps": 0}) == pytest.approx(list(cosine_of(schedule)), abs=1e-12)


@quick
@given(schedules())
def test_updates_before_injection_follow_the_cosine(schedule):
    before = min(schedule["start"], schedule["total_steps"])
    assert values_of(schedule)[:before] == pytest.approx(list(cosine_of(schedule))[:before], abs=1e-12)


calendars = st.fixed_dictionaries(
    {
        "restart_every": st.integers(1, 60),
        "restart_growth": st.sampled_from([1.0, 0.5, 0.9, 1.1, 1.7, 3.0]),
        "start": st.integers(0, 50),
        "last_restart": st.one_of(st.none(), st.integers(0, 300)),
    }
)


@quick
@given(calendars, st.integers(0, 300))
def test_restarts_are_the_ends_of_cycles_and_none_falls_on_the_end(settings_, length):
    end = settings_["start"] + length
    calendar = Calendar(**settings_, end=end)
    ends = restart_steps(
        cycle=settings_["restart_every"],
        growth=settings_["restart_growth"],
        start=settings_["start"],
        last=end,
        last_restart=settings_["last_restart"],
    )
    expected = [step for step in ends if step != end]
    assert [step for step in range(end + 1) if calendar.restarts_at(step)] == expected
    assert list(calendar.restarts_until(end)) == expected


@quick
@given(calendars)
def test_cycle_k_lasts_the_rounded_growth_and_at_least_one_step(settings_):
    calendar = Calendar(**settings_)
    restarts = [settings_["start"], *calendar.restarts_until(settings_["start"] + 400)]
    lengths = [later - earlier for earlier, later in pairwise(restarts)]
    expected = cycle_lengths(settings_["restart_every"], settings_["restart_growth"])
    assert lengths == [length for length, _ in zip(expected, lengths, strict=False)]


@quick
@given(calendars, st.integers(0, 300))
def test_a_cycle_starts_at_the_last_restart_that_is_not_later(settings_, step):
    calendar = Calendar(**settings_)
    begins = [settings_["start"], *calendar.restarts_until(step)]
    expected = max((begin for begin in begins if begin <= step), default=0)
    assert calendar.cycle_start(step) == expected


@quick
@given(schedules())
def test_the_learning_rate_falls_where_the_calendar_restarts(schedule):
    """One calendar serves both: a dip of a schedule that never fades out is a restart or the switch."""
    if not schedule["rewarmup_steps"] or schedule["min_ratio"] < 1e-3:
        return
    calendar = Calendar(
        restart_every=schedule["restart_every"],
        restart_growth=schedule["restart_growth"],
        start=schedule["start"],
        last_restart=schedule["last_restart"],
    )
    for t in range(1, schedule["total_steps"] + 1):
        if calendar.restarts_at(t):
            assert jagged_cosine(t, **schedule) == 0.0
        elif t != schedule["start"]:
            assert not math.isclose(jagged_cosine(t, **schedule), 0.0)
