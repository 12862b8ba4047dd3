"""FSDP2 around an injected model: two ranks, each with its own rows, train and restart as one process."""

import copy
import math
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from loops import Loop, adamw, batch, tiny_model
from method_samples import Conv1D
from ranks import on_two_ranks
from relora import ReLoRA, ReLoRAConfig, fold, inject, merge_and_reinit_
from relora.errors import ConfigError, NonFiniteError
from relora.method.in_place import InPlace
from relora.method.shards import local
from relora.method.spectrum import function_weights
from tiny_sizes import SIZES, VOCAB_SIZE

CONFIG = ReLoRAConfig(rank=3, restart_every=3, init="orthonormal")
ONE_SIDED = replace(CONFIG, factors="B", reset="none", scaling_rule="matched")
CONFIGS = {
    "magnitude": CONFIG,
    "zero": replace(CONFIG, reset="zero", reset_step_count=True, init="kaiming", forward="effective"),
    "random": replace(CONFIG, reset="random", reset_mask="separate", forward="factored"),
    "transport": replace(CONFIG, factors="B", reset="transport", scaling_rule="matched"),
    "none": replace(CONFIG, factors="B", reset="none", init="cover", base_weight_decay=0.3),
    "columns": replace(ONE_SIDED, init="columns"),
    "gradient": replace(ONE_SIDED, init="gradient", init_mix=0.4),
    "sign": replace(ONE_SIDED, residual="sign", residual_scale=0.5, forward="effective"),
    "column": replace(ONE_SIDED, residual="column", init="columns", residual_layers=2),
}
PRESET = ReLoRAConfig.beyond(rank=3, restart_every=3)
STEPS = 10
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def with_a_narrow_layer():
    """Of the last layer, of one output, a rank has no row."""
    model = tiny_model()
    model.add_module("last", nn.Linear(9, 1))
    with torch.no_grad():
        for index, parameter in enumerate(model.last.parameters()):
            parameter.copy_(torch.linspace(-0.3, 0.5, parameter.numel()).view_as(parameter) + index)
    return model


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.down)
    return fully_shard(model)


def update(loop, step, rank=None):
    """Take a step by both micro batches, or by this rank's: FSDP2 averages gradients over ranks."""
    for optimizer in loop.optimizers:
        optimizer.zero_grad()
    x, y = batch(step)
    parts = list(zip(x.chunk(2), y[:, :1].chunk(2), strict=True))
    mine = parts if rank is None else [parts[rank]]
    losses = [(loop.called(x.to(loop.dtype)).float() - y).square().mean() for x, y in mine]
    for loss in losses:
        (loss / len(losses)).backward()
    for optimizer in loop.optimizers:
        optimizer.step()
    return sum(losses).item() / len(losses)


def evaluate(loop):
    """Leave a sharded root whole, where what is written would be lost."""
    with torch.no_grad():
        x, y = batch(0)
        return (loop.called(x.to(loop.dtype)) - y[:, :1]).square().mean().item()


def steps_of(loop, first, last, rank=None):
    losses = []
    for step in range(first, last + 1):
        losses.append(update(loop, step, rank))
        evaluate(loop)
        loop.reports += [report] if (report := loop.relora.after_step(step)) else []
    return losses


def result(config, state_of, *, wrap=None, rank=None, dtype=torch.float32):
    loop = Loop(config, with_a_narrow_layer().to(dtype), wrap=wrap)
    losses = steps_of(loop, 1, STEPS, rank)
    reports = [report.as_dict() for report in loop.reports]
    if loop.relora.complement_report is not None:
        moved = loop.relora.complement_report.as_dict()
        reports.append({name: moved[name] for name in ("moved_fraction", "step_rms", "num_non_finite")})
    return losses, reports, function_weights(loop.called), dict(state_of(loop.called))


def whole_state(model):
    return get_model_state_dict(model, options=WHOLE)


def on_a_rank(rank, names):
    found = [result(CONFIGS[name], whole_state, wrap=sharded, rank=rank) for name in names]
    return found if rank == 0 else [[*others, None] for *others, _ in found]  # a whole state is rank 0's


