"""What a restart does to optimizer states, looked up there and not in its report."""

import numpy as np
import pytest
import torch
from torch import nn

from loops import Loop, adamw, differing, tiny_model
from reference.pruning import smallest
from relora import ReLoRAConfig


def small(**changes):
    return ReLoRAConfig(**({"rank": 3, "restart_every": 4} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restart_prunes_the_factors_states_and_no_other(dtype):
    loop = Loop(small(reset_ratio=0.8), tiny_model(dtype))
    loop.run(1, 3)
    loop.update(4)
    optimizer = loop.optimizers[0]
    before = loop.everything()
    report = loop.relora.after_step(4)
    zeroed = 0
    for name, parameter in loop.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            was = before[f"optimizer 0: {name} {key}"]
            if "lora_" not in name or key == "step":
                assert torch.equal(value, was)
                continue
            gone = smallest(before[f"optimizer 0: {name} exp_avg"], round(0.8 * value.numel()))
            assert np.array_equal((value == 0).numpy(), gone | (was == 0).numpy())
            assert torch.equal(value[value != 0], was[value != 0])
            zeroed += gone.sum()
    assert report.num_states == 8
    assert report.entries_targeted == report.entries_zeroed == zeroed > 0
    assert report.without_state == ()


@pytest.mark.parametrize("reset", ["magnitude", "none"])
def test_a_learned_scaling_keeps_its_value_and_forgets_its_history(reset):
    loop = Loop(small(scaling_rule="learned", alpha=2, reset=reset))
    loop.run(1, 3)
    loop.update(4)
    scaling = loop.model.up.lora_scaling
    value, state = scaling.item(), loop.optimizers[0].state[scaling]
    assert value != pytest.approx(2 / 3, abs=1e-6)
    assert state["exp_avg"] != 0
    loop.relora.after_step(4)
    assert scaling.item() == value
    assert state["exp_avg"] == state["exp_avg_sq"] == 0


class Experts(nn.Module):
    """Two experts of which `route` alone is used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(7, 9), nn.Linear(7, 9)])
        self.route = 0

    def forward(self, x):
        return self.experts[self.route](x)


def test_an_unrouted_expert_is_named_and_merged_once_it_is_routed():
    torch.manual_seed(0)
    model = Experts()
    loop = Loop(small(restart_every=2), model)
    loop.run(1, 2)
    assert loop.reports[0].without_state == ("experts.1.lora_A", "experts.1.lora_B")
    assert loop.reports[0].merge.unmoved_layers == ("experts.1",)
    model.route = 1
    loop.run(3, 4)
    assert loop.reports[1].without_state == ()
    assert loop.reports[1].merge.unmoved_layers == ("experts.0",)
    assert loop.reports[1].num_states == 8


def muon_and_adamw(model):
    matrices = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is m for m in matrices)]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


def test_muon_for_the_factors_and_adamw_for_the_rest():
    loop = Loop(small(scaling_rule="learned", reset="zero"), make_optimizers=muon_and_adamw)
    loop.run(1, 3)
    loop.update(4)
    muon, rest = loop.optimizers
    kept = {p: rest.state[p]["exp_avg"].clone() for p in (loop.model.norm.weight, loop.model.down.bias)}
    report = loop.relora.after_step(4)
    for layer in (loop.model.up, loop.model.down):
        assert not muon.state[layer.lora_A]["momentum_buffer"].any()
        assert not muon.state[layer.lora_B]["momentum_buffer"].any()
        assert rest.state[layer.lora_scaling]["exp_avg"] == 0
    assert all(torch.equal(rest.state[p]["exp_avg"], value) for p, value in kept.items())
    assert report.num_states == 4 + 2 * 2


def one_optimizer_a_parameter(model):
    return [torch.optim.AdamW([p], lr=1e-2) for p in model.parameters() if p.requires_grad]


def two_optimizers_of_the_same_factors(model):
    return [adamw(model), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, 0.9)]


@pytest.mark.parametrize("make", [one_optimizer_a_parameter, two_optimizers_of_the_same_factors])
def test_every_optimizer_that_holds_a_factor_forgets_it(make):
    loop = Loop(small(reset="zero"), make_optimizers=make)
    loop.run(1, 4)
    states = [o.state[p] for o in loop.optimizers for p in loop.factors().values() if p in o.state]
    moments = [value for state in states for value in state.values() if value.numel() > 1]
    assert len(moments) == loop.reports[0].num_states == (8 if len(loop.optimizers) > 2 else 12)
    assert not any(moment.any() for moment in moments)


def test_one_sided_training_has_no_state_of_lora_a_to_reset():
    loop = Loop(small(factors="B", reset="zero"))
    loop.run(1, 4)
    assert loop.reports[0].num_states == 4
    assert loop.reports[0].without_state == ()
    assert all(p not in loop.optimizers[0].state for n, p in loop.factors().items() if n.endswith("lora_A"))


def test_reset_none_leaves_every_state():
    loop = Loop(small(reset="none"))
    loop.run(1, 3)
    loop.update(4)
    before = loop.everything()
    assert loop.relora.after_step(4).num_states == 0
    changed = differing(before, loop.everything())
    assert not [name for name in changed if name.startswith("optimizer")]
    assert {"up.weight", "down.weight", "up.lora_A", "up.lora_B"} <= set(changed)


def test_random_masks_and_factors_do_not_depend_on_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    config = small(reset="random", reset_ratio=0.5)
    plain, wrapped = Loop(config), Loop(config, wrap=Wrapper)
    plain.run(1, 9)
    wrapped.run(1, 9)
    assert differing(plain.everything(), wrapped.everything()) == []
    assert plain.reports[0].as_dict() == wrapped.reports[0].as_dict()


def test_random_masks_of_one_run_differ_from_restart_to_restart():
    loop = Loop(small(reset="random", reset_ratio=0.5))
    masks = []
    for first in (1, 5, 9):
        loop.run(first, first + 2)
        loop.update(first + 3)
        before = loop.everything()["optimizer 0: up.lora_B exp_avg_sq"]
        loop.relora.after_step(first + 3)
        after = loop.optimizers[0].state[loop.model.up.lora_B]["exp_avg_sq"]
        masks.append((after == 0) & (before != 0))
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
