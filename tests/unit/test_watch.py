"""What a restart did to the loss: told once the re-warm is over, and the same after a resume."""

import json

import pytest

from relora.errors import CheckpointError
from relora.train.watch import MOST_STEPS, RestartEffect, RestartWatch


def effects(
    losses: list[float], restarts: set[int], *, watch: RestartWatch
) -> list[tuple[int, RestartEffect]]:
    """Return what is told, each with the step at which it is."""
    told = []
    for step, loss in enumerate(losses, start=1):
        found = [watch.loss(step, loss)]
        if step in restarts:
            found.append(watch.restarted(step))
        told += [(step, effect) for effect in found if effect is not None]
    return told


def wave(level: float, count: int) -> list[float]:
    return [level + (0.01 if index % 2 else -0.01) for index in range(count)]


def test_a_restart_after_which_the_loss_stays_up_hurt_and_one_after_which_it_goes_on_did_not():
    losses = [*wave(3.0, 50), *[5.0] * 10, *wave(2.9, 40), *[5.0] * 10, *wave(3.2, 40)]
    told = effects(losses, {50, 100}, watch=RestartWatch(restart_every=50, rewarmup_steps=10))
    assert [step for step, _ in told] == [50 + 10 + MOST_STEPS, 100 + 10 + MOST_STEPS]
    (_, fine), (_, bad) = told
    assert fine.step == 50 and fine.hurt is False
    assert fine.loss_before == pytest.approx(3.0) and fine.loss_after == pytest.approx(2.9)
    assert bad.step == 100 and bad.hurt is True and bad.loss_after == pytest.approx(3.2)
    assert bad.as_dict()["hurt"] is True and "step" not in bad.as_dict()


def test_a_rise_within_the_noise_of_the_losses_does_not_hurt():
    noisy = [3.0 + (0.5 if index % 2 else -0.5) for index in range(20)]
    losses = [*noisy, *[loss + 0.1 for loss in noisy]]
    ((_, effect),) = effects(losses, {20}, watch=RestartWatch(restart_every=40, rewarmup_steps=0))
    assert effect.hurt is False and effect.loss_after - effect.loss_before == pytest.approx(0.1)


def test_with_too_few_losses_the_change_is_told_without_a_verdict():
    watch = RestartWatch(restart_every=2, rewarmup_steps=1)
    ((step, effect),) = effects([3.0, 3.0, 9.0, 4.0], {2}, watch=watch)
    assert (step, effect.loss_before, effect.loss_after) == (4, 3.0, 4.0)
    assert effect.loss_noise is None and effect.hurt is None


def test_a_restart_that_comes_before_the_window_is_full_tells_with_what_there_is():
    watch = RestartWatch(restart_every=60, rewarmup_steps=0)
    ((step, effect),) = effects([*wave(3.0, 30), *wave(3.5, 6)], {30, 36}, watch=watch)
    assert (step, effect.step, effect.hurt) == (36, 30, True)


def test_a_run_that_ends_is_concluded_and_one_without_restarts_has_nothing_to_tell():
    watch = RestartWatch(restart_every=60, rewarmup_steps=0)
    assert effects([*wave(3.0, 30), *wave(3.5, 6)], {30}, watch=watch) == []
    effect = watch.conclude()
    assert effect is not None and effect.hurt and watch.conclude() is None
    assert RestartWatch(restart_every=9, rewarmup_steps=0).conclude() is None


@pytest.mark.parametrize("stop_at", [1, 25, 30, 33, 42, 50, 55])
def test_a_resumed_watch_tells_what_the_uninterrupted_one_does(stop_at):
    losses, restarts = [*wave(3.0, 30), *wave(3.4, 30)], {30}
    made = {"restart_every": 30, "rewarmup_steps": 4}
    whole = effects(losses, restarts, watch=RestartWatch(**made))
    first, second = RestartWatch(**made), RestartWatch(**made)
    told = effects(losses[:stop_at], restarts, watch=first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(stop_at + 1, len(losses) + 1):
        found = [second.loss(step, losses[step - 1])]
        if step in restarts:
            found.append(second.restarted(step))
        told += [(step, effect) for effect in found if effect is not None]
    assert told == whole and len(whole) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"recent": "x"},
        {"recent": [1]},
        {"before": None},
        {"restart_step": "3"},
        {"more": 1},
        {"after": ["nan"]},
    ],
)
def test_a_state_of_another_shape_is_refused_and_changes_nothing(change):
    watch = RestartWatch(restart_every=9, rewarmup_steps=0)
    watch.loss(1, 2.5)
    before = watch.state_dict()
    with pytest.raises(CheckpointError, match="missing or malformed"):
        watch.load_state_dict({**before, **change})
    with pytest.raises(CheckpointError, match="missing or malformed"):
        watch.load_state_dict({})
    assert watch.state_dict() == before
