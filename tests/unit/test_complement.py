"""The residual: what the factors cannot see moves the base, by the right size, and reports itself."""

import copy
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from loops import Loop, adamw, batch, differing, tiny_model
from method_samples import LAYER_KINDS, Branches, as_rows, numpy64
from reference.beyond import SplitAdam, complement, majority, newton_schulz, unit_columns
from relora import ConfigError, LoRALinear, NonFiniteError, ReLoRAConfig, inject
from relora.method.complement import RESIDUALS, LayerObserver
from relora.method.observe import Observers
from relora.method.residuals import Pass

CONFIG = ReLoRAConfig(
    rank=3, factors="B", residual="sign", scaling_rule="matched", reset="none", restart_every=100
)
LR = 1e-2


def plain_gradients(loop, x, y, parts=1):
    """The weight gradients of each micro batch by autograd, on a plain model of the loop's function."""
    plain = tiny_model(torch.float64)
    with torch.no_grad():
        for name in ("up", "down"):
            layer = getattr(loop.model, name)
            rows = slice(None)
            getattr(plain, name).weight.copy_(layer.weight_rows(rows).double() + layer.delta().double())
            getattr(plain, name).bias.copy_(layer.bias)
        plain.norm.load_state_dict(loop.model.norm.state_dict())
    found = {"up": [], "down": []}
    for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
        plain.zero_grad()
        ((plain(part.double()) - target).square().mean() / parts).backward()
        for name, gradients in found.items():
            gradients.append(numpy64(getattr(plain, name).weight.grad))
    return found


def step_on(loop, step, parts=1):
    """One optimizer step of `parts` micro batches, without after_step."""
    x, y = batch(step)
    for optimizer in loop.optimizers:
        optimizer.zero_grad()
    for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
        ((loop.model(part.to(loop.dtype)).float() - target).square().mean() / parts).backward()
    for optimizer in loop.optimizers:
        optimizer.step()


def layers(loop):
    return {"up": loop.model.up, "down": loop.model.down}


def masters(loop):
    return {name: numpy64(layer.master_rows(slice(None)).clone()) for name, layer in layers(loop).items()}


