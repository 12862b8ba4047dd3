"""reset="transport": what the optimizer remembers goes on being about the same gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from loops import Loop, adamw, batch, differing
from reference.beyond import second_moment_carried
from relora import ConfigError, NonFiniteError, OptimizerResetError, ReLoRA, ReLoRAConfig, inject
from relora.method.adapters import OptimizerAdapter, register_optimizer_adapter
from relora.method.transport import transport_optimizer_state_

CONFIG = ReLoRAConfig(
    rank=3, factors="B", reset="transport", restart_every=4, scaling_rule="matched", kappa=0.5
)

FAMILIES = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW-fused-amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    "Adam": (torch.optim.Adam, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Muon": (torch.optim.Muon, {}),
}


def linear_loop(optimizer_class=torch.optim.AdamW, settings=None, *, config=CONFIG, lr=1e-3):
    """One float64 layer without a bias, so that every family takes all that trains."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(7, 9, bias=False)).double()

    def make(m):
        return optimizer_class([m[0].lora_B], lr=lr, **(settings or {}))

    return Loop(config, model, make)


def carried(loop):
    """Take the steps of a cycle; return state and lora_A before the restart, and after."""
    loop.run(1, 3)
    loop.update(4)
    layer, optimizer = loop.model[0], loop.optimizers[0]

    def seen():
        state = {k: v.clone() for k, v in optimizer.state[layer.lora_B].items()}
        return state, layer.lora_A.detach().clone()

    before = seen()
    report = loop.relora.after_step(4)
    return (*before, *seen(), report)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_formula_and_step_counts_stay(family):
    state, old, new_state, new, report = carried(linear_loop(*FAMILIES[family]))
    overlap = old @ new.T
    moments = 0
    for key, value in state.items():
        if key == "step":
            assert torch.equal(new_state[key], value)
            continue
        moments += 1
        if key in ("exp_avg", "momentum_buffer"):
            wanted = value @ overlap
        else:
            wanted = torch.from_numpy(second_moment_carried(value.numpy(), old.numpy(), new.numpy()))
            assert (new_state[key] > 0).all()
        torch.testing.assert_close(new_state[key], wanted, rtol=1e-9, atol=1e-15)
    (reset,) = report.resets
    assert (reset.method, reset.num_states, reset.step_counts_reset) == ("transport", moments, 0)
    assert report.entries_carried == moments * 27
    assert report.entries_zeroed == report.entries_targeted == 0
    assert report.as_dict()["entries_carried"] == moments * 27
    assert f"{moments * 27} carried" in str(report)


def test_a_first_moment_is_the_dense_ones_projection_before_and_after():
    """For a model linear in W the dense first moment M exists; Adam's is s M A^T in either cycle."""
    loop = linear_loop()
    layer, scaling = loop.model[0], loop.model[0].fixed_scaling
    dense = torch.zeros(9, 7, dtype=torch.float64)
    for step in range(1, 5):
        x, y = (t.double() for t in batch(step))
        error = loop.model(x).detach().float() - y.float()  # as the loop computes its loss
        dense = 0.9 * dense + 0.1 * (2 / error.numel()) * error.double().T @ x
        loop.update(step)
        if step < 4:
            loop.relora.after_step(step)
    old = layer.lora_A.detach().clone()
    exp_avg = loop.optimizers[0].state[layer.lora_B]["exp_avg"]
    torch.testing.assert_close(exp_avg, scaling * dense @ old.T, rtol=1e-5, atol=1e-8)
    loop.relora.after_step(4)
    # What the new rows can see of what the old rows saw.
    visible = dense @ old.T @ old
    torch.testing.assert_close(exp_avg, scaling * visible @ layer.lora_A.T, rtol=1e-5, atol=1e-8)


