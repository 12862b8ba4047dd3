"""Resumed is uninterrupted, bit for bit; and another process draws the same."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from loops import Loop, adamw, differing, tiny_model
from relora import ReLoRAConfig

STEPS = 14
PLAIN = ReLoRAConfig(rank=3, restart_every=4, reset="random", reset_ratio=0.5)
SCHEDULE = {"total_steps": STEPS, "warmup_steps": 2, "restart_every": 4, "rewarmup_steps": 2}
SETTINGS = {
    "paper": {"reset": "magnitude", "reset_ratio": 0.9},
    "random-learned": {"reset": "random", "reset_ratio": 0.5, "scaling_rule": "learned", "alpha": 2},
    "zero-decay": {"reset": "zero", "base_weight_decay": 0.5, "reset_step_count": True},
    "growing": {"reset": "magnitude", "restart_growth": 1.3, "factors": "B"},
}


def new_loop(settings, dtype):
    config = ReLoRAConfig(rank=3, restart_every=4, **settings)
    schedule = SCHEDULE | {"restart_growth": config.restart_growth}
    # AdamW's own eps is 0 in fp16, which the norm of an fp16 model trains in.
    optimizer = partial(adamw, eps=1e-4)
    return Loop(config, tiny_model(dtype), optimizer, schedule=schedule, end=STEPS, seed=7)


def saved(loop):
    """What a user saves: state dicts, the counters through JSON."""
    return {
        "model": copy.deepcopy(loop.model.state_dict()),
        "optimizer": copy.deepcopy(loop.optimizers[0].state_dict()),
        "scheduler": copy.deepcopy(loop.schedulers[0].state_dict()),
        "relora": json.loads(json.dumps(loop.relora.state_dict())),
    }


def restored(settings, dtype, checkpoint):
    torch.manual_seed(12345)
    loop = new_loop(settings, dtype)
    loop.model.load_state_dict(checkpoint["model"])
    loop.optimizers[0].load_state_dict(checkpoint["optimizer"])
    loop.schedulers[0].load_state_dict(checkpoint["scheduler"])
    loop.relora.load_state_dict(checkpoint["relora"])
    return loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_resumed_at_any_step_is_bit_equal_to_the_uninterrupted_run(settings, dtype):
    uninterrupted = new_loop(settings, dtype)
    checkpoints = [saved(uninterrupted)]
    for step in range(1, STEPS + 1):
        uninterrupted.run(step, step)
        checkpoints.append(saved(uninterrupted))
    assert uninterrupted.relora.restart_index >= 2
    expected = uninterrupted.everything()
    for saved_after, checkpoint in enumerate(checkpoints):
        resumed = restored(settings, dtype, checkpoint)
        resumed.run(saved_after + 1, STEPS)
        assert differing(expected, resumed.everything()) == [], saved_after
        restarts = uninterrupted.reports[len(uninterrupted.reports) - len(resumed.reports) :]
        assert [report.as_dict() for report in resumed.reports] == [report.as_dict() for report in restarts]


def shorter_run(end, last_restart=None):
    loop = Loop(PLAIN, seed=7, end=end, last_restart=last_restart)
    loop.run(1, end)
    return loop


def longer_run(shorter, end=STEPS):
    loop = Loop(PLAIN, seed=7, end=end)
    loop.model.load_state_dict(shorter.model.state_dict())
    loop.optimizers[0].load_state_dict(shorter.optimizers[0].state_dict())
    loop.relora.load_state_dict(json.loads(json.dumps(shorter.relora.state_dict())))
    return loop


def test_a_longer_run_catches_up_on_the_restart_its_beginning_ended_on():
    uninterrupted = Loop(PLAIN, seed=7, end=STEPS)
    uninterrupted.run(1, STEPS)
    longer = longer_run(shorter_run(8))
    assert longer.relora.restart_index == 1
    caught_up = longer.relora.catch_up()
    assert (caught_up.step, caught_up.restart_index) == (8, 2)
    assert longer.relora.catch_up() is None
    longer.run(9, STEPS)
    assert differing(uninterrupted.everything(), longer.everything()) == []


@pytest.mark.parametrize("saved_after", range(1, STEPS))
def test_there_is_nothing_to_catch_up_on_where_nothing_was_left_out(saved_after):
    loop = Loop(PLAIN, seed=7, end=STEPS)
    assert loop.relora.catch_up() is None
    loop.run(1, saved_after)
    assert loop.relora.catch_up() is None
    resumed = longer_run(loop)
    before = resumed.everything()
    assert resumed.relora.catch_up() is None
    assert differing(before, resumed.everything()) == []


def test_a_restart_left_out_in_mid_run_is_not_made_up_for_when_the_rate_is_high_again():
    longer = longer_run(shorter_run(10, last_restart=7))
    assert longer.relora.restart_index == 1
    assert longer.relora.catch_up() is None
    longer.run(11, 12)
    assert [(report.step, report.restart_index) for report in longer.reports] == [(12, 2)]
    again = longer_run(longer)
    assert again.relora.catch_up() is None


def draws():
    """Digest of every factor, weight and mask after two restarts."""
    config = ReLoRAConfig(rank=3, restart_every=2, reset="random", reset_ratio=0.5)
    loop = Loop(config, seed=21)
    loop.run(1, 4)
    digest = hashlib.sha256()
    for name, value in sorted(loop.everything().items()):
        digest.update(name.encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def test_another_process_draws_the_same_factors_and_masks():
    torch.manual_seed(777)
    here = Path(__file__).parent
    code = "import torch, test_restart_resume as t; torch.manual_seed(1); print(t.draws())"
    path = os.pathsep.join([str(here), *sys.path])
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == draws()


def test_seeds_layers_and_restarts_draw_different_factors():
    def factors(seed, steps):
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
        loop = Loop(ReLoRAConfig(rank=2, restart_every=1), model, seed=seed)
        for step in range(1, steps + 1):
            loop.optimizers[0].step()
            loop.relora.after_step(step)
        return [layer.lora_A.detach().clone() for layer in model]

    drawn = [a for seed in (0, 1) for steps in (0, 1, 2) for a in factors(seed, steps)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(factors(1, 2)[1], drawn[-1])
