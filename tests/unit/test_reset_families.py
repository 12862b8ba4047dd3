"""Optimizer resets by family: after a full reset a parameter trains on as under a new optimizer."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from relora import ConfigError, OptimizerResetError, reset_optimizer_state_
from relora.method.adapters import OptimizerAdapter, adapter_for, register_optimizer_adapter

# torch 2.11 looks for a setting that Adafactor does not have, where there is a GPU and it was copied.
adafactor = pytest.mark.skipif(
    torch.cuda.is_available() and torch.__version__ < "2.12", reason="a copied Adafactor cannot step"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable states live on a GPU")

FAMILIES = [
    pytest.param(torch.optim.AdamW, {"foreach": False}, 2, id="AdamW"),
    pytest.param(torch.optim.AdamW, {"foreach": True}, 2, id="AdamW-foreach"),
    pytest.param(torch.optim.AdamW, {"fused": True}, 2, id="AdamW-fused"),
    pytest.param(torch.optim.AdamW, {"amsgrad": True}, 3, id="AdamW-amsgrad"),
    pytest.param(torch.optim.AdamW, {"amsgrad": True, "fused": True}, 3, id="AdamW-amsgrad-fused"),
    pytest.param(torch.optim.AdamW, {"maximize": True}, 2, id="AdamW-maximize"),
    pytest.param(torch.optim.AdamW, {"capturable": True}, 2, id="AdamW-capturable", marks=needs_cuda),
    pytest.param(torch.optim.Adam, {}, 2, id="Adam"),
    pytest.param(torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, 3, id="Adam-amsgrad"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9}, 1, id="SGD-momentum"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 1, id="SGD-nesterov"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "fused": True}, 1, id="SGD-fused"),
    pytest.param(torch.optim.Adafactor, {}, 2, id="Adafactor", marks=adafactor),
    pytest.param(torch.optim.Adafactor, {"foreach": True}, 2, id="Adafactor-foreach", marks=adafactor),
    pytest.param(torch.optim.Muon, {}, 1, id="Muon"),
    pytest.param(torch.optim.Muon, {"nesterov": False}, 1, id="Muon-plain"),
]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def stepped(optimizer_class, settings, shapes=((5, 7), (3, 4)), steps=4):
    device = "cuda" if settings.get("capturable") else "cpu"
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    optimizer = optimizer_class(params, lr=1e-2, **settings)
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
    return params, optimizer


def go_on(params, optimizer, steps=3):
    for step in range(100, 100 + steps):
        gradients(params, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
@pytest.mark.parametrize(("optimizer_class", "settings", "num_moments"), FAMILIES)
def test_a_reset_parameter_trains_on_as_under_a_new_optimizer(optimizer_class, settings, num_moments):
    params, optimizer = stepped(optimizer_class, settings)
    fresh = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    untouched_params, untouched = copy.deepcopy((params, optimizer))
    report = reset_optimizer_state_(optimizer, [params[0]], method="zero", reset_step_count=True)
    assert report.num_states == num_moments
    assert report.zeroed_fraction == 1.0
    after = go_on(params, optimizer)
    assert torch.equal(after[0], go_on(fresh, optimizer_class(fresh, lr=1e-2, **settings))[0])
    unreset = go_on(untouched_params, untouched)
    assert not torch.equal(after[0], unreset[0])
    assert torch.equal(after[1], unreset[1])


@pytest.mark.parametrize(("optimizer_class", "settings", "num_moments"), FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_every_moment_loses_the_exact_count(optimizer_class, settings, num_moments, method):
    params, optimizer = stepped(optimizer_class, settings)
    report = reset_optimizer_state_(optimizer, [params[0]], method=method, ratio=0.6)
    moments = [value for value in optimizer.state[params[0]].values() if value.numel() > 1]
    assert len(moments) == num_moments
    for moment in moments:
        assert int((moment == 0).sum()) == round(0.6 * moment.numel())
    assert report.entries_zeroed == sum(round(0.6 * moment.numel()) for moment in moments)
    assert all(parameter.isfinite().all() for parameter in go_on(params, optimizer))


def test_adafactor_of_a_vector_is_reset_too():
    params, optimizer = stepped(torch.optim.Adafactor, {}, shapes=((9,), (3, 4)))
    reset_optimizer_state_(optimizer, [params[0]], method="zero")
    assert not optimizer.state[params[0]]["variance"].any()


def test_sgd_without_momentum_remembers_nothing_and_says_so():
    params, optimizer = stepped(torch.optim.SGD, {})
    report = reset_optimizer_state_(optimizer, [("factor", params[0])], method="zero")
    assert report.num_states == 0
    assert report.without_state == ("factor",)


class UsersOwn(torch.optim.Optimizer):
    """Sign descent on an average of gradients, kept under names of its own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(trend=torch.zeros_like(parameter), age=0)
                state["trend"].lerp_(parameter.grad, 0.1)
                state["age"] += 1
                parameter.sub_(state["trend"].sign(), alpha=group["lr"])