def test_the_same_rows_carry_everything_and_disjoint_rows_leave_the_row_mean():
    parameter = nn.Parameter(torch.randn(5, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn(5, 3)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    identity = {"factor": torch.eye(3, dtype=torch.float64)}
    transport_optimizer_state_(optimizer, [("factor", parameter)], overlaps=identity)
    assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in before.items())
    nothing = {"factor": torch.zeros(3, 3, dtype=torch.float64)}
    transport_optimizer_state_(optimizer, [("factor", parameter)], overlaps=nothing)
    state = optimizer.state[parameter]
    assert not state["exp_avg"].any()
    mean = before["exp_avg_sq"].mean(1, keepdim=True).expand(5, 3)
    torch.testing.assert_close(state["exp_avg_sq"], mean)


def test_nothing_but_lora_b_changes():
    loop = Loop(CONFIG)
    loop.run(1, 3)
    loop.update(4)
    before = loop.everything()
    loop.relora.after_step(4)
    touched = {key.rsplit(" ", 1)[0] for key in differing(before, loop.everything()) if "optimizer" in key}
    assert touched == {"optimizer 0: up.lora_B", "optimizer 0: down.lora_B"}


def test_the_update_after_a_restart_is_no_larger_than_those_before():
    """The overshoot of a cleared second moment, up to 6.57 times the rate, does not happen."""

    def largest_update(reset, init):
        loop = linear_loop(config=replace(CONFIG, reset=reset, init=init, restart_every=200), lr=1e-3)
        loop.run(1, 200)
        sizes = []
        for step in range(201, 230):
            before = loop.model[0].lora_B.detach().clone()
            loop.run(step, step)
            sizes.append(float((loop.model[0].lora_B.detach() - before).abs().max()))
        return max(sizes) / 1e-3

    for init in ("orthonormal", "cover", "columns"):
        assert largest_update("transport", init) < 2 < largest_update("zero", init)


def test_a_learned_scaling_is_cleared_as_at_any_restart():
    loop = Loop(replace(CONFIG, scaling_rule="learned", kappa=1.0, alpha=2.0))
    loop.run(1, 3)
    loop.update(4)
    report = loop.relora.after_step(4)
    assert [reset.method for reset in report.resets] == ["transport", "zero"]
    state = loop.optimizers[0].state[loop.model.up.lora_scaling]
    assert float(state["exp_avg"]) == float(state["exp_avg_sq"]) == 0


def test_a_family_whose_moments_are_not_known_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"'row_var', 'col_var', 'variance' of Adafactor"):
        linear_loop(torch.optim.Adafactor)


def test_both_factors_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match="reset must not be 'transport' unless factors='B'"):
        replace(CONFIG, factors="both")
    with pytest.raises(ConfigError, match="reset_step_count must be false with reset='transport'"):
        replace(CONFIG, reset_step_count=True)


def test_a_state_that_is_not_finite_is_refused_and_nothing_changes():
    loop = Loop(CONFIG)
    loop.run(1, 3)
    loop.update(4)
    loop.optimizers[0].state[loop.model.up.lora_B]["exp_avg"][0, 0] = torch.nan
    before = loop.everything()
    with pytest.raises(NonFiniteError, match=r"'exp_avg' of up\.lora_B"):
        loop.relora.after_step(4)
    assert differing(before, loop.everything()) == []


class Forgetful(torch.optim.SGD):
    pass


class ForgetfulAdapter(OptimizerAdapter):
    def write_(self, state, moment, values):
        pass


def test_a_state_that_does_not_take_what_is_written_raises():
    register_optimizer_adapter(
        ForgetfulAdapter(optimizer=Forgetful, moments=("momentum_buffer",), first=("momentum_buffer",))
    )
    loop = linear_loop(Forgetful, {"momentum": 0.9})
    loop.run(1, 3)
    loop.update(4)
    with pytest.raises(OptimizerResetError, match=r"transport of 'momentum_buffer' of 0\.lora_B"):
        loop.relora.after_step(4)


def test_factors_without_state_are_named():
    model = nn.Sequential(nn.Linear(7, 9))
    inject(model, CONFIG)
    relora = ReLoRA(model, adamw(model), CONFIG)
    for step in range(1, 5):
        report = relora.after_step(step)
    assert report.without_state == ("0.lora_B",)
    assert report.entries_carried == 0


def test_a_state_in_bf16_is_carried_to_its_own_precision():
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn(5, 3, dtype=torch.bfloat16)
    optimizer.step()
    before = {k: v.double().clone() for k, v in optimizer.state[parameter].items()}
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    transport_optimizer_state_(optimizer, [("factor", parameter)], overlaps={"factor": rotation})
    wanted = before["exp_avg"] @ rotation
    np.testing.assert_array_equal(
        optimizer.state[parameter]["exp_avg"].float().numpy(), wanted.bfloat16().float().numpy()
    )