@pytest.mark.parametrize("residual", ["sign", "column", "muon"])
@pytest.mark.parametrize("init", ["orthonormal", "columns"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bases_move_against_the_complement_of_the_plain_models_gradient(residual, init, parts, dtype):
    loop = Loop(replace(CONFIG, residual=residual, residual_scale=0.3, init=init), tiny_model(dtype))
    before = masters(loop)
    gradients = plain_gradients(loop, *batch(1), parts=parts)
    step_on(loop, 1, parts)
    untouched = masters(loop)
    assert all(np.array_equal(untouched[name], before[name]) for name in before)
    loop.relora.after_step(1)
    # bf16 forwards round; entries whose gradient is small beside that may go either way.
    allowed = {torch.float64: 0.0, torch.float32: 0.02, torch.bfloat16: 0.15}[dtype]
    rtol = {torch.float64: 2**-7, torch.float32: 2**-7, torch.bfloat16: 0.4}[dtype]
    for name, after in masters(loop).items():
        parts_of_it = [complement(g, numpy64(layers(loop)[name].lora_A)) for g in gradients[name]]
        if residual == "sign":
            wanted = majority(parts_of_it)
            close = np.isclose(after, before[name] - 0.3 * LR * wanted, rtol=0, atol=1e-7)
            assert close.mean() >= 1 - allowed
        elif residual == "muon":
            step = 0.2 * math.sqrt(max(after.shape)) * newton_schulz(sum(parts_of_it))
            error = np.linalg.norm((before[name] - after) / (0.3 * LR) - step) / np.linalg.norm(step)
            # Without float64 the momentum is of bf16, of which small singular values have few bits.
            assert error < {torch.float64: 1e-5, torch.float32: 0.1, torch.bfloat16: 0.5}[dtype]
        else:
            wanted = before[name] - 0.3 * LR * unit_columns(sum(parts_of_it))
            np.testing.assert_allclose(after, wanted, rtol=0, atol=0.3 * LR * 3 * rtol)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("init", ["orthonormal", "columns"])
def test_adam_in_the_subspace_and_sign_outside_is_the_split_optimizer(kind, init):
    torch.manual_seed(0)
    model = nn.Sequential(LAYER_KINDS[kind](13, 6)).double()
    config = replace(CONFIG, residual_scale=0.7, init=init)
    weight = as_rows(model[0]).copy()
    loop = Loop(config, model, lambda m: torch.optim.AdamW([m[0].lora_B], lr=LR, weight_decay=0.0))
    layer, target = loop.model[0], torch.randn(6, 13, dtype=torch.float64)
    reference = SplitAdam(weight, numpy64(layer.lora_A), betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 9):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(20, 13, generator=generator, dtype=torch.float64)
        loop.optimizers[0].zero_grad()
        ((loop.model(x) - layer.bias - x @ target.T).square().sum() / 2).backward()
        loop.optimizers[0].step()
        loop.relora.after_step(step)
        error = numpy64(x) @ (reference.weight - numpy64(target)).T
        sign_lr = 0.7 * LR  # matched: the factors' own step has size lr
        reference.step(error.T @ numpy64(x), lr=LR, scaling=math.sqrt(13 / 3), sign_lr=sign_lr)
        np.testing.assert_allclose(as_rows(layer) + numpy64(layer.delta()), reference.weight, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 1.0),
        ({"kappa": 0.5}, 0.5),
        ({"residual_scale": 0.1}, 0.1),
        ({"scaling_rule": "alpha/r", "alpha": 6.0}, 2.0 * math.sqrt(3 / 7)),
        ({"scaling_rule": "learned", "alpha": 6.0}, 2.0 * math.sqrt(3 / 7)),
        ({"init": "cover", "kappa": 2.0}, 2.0),
    ],
)
def test_the_step_has_the_size_of_the_factors_own(changes, size):
    loop = Loop(replace(CONFIG, **changes))
    before = numpy64(loop.model.up.weight)
    # "learned" moves its scaling in the same step; a rate of nearly 0 there keeps the expected size.
    loop.run(1, 1)
    moved = np.abs(numpy64(loop.model.up.weight) - before)
    tolerance = 0.02 if changes.get("scaling_rule") == "learned" else 1e-4
    np.testing.assert_allclose(moved, LR * size, rtol=tolerance)


def test_each_layer_steps_by_the_rate_of_its_own_group_in_force():
    def two_rates(model):
        down = [model.down.lora_B]
        rest = [p for p in model.parameters() if p.requires_grad and p is not down[0]]
        return torch.optim.AdamW([{"params": rest, "lr": LR}, {"params": down, "lr": 3 * LR}])

    loop = Loop(CONFIG, None, two_rates)
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizers[0], lambda done: 1.0 if done else 0.5)
    for step, multiplier in ((1, 0.5), (2, 1.0)):
        before = {name: numpy64(layer.weight) for name, layer in layers(loop).items()}
        loop.run(step, step)
        scheduler.step()
        for name, rate in (("up", LR), ("down", 3 * LR)):
            moved = np.abs(numpy64(layers(loop)[name].weight) - before[name])
            np.testing.assert_allclose(moved, multiplier * rate, rtol=1e-4)


def test_every_kth_step_is_observed_counted_from_injection():
    loop = Loop(replace(CONFIG, residual_every=3), start=10)
    moved = []
    for step in range(11, 21):
        before = loop.model.up.weight.detach().clone()
        assert bool(loop.model.up.observers) == (step in (13, 16, 19))
        loop.run(step, step)
        moved += [step] if not torch.equal(before, loop.model.up.weight) else []
    assert moved == [13, 16, 19]
    assert loop.relora.complement_report.step == 19


def test_the_report_is_what_moved_and_is_read_from_the_base():
    loop = Loop(replace(CONFIG, residual_scale=0.5))
    assert loop.relora.complement_report is None
    before = masters(loop)
    loop.run(1, 1)
    after = masters(loop)
    change = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    report = loop.relora.complement_report
    assert (report.step, report.residual, report.num_layers) == (1, "sign", 2)
    assert report.moved_fraction == np.mean(change != 0)
    assert report.step_rms == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-5)
    assert report.num_non_finite == 0 and report.without_backward == ()
    assert json.loads(json.dumps(report.as_dict()))["step_rms"] == report.step_rms