@pytest.mark.parametrize("optimizer_class", [torch.optim.RMSprop, torch.optim.Adagrad, UsersOwn])
def test_an_unknown_family_is_refused_and_the_error_says_how_to_register_it(optimizer_class):
    params, optimizer = stepped(optimizer_class, {})
    with pytest.raises(ConfigError, match="register_optimizer_adapter") as refusal:
        reset_optimizer_state_(optimizer, params, method="zero")
    assert f"optimizer={optimizer_class.__name__}" in str(refusal.value)
    assert "AdamW" in str(refusal.value)


def test_a_users_own_optimizer_is_reset_once_registered():
    class Registered(UsersOwn):
        pass

    register_optimizer_adapter(OptimizerAdapter(optimizer=Registered, moments=("trend",), step="age"))
    params, optimizer = stepped(Registered, {})
    report = reset_optimizer_state_(
        optimizer, [params[0]], method="magnitude", ratio=0.8, reset_step_count=True
    )
    assert int((optimizer.state[params[0]]["trend"] == 0).sum()) == round(0.8 * 35) == report.entries_zeroed
    assert [optimizer.state[parameter]["age"] for parameter in params] == [0, 4]


def test_a_subclass_is_served_by_its_base_unless_it_has_an_adapter():
    class Derived(torch.optim.AdamW):
        pass

    params, optimizer = stepped(Derived, {})
    assert adapter_for(optimizer).optimizer is torch.optim.AdamW
    reset_optimizer_state_(optimizer, params, method="zero")
    assert not optimizer.state[params[0]]["exp_avg"].any()
    register_optimizer_adapter(OptimizerAdapter(optimizer=Derived, moments=("exp_avg", "exp_avg_sq")))
    assert adapter_for(optimizer).optimizer is Derived


@pytest.mark.parametrize(
    "extra", [torch.ones(5, 7), [torch.ones(5, 7)], {"codes": torch.ones(4, dtype=torch.uint8)}]
)
def test_a_state_the_adapter_does_not_name_is_refused_with_nothing_changed(extra):
    params, optimizer = stepped(torch.optim.AdamW, {})
    optimizer.state[params[0]]["slow_average"] = extra
    moments = optimizer.state[params[1]]["exp_avg"].clone()
    with pytest.raises(ConfigError, match="slow_average"):
        reset_optimizer_state_(optimizer, [params[1], params[0]], method="zero")
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], moments)


@dataclass(frozen=True, kw_only=True)
class DoesNothing(OptimizerAdapter):
    def clear_(self, state, moment, mask):
        pass


@dataclass(frozen=True, kw_only=True)
class ClearsTooMuch(OptimizerAdapter):
    def clear_(self, state, moment, mask):
        state[moment].zero_()


@dataclass(frozen=True, kw_only=True)
class ClearsACopy(OptimizerAdapter):
    def clear_(self, state, moment, mask):
        state[moment].clone().masked_fill_(mask, 0)


@dataclass(frozen=True, kw_only=True)
class KeepsTheCount(OptimizerAdapter):
    def reset_step_(self, state):
        return True


