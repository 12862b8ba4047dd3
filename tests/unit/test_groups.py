"""Who trains at which rate: factors, hidden matrices, embeddings, head, norms."""

import pytest
import torch
from torch import nn

from method_samples import tower
from relora import ConfigError, ReLoRAConfig, inject
from relora.train.groups import parameter_groups
from relora.train.joint import JointOptimizer
from relora.train.phase import build_optimizer
from tiny_run import tiny_recipe

CONFIG = ReLoRAConfig(rank=3, factors="B", scaling_rule="learned", alpha=3)
MULTIPLES = [0.5, 0.25, 2.0]


class Headed(nn.Module):
    """A tower that declares its head, as transformers models do."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.body = tower(tied=tied)

    def get_output_embeddings(self) -> nn.Module:
        return self.body.lm_head


def by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group.params}


@pytest.mark.parametrize("phase", ["full", "warm_start", "low_rank"])
def test_embeddings_head_and_norms_have_multiples_of_their_own(tmp_path, phase):
    optim = {"lr": 1e-2, "low_rank_lr": 4e-2, "rest_lr_multiples": MULTIPLES, "rest_beta2": 0.9}
    recipe = tiny_recipe(tmp_path, optim={**optim, "weight_decay": 0.1})
    model = Headed()
    if phase == "low_rank":
        inject(model, CONFIG)
    rate = 4e-2 if phase == "low_rank" else 1e-2
    groups = parameter_groups(model, recipe, phase)
    found = by_name(model, groups)
    own = (0.9, 0.9)
    wanted = {
        "body.embed.weight": (0.5 * rate, own, 0.1),
        "body.lm_head.weight": (0.25 * rate, own, 0.1),
        "body.norm.weight": (2 * rate, own, 0.0),
        "body.down.bias": (2 * rate, own, 0.0),
        "body.experts.gate_up": (rate, None, 0.1),
    }
    if phase != "low_rank":
        wanted["body.down.weight"] = (rate, None, 0.1)
    for name, (lr, betas, decay) in wanted.items():
        group = found[name]
        assert (group.lr, group.betas, group.weight_decay) == (pytest.approx(lr), betas, decay), name
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    optimizer = build_optimizer(model, recipe, phase)
    held = {id(p): group for group in optimizer.adamw.param_groups for p in group["params"]}
    assert held[id(model.body.norm.weight)]["betas"] == own
    assert held[id(model.body.experts["gate_up"])]["betas"] == (0.9, 0.95)
    # What a run logs as its rate is the factors', or the hidden matrices'.
    optimizer.set_multiplier_(0.5)
    assert optimizer.lr == pytest.approx(0.5 * rate)


def test_by_default_nothing_is_told_apart(tmp_path):
    groups = parameter_groups(Headed(), tiny_recipe(tmp_path), "full")
    assert [{p.ndim >= 2 for p in group.params} for group in groups] == [{True}, {False}]
    assert all(group.betas is None for group in groups)


def test_a_tied_head_cannot_have_a_rate_of_its_own(tmp_path):
    model = Headed(tied=True)
    with pytest.raises(ConfigError, match=r"rest_lr_multiples: this model's output head is its embedding"):
        parameter_groups(model, tiny_recipe(tmp_path, optim={"rest_lr_multiples": MULTIPLES}), "full")
    same = tiny_recipe(tmp_path, optim={"rest_lr_multiples": [0.5, 0.5, 1.0]})
    assert by_name(model, parameter_groups(model, same, "full"))["body.embed.weight"].lr == 2.5e-3


@pytest.mark.parametrize("factors", ["both", "B"])
def test_muon_steps_the_factors_and_adamw_all_else(tmp_path, factors):
    recipe = tiny_recipe(tmp_path, optim={"factor_optimizer": "muon", "factor_lr": 3e-3})
    model = Headed()
    inject(model, ReLoRAConfig(rank=3, factors=factors, scaling_rule="learned", alpha=3))
    optimizer = build_optimizer(model, recipe, "low_rank")
    assert isinstance(optimizer.adamw, JointOptimizer)
    muon, adamw = optimizer.adamw.parts
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    theirs = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    factor_kinds = {"lora_A", "lora_B"} if factors == "both" else {"lora_B"}
    assert {name.rsplit(".", 1)[-1] for name in mine} == factor_kinds
    assert "body.down.lora_scaling" in theirs and "body.embed.weight" in theirs
    assert mine | theirs == {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.adamw.step()
    states = {names[id(p)]: set(state) for p, state in optimizer.adamw.state.items()}
    assert all(states[name] == {"momentum_buffer"} for name in mine)
    assert all(states[name] == {"step", "exp_avg", "exp_avg_sq"} for name in theirs)


@pytest.mark.parametrize("method", ["relora-online", "switchlora", "relora-as-published"])
def test_methods_that_step_factors_in_their_own_way_refuse_muon(tmp_path, method):
    with pytest.raises(ConfigError, match=r"factor_optimizer must not be 'muon' with run\.method"):
        tiny_recipe(tmp_path, run={"method": method}, optim={"factor_optimizer": "muon"})


@pytest.mark.parametrize("method", ["full", "galore", "full-muon"])
def test_without_factors_the_setting_has_no_effect(tmp_path, method):
    recipe = tiny_recipe(tmp_path, run={"method": method}, optim={"factor_optimizer": "muon"})
    assert recipe.optim.factor_optimizer == "muon"


def test_wrong_multiples_and_beta2_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"rest_lr_multiples must be above 0.*\n.*rest_beta2 must be at least 0"
    ):
        tiny_recipe(tmp_path, optim={"rest_lr_multiples": [1.0, 0.0, 1.0], "rest_beta2": 1.0})