def test_a_base_that_rounds_its_step_away_reports_that_nothing_moved():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        native = Loop(
            replace(CONFIG, merge_precision="native", residual_scale=1e-4), tiny_model(torch.bfloat16)
        )
    exact = Loop(replace(CONFIG, residual_scale=1e-4), tiny_model(torch.bfloat16))
    for loop in (native, exact):
        loop.run(1, 1)
    assert native.relora.complement_report.moved_fraction < 0.05
    assert exact.relora.complement_report.moved_fraction > 0.9


def test_steps_too_small_for_bf16_add_up_in_the_master():
    loop = Loop(replace(CONFIG, residual_scale=1e-3), tiny_model(torch.bfloat16))
    start = masters(loop)
    total = {name: np.zeros_like(value) for name, value in start.items()}
    for step in range(1, 41):
        before = masters(loop)
        loop.run(step, step)
        for name, value in masters(loop).items():
            total[name] += np.sign(value - before[name])
    for name, value in masters(loop).items():
        np.testing.assert_allclose(value - start[name], total[name] * 1e-3 * LR, atol=40 * 2**-24)
        assert np.abs(total[name]).max() >= 8


def test_a_restart_merges_and_the_complement_of_its_step_is_not_lost():
    config = replace(CONFIG, restart_every=3)
    both, only_restart = Loop(config), Loop(replace(config, residual="none"))
    for loop in (both, only_restart):
        # The same weights up to the restart's step: only that step's complement tells them apart.
        loop.run(1, 2)
    only_restart.model.load_state_dict(both.model.state_dict())
    only_restart.optimizers[0].load_state_dict(copy.deepcopy(both.optimizers[0].state_dict()))
    old = {name: numpy64(layer.lora_A) for name, layer in layers(both).items()}
    gradients = plain_gradients(both, *batch(3))
    for loop in (both, only_restart):
        loop.run(3, 3)
    assert both.reports[0].step == only_restart.reports[0].step == 3
    for name, lora_A in old.items():
        wanted = numpy64(getattr(only_restart.model, name).weight)
        wanted = wanted - LR * np.sign(complement(gradients[name][0], lora_A))
        close = np.isclose(numpy64(getattr(both.model, name).weight), wanted, atol=1e-6)
        assert close.mean() > 0.98


def test_a_refused_restart_leaves_the_bases_where_they_were():
    loop = Loop(replace(CONFIG, restart_every=2))
    loop.run(1, 1)
    loop.update(2)
    loop.optimizers[0].state[loop.model.up.lora_B]["exp_avg"][0, 0] = torch.nan
    before = loop.everything()
    with pytest.raises(NonFiniteError):
        loop.relora.after_step(2)
    assert differing(before, loop.everything()) == []


def test_votes_of_a_step_that_was_given_up_are_dropped():
    tried, plain = Loop(CONFIG), Loop(CONFIG)
    tried.loss(77).backward()
    tried.relora.discard_step()
    for loop in (tried, plain):
        loop.run(1, 3)
    assert differing(tried.everything(), plain.everything()) == []


@pytest.mark.parametrize("residual", ["sign", "column"])
def test_resumed_in_mid_cycle_is_bit_equal(residual):
    config = replace(
        CONFIG, residual=residual, residual_every=2, restart_every=4, init="gradient", reset="transport"
    )
    whole = Loop(config, tiny_model(torch.bfloat16))
    saved = {}
    for step in range(1, 11):
        whole.run(step, step)
        saved[step] = whole.state()
    expected = whole.everything()
    for step in range(1, 10):
        resumed = Loop(config, tiny_model(torch.bfloat16))
        resumed.load(saved[step])
        resumed.run(step + 1, 10)
        assert differing(expected, resumed.everything()) == [], step