@pytest.mark.parametrize("broken", [DoesNothing, ClearsTooMuch, ClearsACopy, KeepsTheCount])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_broken_adapter_is_found_out(broken, method):
    class Mistreated(torch.optim.AdamW):
        pass

    register_optimizer_adapter(broken(optimizer=Mistreated, moments=("exp_avg", "exp_avg_sq"), step="step"))
    params, optimizer = stepped(Mistreated, {})
    with pytest.raises(OptimizerResetError, match=rf"(?s)parameter 0.*{broken.__name__}.*broken"):
        reset_optimizer_state_(optimizer, params, method=method, ratio=0.5, reset_step_count=True)


class EightBit(torch.optim.Optimizer):
    """Momentum stored as bytes, 128 for zero, with one scale a tensor: zero codes are not zero values."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                scale = parameter.grad.abs().max() / 127
                codes = (parameter.grad / scale).round() + 128
                state.update(codes=codes.to(torch.uint8), scale=scale)


@dataclass(frozen=True, kw_only=True)
class EightBitAdapter(OptimizerAdapter):
    def read(self, state, moment):
        return (state[moment].float() - 128) * state["scale"]

    def clear_(self, state, moment, mask):
        state[moment].masked_fill_(mask, 128)


def test_encoded_states_are_pruned_by_their_decoded_values():
    adapter = EightBitAdapter(optimizer=EightBit, moments=("codes",))
    register_optimizer_adapter(adapter)
    params, optimizer = stepped(EightBit, {})
    state = optimizer.state[params[0]]
    before = adapter.read(state, "codes").clone()
    report = reset_optimizer_state_(optimizer, params[:1], method="magnitude", ratio=0.8)
    after = adapter.read(state, "codes")
    survivors = after != 0
    assert int(survivors.sum()) == 35 - round(0.8 * 35)
    assert torch.equal(after[survivors], before[survivors])
    assert before[survivors].abs().min() >= before[~survivors].abs().max()
    assert report.entries_zeroed == 28


def test_an_adapter_that_clears_codes_instead_of_values_is_found_out():
    class Miscoded(EightBit):
        pass

    @dataclass(frozen=True, kw_only=True)
    class ZeroesCodes(EightBitAdapter):
        def clear_(self, state, moment, mask):
            state[moment].masked_fill_(mask, 0)

    register_optimizer_adapter(ZeroesCodes(optimizer=Miscoded, moments=("codes",)))
    params, optimizer = stepped(Miscoded, {})
    with pytest.raises(OptimizerResetError, match="of 35 targeted entries 0 are 0"):
        reset_optimizer_state_(optimizer, params[:1], method="zero")


class StatesAreCopies(torch.optim.AdamW):
    """As wrappers do that gather sharded states: once trained, `state` is a copy made on demand."""

    is_trained = False

    @property
    def state(self):
        if not self.is_trained:
            return self.kept
        return {parameter: copy.deepcopy(state) for parameter, state in self.kept.items()}

    @state.setter
    def state(self, value):
        self.kept = value


@pytest.mark.parametrize("settings", [{"method": "zero"}, {"method": "none", "reset_step_count": True}])
def test_a_reset_of_a_copy_of_the_states_is_found_out(settings):
    params, optimizer = stepped(StatesAreCopies, {})
    optimizer.is_trained = True
    with pytest.raises(OptimizerResetError, match="parameter 0"):
        reset_optimizer_state_(optimizer, params, **settings)


def test_encoded_states_without_an_adapter_that_decodes_them_are_refused():
    class Compressed(torch.optim.AdamW):
        pass

    params, optimizer = stepped(Compressed, {})
    codes = torch.full((3, 4), 7, dtype=torch.uint8)
    optimizer.state[params[1]]["exp_avg"] = codes
    untouched = optimizer.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ConfigError, match=r"'exp_avg' is stored as torch\.uint8.*register"):
        reset_optimizer_state_(optimizer, params, method="zero")
    assert torch.equal(codes, torch.full_like(codes, 7))
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], untouched)
