"""An optimizer taken through a checkpoint goes on bit for bit as one that was never stopped."""

from pathlib import Path

import pytest
import torch
from torch import nn

from relora.checkpoint.codec import optimizer_tensors, restore_optimizer_
from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.errors import CheckpointError

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adamw amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "adamw tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "muon": lambda groups: torch.optim.Muon(groups, lr=0.01),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01),
    "lbfgs": lambda groups: torch.optim.LBFGS(groups[0]["params"], lr=0.01, max_iter=2),
}


class Net(nn.Module):
    """Two matrices, one of them transposed in memory, and one weight that never gets a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))
        self.second = nn.Parameter(torch.randn(7, 3, generator=generator).to(dtype).t())
        self.unused = nn.Parameter(torch.zeros(2, 2, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(inputs @ self.first.t()) @ self.second.t()


def build(make, dtype: torch.dtype = torch.float32):
    model = Net(dtype)
    optimizer = make(
        [{"params": [model.first, model.unused]}, {"params": [model.second], "lr": 0.003, "note": "b"}]
    )
    return model, optimizer, {parameter: name for name, parameter in model.named_parameters()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler=None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 5, generator=generator).to(model.first.dtype)

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()


def through_disk(tmp_path: Path, tensors, state):
    path = save_checkpoint(
        tmp_path, step=1, tensors={"optimizer": tensors}, state={"o": state}, description={}
    )
    loaded = load_checkpoint(path)
    return loaded.tensors["optimizer"], loaded.state["o"]


def assert_same(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, kind, dtype):
    model, optimizer, names = build(OPTIMIZERS[kind], dtype)
    train(model, optimizer, range(4))
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))

    resumed, restored, resumed_names = build(OPTIMIZERS[kind], dtype)
    train(resumed, restored, range(90, 92))  # a state of its own, which must not survive
    with torch.no_grad():
        for one, other in zip(resumed.parameters(), model.parameters(), strict=True):
            one.copy_(other)
    report = restore_optimizer_(restored, resumed_names, tensors, state)
    assert_same(restored.state_dict(), optimizer.state_dict())
    assert report.num_tensors == len(tensors)
    assert report.num_parameters == sum(len(group["params"]) for group in optimizer.param_groups)

    train(model, optimizer, range(4, 8))
    train(resumed, restored, range(4, 8))
    for one, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_same(restored.state_dict(), optimizer.state_dict())


def test_fp32_moments_of_bf16_weights_are_not_rounded(tmp_path):
    model, optimizer, names = build(OPTIMIZERS["adamw"], torch.bfloat16)
    train(model, optimizer, range(2))
    moment = torch.tensor(1.0) + 2**-20
    optimizer.state[model.first]["exp_avg"] = torch.full((7, 5), moment.item())
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))
    _, restored, names = build(OPTIMIZERS["adamw"], torch.bfloat16)
    restore_optimizer_(restored, names, tensors, state)
    found = next(values for parameter, values in restored.state.items() if names[parameter] == "first")
    assert found["exp_avg"].dtype == torch.float32
    assert torch.equal(found["exp_avg"], torch.full((7, 5), moment.item()))


def test_states_are_found_by_name_when_groups_and_parameters_change_places(tmp_path):
    model, optimizer, names = build(OPTIMIZERS["adamw"])
    train(model, optimizer, range(3))
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))
    other = Net()
    moved = torch.optim.AdamW([{"params": [other.second]}, {"params": [other.unused, other.first]}], lr=1.0)
    restore_optimizer_(
        moved, {parameter: name for name, parameter in other.named_parameters()}, tensors, state
    )
    assert torch.equal(moved.state[other.first]["exp_avg"], optimizer.state[model.first]["exp_avg"])
    assert moved.param_groups[0]["lr"] == 0.003
    assert moved.param_groups[1]["lr"] == 0.01
    assert moved.param_groups[1]["betas"] == (0.8, 0.95)
    assert moved.param_groups[1]["params"] == [other.unused, other.first]


def test_hyperparameters_come_back_with_their_types_and_schedulers_see_them(tmp_path):
    def scheduled():
        model, optimizer, names = build(OPTIMIZERS["adamw"])
        return model, optimizer, names, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    model, optimizer, names, scheduler = scheduled()
    optimizer.param_groups[0]["custom"] = {"levels": [1, (2.5, None)], "on": True, "limit": float("inf")}
    train(model, optimizer, range(3), scheduler)
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))
    _, restored, resumed_names, again = scheduled()
    group = restored.param_groups[0]
    restore_optimizer_(restored, resumed_names, tensors, state)
    assert restored.param_groups[0] is group
    assert group["custom"] == {"levels": [1, (2.5, None)], "on": True, "limit": float("inf")}
    assert group["initial_lr"] == 0.01
    assert group["lr"] == optimizer.param_groups[0]["lr"] == 0.01 * 0.9**3
    assert type(group["betas"]) is tuple
    again.load_state_dict(scheduler.state_dict())
    again.step()
    scheduler.step()
    assert group["lr"] == optimizer.param_groups[0]["lr"]


def test_parameters_without_state_stay_without_and_are_named(tmp_path):
    model, optimizer, names = build(OPTIMIZERS["adamw"])
    train(model, optimizer, range(1))
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))
    resumed, restored, names = build(OPTIMIZERS["adamw"])
    resumed.unused.grad = torch.ones(2, 2)
    restored.step()
    report = restore_optimizer_(restored, names, tensors, state)
    assert report.without_state == ("unused",)
    assert resumed.unused not in restored.state


def test_an_optimizer_that_has_not_stepped_comes_back_empty(tmp_path):
    _, optimizer, names = build(OPTIMIZERS["adamw"])
    tensors, state = through_disk(tmp_path, *optimizer_tensors(optimizer, names))
    _, restored, names = build(OPTIMIZERS["adamw"])
    report = restore_optimizer_(restored, names, tensors, state)
    assert tensors == {}
    assert report.without_state == ("first", "unused", "second")
    assert len(restored.state) == 0


def test_empty_groups_are_no_trouble():
    weight = nn.Parameter(torch.ones(2))
    groups = [{"params": [], "lr": 0.1}, {"params": [weight], "lr": 0.2}, {"params": [], "lr": 0.3}]
    saved = optimizer_tensors(torch.optim.SGD(groups, lr=1.0), {weight: "w"})
    again = torch.optim.SGD([{"params": []}, {"params": []}, {"params": [weight]}], lr=1.0)
    restore_optimizer_(again, {weight: "w"}, *saved)
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.3, 0.2]


def test_the_restored_state_is_independent_of_the_tensors_it_came_from():
    model, optimizer, names = build(OPTIMIZERS["adamw"])
    train(model, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, names)
    _, restored, resumed_names = build(OPTIMIZERS["adamw"])
    restore_optimizer_(restored, resumed_names, tensors, state)
    for tensor in tensors.values():
        tensor.fill_(7)
    assert not any((tensor == 7).all() for values in restored.state.values() for tensor in values.values())


def refused(optimizer, names, tensors, state, match: str) -> None:
    before = optimizer.state_dict()
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(CheckpointError, match=match):
        restore_optimizer_(optimizer, names, tensors, state)
    assert_same(optimizer.state_dict(), before)
    assert [set(group) for group in optimizer.param_groups] == [set(group) for group in groups]


@pytest.fixture
def saved():
    model, optimizer, names = build(OPTIMIZERS["adamw"])
    train(model, optimizer, range(2))
    return optimizer_tensors(optimizer, names)


@pytest.fixture
def target():
    model, optimizer, names = build(OPTIMIZERS["adamw"])
    train(model, optimizer, range(5, 6))
    return optimizer, names


def test_names_on_one_side_only_are_named(saved, target):
    optimizer, names = target
    renamed = {parameter: "third" if name == "second" else name for parameter, name in names.items()}
    refused(optimizer, renamed, *saved, match=r"'second' is in the checkpoint.*third is in the optimizer")


def test_shapes_and_dtypes_that_differ_are_named(saved, target):
    tensors, state = saved
    wide = {**state["parameters"], "first": [[7, 6], "float32"], "second": [[3, 7], "bfloat16"]}
    refused(
        *target, tensors, {**state, "parameters": wide}, match=r"first is .*7, 5.*7, 6.*second is .*bfloat16"
    )


def test_a_tensor_of_another_shape_is_named(saved, target):
    tensors, state = saved
    refused(
        *target,
        {**tensors, "first/exp_avg": torch.zeros(7, 6)},
        state,
        match="first/exp_avg should be .*7, 5",
    )


def test_a_missing_tensor_and_one_too_much_are_named(saved, target):
    tensors, state = saved
    fewer = {key: value for key, value in tensors.items() if key != "second/exp_avg_sq"}
    refused(*target, fewer, state, match="second/exp_avg_sq' is missing")
    refused(*target, {**tensors, "stray": torch.zeros(1)}, state, match="'stray'")


def test_the_state_of_another_kind_of_optimizer_is_refused(saved, target):
    _, names = target
    refused(torch.optim.SGD(list(names), lr=0.1), names, *saved, match="it is a SGD, the state is of 'AdamW'")


def test_other_groups_are_refused(saved):
    model = Net()
    names = {parameter: name for name, parameter in model.named_parameters()}
    refused(torch.optim.AdamW(model.parameters()), names, *saved, match="divided into other groups")


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 1},
        {"groups": [{"parameters": [1], "options": {}}]},
        {"states": []},
        {"states": {"first": 3}},
        {"parameters": None},
        {"kind": 1},
    ],
)
def test_a_malformed_state_is_refused(saved, target, change):
    tensors, state = saved
    refused(*target, tensors, {**state, **change}, match="malformed")


@pytest.mark.parametrize("value", [{"odd": 1}, {"tuple": 3}, {"float": "1.5"}, {"tensor": 3}, [1], {}])
def test_a_malformed_value_is_refused(saved, target, value):
    tensors, state = saved
    states = {**state["states"], "second": {**state["states"]["second"], "extra": value}}
    refused(*target, tensors, {**state, "states": states}, match="not an encoded value|missing")


def test_parameters_without_a_name_are_refused(target):
    optimizer, names = target
    with pytest.raises(CheckpointError, match=r"shape \(7, 5\) in group 0 has no name"):
        optimizer_tensors(
            optimizer, {parameter: name for parameter, name in names.items() if name != "first"}
        )
    with pytest.raises(CheckpointError, match="two parameters are named same"):
        optimizer_tensors(optimizer, dict.fromkeys(names, "same"))


def test_what_is_neither_tensor_nor_json_is_refused_by_its_place(target):
    optimizer, names = target
    optimizer.param_groups[1]["hook"] = print
    with pytest.raises(CheckpointError, match=r"param_groups/1/hook: a builtin_function"):
        optimizer_tensors(optimizer, names)