def test_entries_that_are_not_finite_cast_no_vote_and_are_counted():
    loop = Loop(CONFIG)
    x, y = batch(1)
    loop.model(x).sub(y).square().mean().backward()
    before = numpy64(loop.model.up.weight)
    observer = loop.model.up.observers[0]
    votes = observer.held.clone()
    bad = torch.zeros(2, 11)
    bad[:, 4] = math.inf
    bad[:, 5] = math.nan
    observer.observe(torch.ones(2, 7), bad)
    assert torch.equal(observer.held, votes)
    loop.optimizers[0].step()
    loop.relora.after_step(1)
    assert loop.relora.complement_report.num_non_finite == 14
    after = numpy64(loop.model.up.weight)
    assert np.isfinite(after).all() and (np.abs(after - before) > 0).mean() > 0.95


def test_a_layer_that_no_backward_reached_is_named_and_stays():
    loop = Loop(CONFIG, Branches())
    idle = loop.model.idle.weight.detach().clone()
    loop.run(1, 2)
    report = loop.relora.complement_report
    assert report.without_backward == ("idle",)
    assert report.moved_fraction == pytest.approx(0.5, abs=0.01)
    assert torch.equal(loop.model.idle.weight, idle)


def test_a_step_of_which_nothing_was_seen_is_refused():
    loop = Loop(CONFIG)
    loop.optimizers[0].step()
    with pytest.raises(ConfigError, match=r"step 1: residual='sign' saw no backward pass through any of 2"):
        loop.relora.after_step(1)


def test_many_micro_batches_do_not_wrap_around():
    votes = RESIDUALS["sign"]
    held = torch.zeros(1, 3, dtype=torch.int8)
    for before in range(300):
        place = Pass(num_before=before, world_size=1, generator=torch.Generator())
        votes.add_(held, torch.tensor([[1.0, -1.0, 0.0]]), place)
    assert held.tolist() == [[127, -127, 0]]
    for world_size in (1, 2, 8, 127, 128, 1000):
        shared = votes.to_share(held.clone(), world_size)
        total = shared.to(torch.int64) * world_size
        assert total.abs().max() <= torch.iinfo(shared.dtype).max
        assert votes.directions(total)(slice(None)).tolist() == [[1, -1, 0]]


def test_gradient_rows_and_the_complement_share_a_step():
    loop = Loop(replace(CONFIG, init="gradient", restart_every=3))
    loop.run(1, 2)
    assert len(loop.model.up.observers) == 2
    loop.run(3, 3)
    assert loop.reports[0].gradient_init.gradient_rows == 6
    assert loop.relora.complement_report.step == 3


@pytest.mark.parametrize("residual", ["sign", "column"])
def test_an_optimizer_whose_rate_is_a_tensor_works_too(residual):
    def tensor_rate(model):
        return adamw(model, lr=torch.tensor(LR))

    config = replace(CONFIG, residual=residual)
    tensor, number = Loop(config, None, tensor_rate), Loop(config)
    for loop in (tensor, number):
        loop.run(1, 3)
    for name in ("up", "down"):
        torch.testing.assert_close(getattr(tensor.model, name).weight, getattr(number.model, name).weight)


def test_settings_without_effect_are_warned_of():
    with pytest.warns(UserWarning) as caught:
        inject(tiny_model(), ReLoRAConfig(rank=3, residual_every=5, residual_scale=0.3, init_mix=0.5))
    messages = [str(warning.message) for warning in caught]
    for setting in ("residual_every", "residual_scale", "init_mix"):
        assert any(message.startswith(f"{setting} has no effect with") for message in messages)


def test_base_weight_decay_and_growing_cycles_compose():
    config = replace(CONFIG, base_weight_decay=0.5, restart_every=2, restart_growth=1.5)
    loop, bare = Loop(config), Loop(replace(config, base_weight_decay=0.0))
    for each in (loop, bare):
        each.run(1, 1)
    stood = numpy64(loop.model.up.weight)
    for each in (loop, bare):
        each.run(2, 2)
    # Decay takes the base as it stood, neither the delta nor the complement of the restart's own step.
    decayed = numpy64(bare.model.up.weight) - (1 - (1 - LR * 0.5) ** 2) * stood
    np.testing.assert_allclose(numpy64(loop.model.up.weight), decayed, atol=1e-6)
    loop.run(3, 17)
    assert [report.step for report in loop.reports] == [2, 5, 9, 16]


