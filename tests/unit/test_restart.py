"""Restarts: what they do to weights and factors, looked up there and not in reports."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from loops import Loop, adamw, batch, differing, tiny_model
from relora import ReLoRA, ReLoRAConfig, inject
from relora.method.spectrum import function_weights, spectra


def small(**changes):
    return ReLoRAConfig(**({"rank": 3, "restart_every": 4} | changes))


def test_restarts_follow_the_calendar_and_are_numbered_from_one():
    loop = Loop(small(), end=16)
    loop.run(1, 16)
    assert [(report.step, report.restart_index) for report in loop.reports] == [(4, 1), (8, 2), (12, 3)]
    assert loop.relora.restart_index == 3


def test_cycles_are_counted_from_the_step_of_injection():
    loop = Loop(small(restart_every=3), start=10)
    loop.run(11, 20)
    assert [report.step for report in loop.reports] == [13, 16, 19]


def test_cycles_grow():
    loop = Loop(small(restart_every=2, restart_growth=1.5))
    loop.run(1, 17)
    # 2, 3, 4.5 -> 4, 6.75 -> 7
    assert [report.step for report in loop.reports] == [2, 5, 9, 16]


def test_restart_merges_the_delta_and_starts_new_factors_in_the_same_parameters():
    loop = Loop(small())
    loop.run(1, 3)
    loop.update(4)
    identities = {name: (id(p), p.data_ptr()) for name, p in loop.model.named_parameters()}
    before, old = function_weights(loop.model), loop.everything()
    report = loop.relora.after_step(4)
    assert {name: (id(p), p.data_ptr()) for name, p in loop.model.named_parameters()} == identities
    for name in ("up", "down"):
        layer = getattr(loop.model, name)
        assert not layer.lora_B.any()
        assert not torch.isclose(layer.lora_A, old[f"{name}.lora_A"]).any()
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(3))
        merged = old[f"{name}.weight"].double() + layer.fixed_scaling * (
            old[f"{name}.lora_B"].double() @ old[f"{name}.lora_A"].double()
        )
        assert torch.equal(layer.weight, merged.float())
        torch.testing.assert_close(layer.weight.double(), before[name], rtol=0, atol=1e-7)
    for name in ("up.bias", "norm.weight", "norm.bias", "down.bias"):
        assert torch.equal(loop.model.state_dict()[name], old[name])
    assert report.max_function_change <= 1e-7


def test_report_is_json_and_its_totals_are_those_of_its_parts():
    loop = Loop(small(scaling_rule="learned", alpha=2, reset_step_count=True))
    loop.run(1, 4)
    (report,) = loop.reports
    record = json.loads(json.dumps(report.as_dict()))
    assert (record["step"], record["restart_index"], record["num_layers"]) == (4, 1, 2)
    assert [layer["name"] for layer in record["layers"]] == ["up", "down"]
    assert {parameter["name"] for parameter in record["parameters"]} == set(loop.factors())
    for total in ("entries_targeted", "entries_zeroed", "num_states"):
        assert record[total] == sum(parameter[total] for parameter in record["parameters"])
    assert record["step_counts_reset"] == 6
    assert record["without_state"] == record["unmoved_layers"] == []
    assert "restart 1 after step 4: 2 layers merged" in str(report)


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_report_and_state_are_json_whatever_integer_counts_the_steps(number):
    loop = Loop(small(restart_every=1))
    loop.update(1)
    report = loop.relora.after_step(number(1))
    assert json.loads(json.dumps(report.as_dict()))["step"] == 1
    assert json.loads(json.dumps(loop.relora.state_dict()))["restarted_at"] == 1


@pytest.mark.parametrize("rule", ["alpha/r", "learned"])
@pytest.mark.parametrize("factors", ["both", "B"])
def test_lora_b_has_a_gradient_on_the_first_backward_of_every_cycle(rule, factors):
    loop = Loop(small(restart_every=2, scaling_rule=rule, factors=factors))
    for cycle in range(3):
        loop.update(2 * cycle + 1)
        for layer in (loop.model.up, loop.model.down):
            assert layer.lora_B.grad.abs().max() > 1e-6
        loop.relora.after_step(2 * cycle + 1)
        loop.run(2 * cycle + 2, 2 * cycle + 2)
    assert len(loop.reports) == 3


def test_loss_goes_on_where_it_was():
    schedule = {"total_steps": 60, "warmup_steps": 3, "restart_every": 15, "rewarmup_steps": 3}
    loop = Loop(small(restart_every=15), schedule=schedule, end=60)
    done = 0
    for restart in (15, 30, 45):
        loop.run(done + 1, restart - 1)
        loop.update(restart)
        before = loop.loss().item()
        assert loop.relora.after_step(restart) is not None
        loop.schedulers[0].step()
        assert loop.loss().item() == pytest.approx(before, abs=1e-6)
        # The learning rate is 0 for one update, which therefore moves nothing either.
        loop.run(restart + 1, restart + 1)
        assert loop.loss().item() == pytest.approx(before, abs=1e-6)
        done = restart + 3
        loop.run(restart + 2, done)
        assert loop.loss().item() == pytest.approx(before, rel=0.02)
        assert loop.loss().item() != pytest.approx(before, abs=1e-6)


def train_on_a_teacher(config, steps):
    """Ranks of W_t - W_0 after each step of fitting a random full-rank teacher."""
    torch.manual_seed(3)
    model, teacher = nn.Sequential(nn.Linear(17, 13, bias=False)), nn.Linear(17, 13, bias=False)
    start = function_weights(model)
    inject(model, config)
    optimizer = adamw(model, lr=2e-2)
    relora = ReLoRA(model, optimizer, config)
    ranks = []
    for step in range(1, steps + 1):
        x, _ = batch(step, width=17, out=13, rows=32)
        optimizer.zero_grad()
        (model(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        relora.after_step(step)
        ranks.append(spectra(start, function_weights(model))["0"].rank)
    return ranks


def test_relora_gains_rank_with_every_restart_and_lora_does_not():
    ranks = train_on_a_teacher(ReLoRAConfig(rank=3, restart_every=5), 35)
    assert ranks[4::5] == [3, 6, 9, 12, 13, 13, 13]
    assert ranks[5::5] == [6, 9, 12, 13, 13, 13]
    assert train_on_a_teacher(ReLoRAConfig(rank=3, restart_every=1000), 35)[4:] == [3] * 31


def test_a_restart_draws_nothing_from_the_global_stream():
    loop = Loop(small(reset="random"))
    loop.run(1, 3)
    loop.update(4)
    stream = torch.get_rng_state()
    loop.relora.after_step(4)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_restart_does_not_depend_on_the_default_dtype_and_device():
    config = small(reset="random", reset_ratio=0.5)
    plain, strange = Loop(config), Loop(config)
    for loop in (plain, strange):
        loop.run(1, 3)
        loop.update(4)
    plain.relora.after_step(4)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            strange.relora.after_step(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert differing(plain.everything(), strange.everything()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_no_grad_around_a_restart_change_nothing(dtype):
    plain, inside = Loop(small(), tiny_model(dtype)), Loop(small(), tiny_model(dtype))
    for loop in (plain, inside):
        loop.run(1, 3)
        loop.update(4)
    plain.relora.after_step(4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside.relora.after_step(4)
    assert differing(plain.everything(), inside.everything()) == []
    assert all(parameter.requires_grad for parameter in inside.factors().values())


def test_scheduler_before_or_after_the_restart_makes_no_difference():
    schedule = {"total_steps": 12, "warmup_steps": 2, "restart_every": 4, "rewarmup_steps": 2}
    documented, swapped = Loop(small(), schedule=schedule), Loop(small(), schedule=schedule)
    documented.run(1, 12)
    for step in range(1, 13):
        swapped.update(step)
        swapped.schedulers[0].step()
        swapped.relora.after_step(step)
    assert differing(documented.everything(), swapped.everything()) == []


def test_base_weight_decay_is_adamws_decay_over_the_same_steps():
    decay, cycle, steps = 0.3, 5, 15
    schedule = {"total_steps": 20, "warmup_steps": 3, "restart_every": cycle, "rewarmup_steps": 2}
    loop = Loop(small(restart_every=cycle, base_weight_decay=decay), schedule=schedule)
    twin = tiny_model()
    full_rank = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=decay)
    twin_schedule = Loop(small(), schedule=schedule).schedulers[0]
    for step in range(1, steps + 1):
        # No gradient reaches the factors, so the delta stays 0; a zero gradient leaves AdamW only its decay.
        for parameter in twin.parameters():
            parameter.grad = torch.zeros_like(parameter)
        full_rank.param_groups[0]["lr"] = twin_schedule.get_last_lr()[0]
        full_rank.step()
        twin_schedule.optimizer.step()
        twin_schedule.step()
        loop.optimizers[0].step()
        loop.relora.after_step(step)
        loop.schedulers[0].step()
    for name in ("up", "down"):
        ours, theirs = getattr(loop.model, name).weight, getattr(twin, name).weight
        assert not torch.allclose(ours, getattr(tiny_model(), name).weight, rtol=1e-3)
        # AdamW rounds at each of 15 steps, we at each of 3 restarts.
        torch.testing.assert_close(ours, theirs, rtol=15 * 2**-24, atol=0)