def means_of(first, second):
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def close(left, right, off):
    """Compare reports: counts and names exactly, measures as far as rounding lets them be equal."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[key], right[key], off) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(close(a, b, off) for a, b in zip(left, right, strict=True))
    return left == pytest.approx(right, rel=10 * off, abs=1e-6) if isinstance(left, float) else left == right


def test_sharded_ranks_train_and_restart_as_one_process():
    first, second = on_two_ranks(on_a_rank, list(CONFIGS))
    for config, one, other in zip(CONFIGS.values(), first, second, strict=True):
        losses, reports, weights, state = result(config, nn.Module.state_dict)
        assert len(reports) == 3 + (config.residual != "none")
        # Sums of "column" are rounded to bf16, in an order that ranks change.
        off = 1e-3 if config.residual == "column" else 1e-5
        assert means_of(one[0], other[0]) == pytest.approx(losses, rel=off)
        for got in (one, other):
            assert close(got[1], reports, off)
            torch.testing.assert_close(got[2], weights, rtol=off, atol=off)
        torch.testing.assert_close(one[3], state, rtol=off, atol=off)


def goes_on(rank, config):
    """Save in mid-cycle, each rank its own part, and go on in a model made anew."""
    whole_run, first = (Loop(config, with_a_narrow_layer(), wrap=sharded) for _ in range(2))
    steps_of(whole_run, 1, STEPS, rank)
    steps_of(first, 1, 5, rank)
    model = copy.deepcopy(get_model_state_dict(first.called))
    optimizer = copy.deepcopy(get_optimizer_state_dict(first.called, first.optimizers))
    second = Loop(config, with_a_narrow_layer(), wrap=sharded)
    set_model_state_dict(second.called, model)
    set_optimizer_state_dict(second.called, second.optimizers, optimizer)
    second.relora.load_state_dict(first.relora.state_dict())
    steps_of(second, 6, STEPS, rank)
    ends = [get_model_state_dict(loop.called) for loop in (whole_run, second)]
    differing = [name for name in ends[0] if not torch.equal(*(local(end[name]) for end in ends))]
    return [len(second.reports), differing, len(ends[0])]


@pytest.mark.parametrize("config", [CONFIG, PRESET])
def test_a_sharded_run_goes_on_from_its_parts_bit_for_bit(config):
    (reports, differing, names), second = on_two_ranks(goes_on, config)
    assert (reports, differing) == (2, []) and names > 8
    assert second[1] == []


def folds_a_whole_copy(rank):
    loop = Loop(CONFIG, with_a_narrow_layer(), wrap=sharded)
    steps_of(loop, 1, STEPS)
    evaluate(loop)
    with pytest.raises(ConfigError, match=r"up is sharded: fold a whole model .*full_state_dict"):
        fold(loop.called)
    weights, state = function_weights(loop.called), whole_state(loop.called)
    if rank:
        return []
    copy_ = with_a_narrow_layer()
    inject(copy_, CONFIG)
    copy_.load_state_dict(state)
    folded = function_weights(fold(copy_))
    return [max(float((weights[name] - folded[name]).abs().max()) for name in weights)]


def test_a_whole_copy_of_a_sharded_model_folds():
    ([off], _) = on_two_ranks(folds_a_whole_copy)
    assert off < 1e-6


def acts_after_evaluations(rank):
    """Whatever comes after an evaluation finds the parameters that train, not the root's copies of them."""
    loop = Loop(CONFIG, with_a_narrow_layer(), wrap=sharded, end=3)
    steps_of(loop, 1, 3, rank)
    assert not loop.reports
    evaluate(loop)
    longer = ReLoRA(loop.called, loop.optimizers, CONFIG, end=STEPS)
    longer.load_state_dict(loop.relora.state_dict())
    before = evaluate(loop)
    report = longer.catch_up()
    caught_up = evaluate(loop)
    update(loop, 4, rank)
    trained = evaluate(loop)
    merge_and_reinit_(loop.called, seed=0, restart_index=9)
    merged = evaluate(loop)
    loop.called.reshard()
    left = [float(local(layer.lora_B.detach()).abs().sum()) for layer in (loop.model.up, loop.model.down)]
    return [before, caught_up, trained, merged, left, report.restart_index]


def test_an_evaluation_may_come_before_anything():
    for before, caught_up, trained, merged, left, restart_index in on_two_ranks(acts_after_evaluations):
        assert caught_up == pytest.approx(before, rel=1e-6) and merged == pytest.approx(trained, rel=1e-6)
        assert trained != pytest.approx(before, rel=1e-4)
        assert (left, restart_index) == ([0.0, 0.0], 1)