@pytest.mark.parametrize("init", ["orthonormal", "gradient"])
def test_a_step_that_was_not_taken_moves_no_base_and_the_next_one_does(init):
    loop = Loop(replace(CONFIG, init=init, base_weight_decay=0.1, restart_every=2))
    before = masters(loop)
    step_on(loop, 1)
    loop.relora.after_step(1, was_taken=False)
    assert all(np.array_equal(after, before[name]) for name, after in masters(loop).items())
    assert loop.relora.complement_report is None
    step_on(loop, 2)
    loop.relora.after_step(2)
    assert loop.relora.complement_report.step == 2
    assert all((after != before[name]).any() for name, after in masters(loop).items())


def moved_layers(loop, steps):
    """Names of the layers whose base each step moved."""
    found = []
    for step in steps:
        before = masters(loop)
        loop.run(step, step)
        after = masters(loop)
        found.append([name for name in before if not np.array_equal(before[name], after[name])])
    return found


def four_layers():
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(4)), nn.Linear(7, 9))


class TurnLoop(Loop):
    @property
    def named(self):
        return {f"{i}": m for i, m in enumerate(m for m in self.model.modules() if isinstance(m, LoRALinear))}


@pytest.mark.parametrize(
    ("at_once", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [3, 2]), (5, [5]), (9, [5])]
)
@pytest.mark.parametrize("every", [1, 2])
def test_layers_take_turns_once_a_round_in_a_seeded_order(at_once, sizes, every, monkeypatch):
    monkeypatch.setattr("test_complement.layers", lambda loop: loop.named)
    config = replace(CONFIG, residual_layers=at_once, residual_every=every)
    rounds = {}
    for seed in (0, 0, 1):
        loop = TurnLoop(config, four_layers(), seed=seed)
        moved = moved_layers(loop, range(1, 1 + 2 * every * len(sizes)))
        assert all(not names for step, names in enumerate(moved, start=1) if step % every)
        taken = moved[every - 1 :: every]
        for lap in (taken[: len(sizes)], taken[len(sizes) :]):
            assert [len(names) for names in lap] == sizes
            assert sorted(name for names in lap for name in names) == list("01234")
        assert rounds.setdefault(seed, taken) == taken
    if len(sizes) > 1:
        assert rounds[0] != rounds[1]
        assert any(
            rounds[seed][: len(sizes)] != rounds[seed][len(sizes) :] for seed in rounds
        )  # another order in each round


def test_a_layer_in_its_turn_steps_as_it_would_among_all():
    alone, among = (Loop(replace(CONFIG, residual_layers=k), tiny_model()) for k in (1, None))
    before = masters(alone)
    for loop in (alone, among):
        loop.run(1, 1)
    (name,) = [name for name in before if not np.array_equal(masters(alone)[name], before[name])]
    assert np.array_equal(masters(alone)[name], masters(among)[name])
    assert alone.relora.complement_report.num_layers == 1


@pytest.mark.parametrize("is_model_first", [True, False])
@pytest.mark.parametrize("init", ["orthonormal", "columns"])
def test_a_resumed_run_sees_by_the_rows_that_were_loaded_whatever_was_loaded_first(init, is_model_first):
    config = replace(CONFIG, init=init, reset="transport", restart_every=3)
    whole, cut, resumed = (Loop(config, tiny_model()) for _ in range(3))
    whole.run(1, 9)
    cut.run(1, 4)
    resumed.load(cut.state(), is_model_first=is_model_first)
    resumed.run(5, 9)
    assert differing(resumed.everything(), whole.everything()) == []


def test_turns_go_on_where_a_resumed_run_left_them():
    config = replace(CONFIG, residual_layers=1, restart_every=3)
    whole, cut = Loop(config, tiny_model()), Loop(config, tiny_model())
    whole.run(1, 9)
    cut.run(1, 4)
    resumed = Loop(config, tiny_model())
    resumed.load(cut.state())
    resumed.run(5, 9)
    assert differing(resumed.everything(), whole.everything()) == []


