"""Optimizer resets: which entries go, counted in the states themselves and not in the report."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from reference.pruning import smallest
from relora import (
    ConfigError,
    NonFiniteError,
    OptimizerResetError,
    ReLoRAConfig,
    inject,
    lora_parameters,
    reset_optimizer_state_,
)
from relora.method.reset import lowest

SHAPES = {"first": (3, 7), "second": (11,), "third": (5, 1), "bystander": (4, 6)}
NAMES = ("first", "second", "third")
DTYPES = [torch.float32, torch.bfloat16]
RATIOS = [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.999, 1.0]


def stepped(dtype=torch.float32, optimizer_class=torch.optim.AdamW, steps=3, **settings):
    """Parameters and an optimizer whose states come from real steps and hold no zero."""
    generator = torch.Generator().manual_seed(5)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    params = {name: nn.Parameter(value.to(dtype)) for name, value in values.items()}
    optimizer = optimizer_class(params.values(), lr=1e-2, **settings)
    for _ in range(steps):
        for parameter in params.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return params, optimizer


def chosen(params, *names):
    return [(name, params[name]) for name in names or NAMES]


def state_of(optimizer, params):
    return {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in params.items()}


def num_zeros(tensor):
    return int((tensor == 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["coupled", "separate"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_exactly_round_ratio_numel_entries_of_every_tensor_go(method, mask, dtype):
    for ratio in RATIOS:
        params, optimizer = stepped(dtype)
        before = state_of(optimizer, params)
        report = reset_optimizer_state_(optimizer, chosen(params), method=method, ratio=ratio, mask=mask)
        for name in NAMES:
            for moment in ("exp_avg", "exp_avg_sq"):
                was, is_now = before[name][moment], optimizer.state[params[name]][moment]
                assert num_zeros(was) == 0
                assert num_zeros(is_now) == round(ratio * was.numel())
                assert torch.equal(is_now[is_now != 0], was[is_now != 0])
        targeted = sum(2 * round(ratio * params[name].numel()) for name in NAMES)
        assert (report.entries_targeted, report.entries_zeroed, report.num_states) == (targeted, targeted, 6)
        entries = sum(2 * params[name].numel() for name in NAMES)
        assert report.zeroed_fraction == pytest.approx(targeted / entries)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.95])
def test_coupled_magnitude_keeps_the_largest_first_moments_and_their_partners(dtype, ratio):
    params, optimizer = stepped(dtype, amsgrad=True)
    before = state_of(optimizer, params)
    reset_optimizer_state_(optimizer, chosen(params), method="magnitude", ratio=ratio)
    for name in NAMES:
        gone = smallest(before[name]["exp_avg"].float().numpy(), round(ratio * params[name].numel()))
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert np.array_equal((optimizer.state[params[name]][moment] == 0).numpy(), gone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_separate_magnitude_prunes_each_moment_by_itself(dtype):
    params, optimizer = stepped(dtype)
    before = state_of(optimizer, params)
    reset_optimizer_state_(optimizer, chosen(params), method="magnitude", ratio=0.7, mask="separate")
    masks = {}
    for name in NAMES:
        for moment in ("exp_avg", "exp_avg_sq"):
            gone = smallest(before[name][moment].float().numpy(), round(0.7 * params[name].numel()))
            assert np.array_equal((optimizer.state[params[name]][moment] == 0).numpy(), gone)
            masks[name, moment] = gone
    assert any(not np.array_equal(masks[name, "exp_avg"], masks[name, "exp_avg_sq"]) for name in NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_among_equal_entries_the_first_by_index_go(dtype):
    params, optimizer = stepped(dtype)
    moments = optimizer.state[params["first"]]
    moments["exp_avg"].fill_(-0.25)
    reset_optimizer_state_(optimizer, chosen(params, "first"), method="magnitude", ratio=0.5)
    assert round(0.5 * 21) == 10
    for moment in ("exp_avg", "exp_avg_sq"):
        zeros = (moments[moment].flatten() == 0).tolist()
        assert zeros == [True] * 10 + [False] * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_lowest_is_the_full_stable_sort(dtype, distinct):
    generator = torch.Generator().manual_seed(distinct)
    scores = torch.randint(0, distinct, (23, 9), generator=generator).to(dtype) / 8
    for count in (0, 1, 2, 103, 206, 207):
        assert np.array_equal(lowest(scores, count).numpy(), smallest(scores.float().numpy(), count))
        assert np.array_equal(lowest(scores.T, count).numpy(), smallest(scores.T.float().numpy(), count))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_more_than_16_million_entries_are_counted_exactly(method):
    factor = nn.Parameter(torch.empty(4100, 4100))
    optimizer = torch.optim.SGD([factor], lr=0.1, momentum=0.9)
    buffer = torch.empty_like(factor).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    optimizer.state[factor]["momentum_buffer"] = buffer
    report = reset_optimizer_state_(optimizer, [factor], method=method, ratio=0.99)
    survivors = buffer != 0
    assert buffer.numel() - int(survivors.sum()) == round(0.99 * 4100 * 4100) == report.entries_zeroed
    if method == "magnitude":
        # A uniform draw keeps its top hundredth, 1.49 to 1.5.
        assert 1.4899 < buffer[survivors].min() < 1.4901
    else:
        # Scores of low precision would tie by the ten thousand, and ties go by index. Without replacement the
        # count in one half has a standard deviation of sqrt(n/4 * 0.01 * 0.99) = 204; 4 of them.
        assert abs(int(survivors[:2050].sum()) - int(survivors.sum()) / 2) < 4 * 204


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_zero_clears_all_whatever_the_ratio(ratio):
    params, optimizer = stepped(amsgrad=True)
    report = reset_optimizer_state_(optimizer, chosen(params), method="zero", ratio=ratio)
    for name in NAMES:
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert not optimizer.state[params[name]][moment].any()
    assert report.zeroed_fraction == 1.0
    assert report.num_states == 9


@pytest.mark.parametrize("method", ["zero", "random", "magnitude", "none"])
@pytest.mark.parametrize("reset_step_count", [False, True])
def test_everything_else_stays_bit_identical(method, reset_step_count):
    params, optimizer = stepped(amsgrad=True)
    weights = {name: parameter.detach().clone() for name, parameter in params.items()}
    before, groups = state_of(optimizer, params), copy.deepcopy(optimizer.state_dict()["param_groups"])
    identities = {name: {k: id(v) for k, v in optimizer.state[p].items()} for name, p in params.items()}
    stream = torch.get_rng_state()
    reset_optimizer_state_(
        optimizer, chosen(params), method=method, ratio=0.9, reset_step_count=reset_step_count
    )
    assert torch.equal(torch.get_rng_state(), stream)
    assert optimizer.state_dict()["param_groups"] == groups
    for name, parameter in params.items():
        assert torch.equal(parameter, weights[name])
        assert {k: id(v) for k, v in optimizer.state[parameter].items()} == identities[name]
    bystander = optimizer.state[params["bystander"]]
    assert all(torch.equal(bystander[key], value) for key, value in before["bystander"].items())
    for name in NAMES:
        assert optimizer.state[params[name]]["step"].item() == (0 if reset_step_count else 3)
        if method == "none":
            moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            state = optimizer.state[params[name]]
            assert all(torch.equal(state[moment], before[name][moment]) for moment in moments)


def test_step_counts_reset_are_counted_also_as_plain_numbers():
    params, optimizer = stepped()
    optimizer.state[params["second"]]["step"] = 3
    report = reset_optimizer_state_(optimizer, chosen(params), method="zero", reset_step_count=True)
    assert report.step_counts_reset == 3
    assert optimizer.state[params["second"]]["step"] == 0


def random_masks(seed=0, names=NAMES, **settings):
    params, optimizer = stepped()
    pairs = [(name, params[key]) for name, key in zip(names, NAMES, strict=True)]
    reset_optimizer_state_(optimizer, pairs, method="random", ratio=0.5, seed=seed, **settings)
    return [optimizer.state[p][moment] == 0 for _, p in pairs for moment in ("exp_avg", "exp_avg_sq")]


def are_equal(left, right):
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


def test_random_masks_follow_from_seed_and_name_alone():
    masks = random_masks()
    torch.manual_seed(99)
    assert all(are_equal(random_masks(), masks))
    assert not any(are_equal(random_masks(seed=1), masks)[:2])
    assert not any(are_equal(random_masks(names=("other", "second", "third")), masks)[:2])
    assert all(are_equal(random_masks(names=("other", "second", "third")), masks)[2:])


def test_random_masks_are_one_for_all_moments_or_one_each():
    coupled, separate = random_masks(), random_masks(mask="separate")
    assert torch.equal(coupled[0], coupled[1])
    assert not torch.equal(separate[0], separate[1])


def test_random_masks_favour_no_position():
    factor = nn.Parameter(torch.zeros(200, 100))
    optimizer = torch.optim.SGD([factor], lr=0.1, momentum=0.9)
    optimizer.state[factor]["momentum_buffer"] = torch.ones(200, 100)
    reset_optimizer_state_(optimizer, [("factor", factor)], method="random", ratio=0.3)
    gone = optimizer.state[factor]["momentum_buffer"] == 0
    # Without replacement: sd of the count in one half is sqrt(n/4 * 0.3 * 0.7) = 32.4; 4 sigma.
    for half in (gone[:100], gone[:, :50], gone[::2]):
        assert abs(int(half.sum()) - 3000) < 4 * 32.4


def test_magnitude_ignores_the_seed():
    outcomes = []
    for seed in (0, 1):
        params, optimizer = stepped()
        reset_optimizer_state_(optimizer, chosen(params), method="magnitude", ratio=0.5, seed=seed)
        outcomes.append([optimizer.state[params[name]]["exp_avg"] for name in NAMES])
    assert all(are_equal(*outcomes))


def test_parameters_may_come_without_names_and_from_an_iterator():
    params, optimizer = stepped()
    reset_optimizer_state_(optimizer, (params[name] for name in NAMES), method="zero")
    assert not any(optimizer.state[params[name]]["exp_avg"].any() for name in NAMES)
    assert optimizer.state[params["bystander"]]["exp_avg"].any()


def test_a_parameter_never_stepped_is_named_and_the_others_are_reset():
    params, optimizer = stepped()
    late = nn.Parameter(torch.zeros(2, 3))
    optimizer.add_param_group({"params": [late]})
    report = reset_optimizer_state_(optimizer, [*chosen(params), ("late", late)], method="zero")
    assert report.without_state == ("late",)
    assert [reset.name for reset in report.parameters] == list(NAMES)
    assert late not in optimizer.state


def test_an_optimizer_that_has_not_stepped_has_nothing_to_reset():
    params, optimizer = stepped(steps=0)
    report = reset_optimizer_state_(optimizer, chosen(params), method="zero", reset_step_count=True)
    assert report.without_state == NAMES
    assert (report.num_states, report.zeroed_fraction, report.step_counts_reset) == (0, 0.0, 0)


def test_touching_nothing_although_there_are_states_raises():
    _, optimizer = stepped()
    late = nn.Parameter(torch.zeros(2, 3))
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(OptimizerResetError, match="touch no state"):
        reset_optimizer_state_(optimizer, [("late", late)], method="magnitude")
    reset_optimizer_state_(optimizer, [("late", late)], method="none")


def test_an_iterator_used_up_before_raises():
    params, optimizer = stepped()
    factors = (params[name] for name in NAMES)
    list(factors)
    with pytest.raises(OptimizerResetError, match="touch no state of 0 parameters"):
        reset_optimizer_state_(optimizer, factors, method="zero")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["zero", "magnitude", "random"])
def test_states_that_are_not_finite_are_refused_with_nothing_changed(method, poison):
    params, optimizer = stepped()
    optimizer.state[params["third"]]["exp_avg_sq"][2] = poison
    before = state_of(optimizer, params)
    with pytest.raises(NonFiniteError, match=r"exp_avg_sq.*third.*last good checkpoint"):
        reset_optimizer_state_(optimizer, chosen(params), method=method, reset_step_count=True)
    for name, parameter in params.items():
        for key, value in before[name].items():
            assert torch.allclose(optimizer.state[parameter][key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("method", "ratio"), [("half", 0.5), ("random", 1.5), ("zero", float("nan")), ("random", "1")]
)
def test_method_or_ratio_out_of_range_is_refused(method, ratio):
    params, optimizer = stepped()
    with pytest.raises(ConfigError, match=r"method must be one of|ratio must be within 0 to 1"):
        reset_optimizer_state_(optimizer, chosen(params), method=method, ratio=ratio)


def test_a_mask_that_does_not_exist_is_refused():
    params, optimizer = stepped()
    with pytest.raises(ConfigError, match="mask must be one of coupled, separate, not 'both'"):
        reset_optimizer_state_(optimizer, chosen(params), method="magnitude", mask="both")


def test_a_parameter_given_twice_is_reset_once():
    params, optimizer = stepped()
    twice = [("first", params["first"]), ("again", params["first"])]
    report = reset_optimizer_state_(optimizer, twice, method="random", ratio=0.5)
    assert num_zeros(optimizer.state[params["first"]]["exp_avg"]) == round(0.5 * 21)
    assert [reset.name for reset in report.parameters] == ["first"]


@pytest.mark.parametrize(
    "wrong", [lambda p: p.keys(), lambda p: p["first"], lambda p: [["first", p["first"]]], lambda p: [()]]
)
def test_what_is_no_parameter_is_refused(wrong):
    params, optimizer = stepped()
    with pytest.raises(ConfigError, match=r"parameters or \(name, parameter\) pairs"):
        reset_optimizer_state_(optimizer, wrong(params), method="zero")


def test_parameters_of_another_optimizer_are_refused_by_name():
    params, optimizer = stepped()
    strangers = [(f"stranger{index}", nn.Parameter(torch.zeros(2))) for index in range(5)]
    with pytest.raises(ConfigError, match="does not hold stranger0, stranger1, stranger2 and 2 more"):
        reset_optimizer_state_(optimizer, [*chosen(params), *strangers], method="zero")
    assert all(optimizer.state[params[name]]["exp_avg"].all() for name in NAMES)


def test_a_frozen_factor_needs_no_place_in_the_optimizer():
    model = nn.Sequential(nn.Linear(7, 9))
    inject(model, ReLoRAConfig(rank=3, factors="B"))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(5, 7)).square().mean().backward()
    optimizer.step()
    report = reset_optimizer_state_(optimizer, lora_parameters(model), method="zero")
    assert report.without_state == ("0.lora_A",)
    assert report.entries_zeroed == 2 * 9 * 3