def merges_nan_of_one_rank(rank, wrap):
    loop = Loop(CONFIG, with_a_narrow_layer(), wrap=wrap)
    steps_of(loop, 1, 2)
    loop.called.reshard()
    if rank:  # in its rows alone
        loop.model.down.lora_B.detach().to_local()[0, 0] = math.nan
    before = [p.to_local().clone() for p in loop.model.parameters()]
    with pytest.raises(NonFiniteError, match="not be finite in down"):
        merge_and_reinit_(loop.called, seed=0, restart_index=1)
    after = [p.to_local() for p in loop.model.parameters()]
    return all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before, after, strict=True))


def trains_the_preset(rank):
    return result(PRESET, lambda model: {}, wrap=sharded, rank=rank, dtype=torch.float64)[:3]


def test_the_preset_steps_on_the_complement_of_sharded_layers():
    # A momentum of float64 is not rounded at random.
    losses, reports, weights, _ = result(PRESET, nn.Module.state_dict, dtype=torch.float64)
    first, second = on_two_ranks(trains_the_preset)
    assert all(map(torch.equal, first[2].values(), second[2].values())) and first[1] == second[1]
    assert means_of(first[0], second[0]) == pytest.approx(losses, rel=1e-6)
    assert close(first[1], reports, 1e-6) and reports[-1]["moved_fraction"] > 0.9
    torch.testing.assert_close(first[2], weights, rtol=1e-6, atol=1e-8)


def in_bf16(model):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    return fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def by_two_and_one(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))


@pytest.mark.parametrize("wrap", [sharded, by_two_and_one])
def test_what_one_rank_cannot_merge_no_rank_merges(wrap):
    assert on_two_ranks(merges_nan_of_one_rank, wrap) == (True, True)


def trains_otherwise(rank, config):
    del rank
    found = []
    for wrap in (in_bf16, by_two_and_one):
        loop = Loop(config, with_a_narrow_layer(), wrap=wrap)
        losses = steps_of(loop, 1, STEPS)
        loop.called.reshard()
        merge_errors = [report.merge.relative_merge_error for report in loop.reports]
        found.append([losses, merge_errors, str(loop.model.up.weight.dtype)])
    return found


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["sign"]])
def test_bf16_compute_over_float32_parts_and_parts_with_copies(config):
    losses, *_ = result(config, nn.Module.state_dict)
    for bf16, copies in on_two_ranks(trains_otherwise, config):
        assert bf16[0] == pytest.approx(losses, rel=0.05) and bf16[0] != losses
        assert copies[0] == pytest.approx(losses, rel=1e-5)
        for _, merge_errors, dtype in (bf16, copies):
            assert len(merge_errors) == 3 and max(merge_errors) < 1e-6
            assert dtype == "torch.float32"


def is_refused(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    del rank
    messages = []

    def refused(config, *, dtype=torch.float32, conv=False, **settings):
        model = nn.Sequential(OrderedDict(layer=Conv1D(8, 8) if conv else nn.Linear(8, 8))).to(dtype)
        inject(model, config)
        fully_shard(model, **settings)
        before = [p.to_local().clone() for p in model.parameters()]
        with pytest.raises(ConfigError) as refusal:
            ReLoRA(model, adamw(model), config)
        assert all(map(torch.equal, before, [p.to_local() for p in model.parameters()]))
        messages.append(str(refusal.value))

    refused(CONFIG, dtype=torch.bfloat16)
    refused(CONFIG, conv=True)
    refused(replace(CONFIG, rank=4), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    plain = fully_shard(nn.Linear(8, 8))
    with pytest.raises(ConfigError) as refusal:
        InPlace(plain, {"layer": plain}, kind="sign")
    return [*messages, str(refusal.value)]


def test_what_a_part_does_not_allow_is_refused_in_words():
    first, second = on_two_ranks(is_refused)
    assert first == second
    for message, words in zip(
        first,
        [
            "layer is sharded and of torch.bfloat16: of sharded layers only an nn.Linear in float32",
            "layer is sharded and a Conv1D, stored transposed",
            "layer is sharded otherwise than by its rows",
            "steps in place needs whole weights, but layer is sharded",
        ],
        strict=True,
    ):
        assert words in message


def fills(rank):
    from torch.distributed.fsdp import fully_shard

    plain = with_a_narrow_layer()
    with torch.device("meta"):
        model = with_a_narrow_layer()
    inject(model, CONFIG, seed=5)
    fully_shard(model)
    model.to_empty(device="cpu")
    set_model_state_dict(
        model, plain.state_dict(), options=StateDictOptions(full_state_dict=True, strict=False)
    )
    inject(plain, CONFIG, seed=5)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return rank == 1 or [name for name, value in plain.state_dict().items() if not value.equal(state[name])]


def test_a_model_from_the_meta_device_is_sharded_before_it_has_memory():
    assert on_two_ranks(fills) == ([], True)


DOCUMENTED = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "method.md").read_text().split("## A model sharded by FSDP2")[1],
    re.DOTALL,
)