@pytest.mark.parametrize(("residual", "bytes_each"), [("sign", 1), ("column", 2)])
def test_costs_are_those_of_the_layers_whose_turn_it_was(residual, bytes_each):
    loop = Loop(replace(CONFIG, residual=residual, residual_layers=1), tiny_model())
    rows, rank = 16, 3
    for step in (1, 2):
        step_on(loop, step, parts=2)
        loop.relora.after_step(step)
        report = loop.relora.complement_report
        (layer,) = report.layers
        weights = {"up": 11 * 7, "down": 9 * 11}[layer.name]
        assert report.flops == 2 * weights * rows + 2 * 4 * weights * rank
        assert (report.held_bytes, report.shared_bytes) == (bytes_each * weights, 0)
        assert report.as_dict()["flops"] == report.flops


def test_turns_of_which_nothing_was_seen_are_refused_once_every_layer_had_one():
    torch.manual_seed(0)
    loop = Loop(replace(CONFIG, residual_layers=1), Branches())
    with pytest.raises(ConfigError, match="saw no backward pass through any of 2 layers"):
        for step in (1, 2, 3):  # no backward at all
            loop.relora.after_step(step)
    assert loop.relora.state_dict()["step"] == 2
    loop = Loop(replace(CONFIG, residual_layers=1), Branches())
    loop.run(1, 6)  # one of the two branches is never used


# lora_B's gradient comes of what the observer forms


def one_layer(kind, *, is_observed, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(LAYER_KINDS[kind](13, 6)).to(dtype)
    inject(model, replace(CONFIG, forward="effective", **changes))
    (layer,) = model
    with torch.no_grad():
        layer.lora_B.normal_()
    if is_observed:
        layer.observers = Observers((LayerObserver(layer, RESIDUALS["sign"]),))
    return layer


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("changes", [{}, {"scaling_rule": "learned", "alpha": 6.0}, {"init": "columns"}])
def test_an_observed_layer_has_the_gradients_of_one_that_is_not(kind, use_reentrant, changes):
    found = []
    for is_observed in (False, True):
        layer = one_layer(kind, is_observed=is_observed, **changes)
        x = torch.randn(5, 4, 13, dtype=torch.float64, requires_grad=True)
        for _ in range(2):  # gradients of two micro batches add up
            y = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
            y.sin().sum().backward()
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        found.append([x.grad, *trained])
        torch.manual_seed(0)
    assert len(found[0]) == (4 if "scaling_rule" in changes else 3)
    for without, observed in zip(*found, strict=True):
        torch.testing.assert_close(observed, without)


def test_an_observed_layer_has_second_derivatives_too():
    found = []
    for is_observed in (False, True):
        layer = one_layer("linear", is_observed=is_observed)
        x = torch.linspace(-1, 1, 26, dtype=torch.float64).view(2, 13).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).sin().sum(), layer.lora_B, create_graph=True)
        first.square().sum().backward()
        found.append((x.grad, layer.lora_B.grad))
    for without, observed in zip(*found, strict=True):
        torch.testing.assert_close(observed, without)


def test_under_autocast_the_gradient_is_no_less_exact_than_that_of_a_layer_that_is_not_observed():
    exact = one_layer("linear", is_observed=False)
    x = torch.randn(64, 13, dtype=torch.float64)
    exact(x).sin().sum().backward()
    errors = []
    for is_observed in (False, True):
        low = one_layer("linear", is_observed=is_observed, dtype=torch.float32)
        low.load_state_dict(exact.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            y = low(x.float())
        y.float().sin().sum().backward()
        assert low.lora_B.grad.dtype == torch.float32
        errors.append((low.lora_B.grad.double() - exact.lora_B.grad).norm())
    assert 0 < errors[1] < 1.1 * errors[0]


def test_the_gradient_of_lora_B_costs_an_observed_layer_no_token_anything():
    flops = []
    for num_tokens in (50, 100):
        layer = one_layer("linear", is_observed=True)
        x = torch.randn(num_tokens, 13, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 50 * 6 * 13 * 6  # forward, input gradient, G


def test_an_observed_layer_whose_lora_A_selects_inputs_costs_what_full_rank_does():
    layer = one_layer("linear", is_observed=True, init="columns")
    x = torch.randn(50, 13, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 50 * 6 * 13 * 6
    assert layer.observers[0].flops == 50 * 2 * 13 * 6