def follows_the_docs(rank, folder):
    model, plain = (AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)) for _ in range(2))
    names = {"model": model, "plain": plain, "folder": folder}
    set_up, export = (block.replace("500", "2") for block in DOCUMENTED)
    exec(set_up, names)
    restarts = []
    for step in range(1, 6):
        names["optimizer"].zero_grad()
        tokens = torch.randint(0, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        names["optimizer"].step()
        restarts += [report] if (report := names["relora"].after_step(step)) else []
    weights = function_weights(model)
    exec(export, names)
    if rank:
        return len(restarts)
    exported = function_weights(AutoModelForCausalLM.from_pretrained(folder))
    return max(float((weights[name] - exported[name]).abs().max()) for name in weights)


def test_the_documented_way_trains_and_exports(tmp_path):
    off, restarts = on_two_ranks(follows_the_docs, str(tmp_path))
    assert restarts == 2 and off < 1e-6


def loads_a_plain_checkpoint(rank):
    loop = Loop(PRESET, with_a_narrow_layer(), wrap=sharded)
    steps_of(loop, 1, 5, rank)
    plain = with_a_narrow_layer()
    set_model_state_dict(loop.called, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    found, wanted = function_weights(loop.called), function_weights(plain)
    momenta = [float(layer.weight_momentum.abs().sum()) for layer in (loop.model.up, loop.model.down)]
    return [max(float((found[name] - wanted[name]).abs().max()) for name in wanted), momenta]


def test_a_plain_checkpoint_makes_the_function_the_plain_models():
    assert on_two_ranks(loads_a_plain_checkpoint) == ([0.0, [0.0, 0.0]],) * 2


def takes_rows_that_select_nothing(rank):
    loop = Loop(CONFIGS["columns"], with_a_narrow_layer(), wrap=sharded)
    steps_of(loop, 1, 4, rank)
    other = with_a_narrow_layer()
    inject(other, replace(CONFIGS["columns"], init="orthonormal"))
    with pytest.raises(RuntimeError, match="lora_A is of another init"):
        set_model_state_dict(loop.called, other.state_dict(), options=StateDictOptions(full_state_dict=True))
    loop.called.reshard()
    local(loop.model.up.lora_A.detach()).fill_(0.5)
    with pytest.raises(ConfigError, match="lora_A was written to in up"):
        merge_and_reinit_(loop.called, seed=0, restart_index=1)
    return True


def test_rows_that_must_select_inputs_are_judged_whole():
    assert on_two_ranks(takes_rows_that_select_nothing) == (True, True)


def shards_too_late(rank):
    del rank
    model = with_a_narrow_layer()
    inject(model, CONFIG)
    optimizer = adamw(model)
    relora = ReLoRA(model, optimizer, CONFIG)
    sharded(model)
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="after fold, inject or fully_shard"):
        relora.after_step(1)
    return True


def test_an_optimizer_from_before_the_parts_is_refused_at_the_first_step():
    assert on_two_ranks(shards_too_late) == (True, True)


def test_a_momentum_follows_its_weight_to_another_device():
    loop = Loop(PRESET, with_a_narrow_layer())
    layer = loop.model.up
    layer.weight_momentum = layer.weight_momentum.to("meta")  # as one that fully_shard left behind
    loop.relora = ReLoRA(loop.model, loop.optimizers, PRESET)
    assert layer.weight_momentum.device == layer.weight.device
    steps_of(loop, 1, STEPS)
    assert float(layer.weight_momentum.abs().sum()) > 0
