"""Restarts under torch.compile and under DDP: in place, so nothing is compiled or wrapped again."""

import dataclasses

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from loops import Loop, batch, tiny_model
from ranks import on_two_ranks
from relora import ReLoRAConfig

CONFIG = ReLoRAConfig(rank=3, restart_every=3, reset="random", reset_ratio=0.5)


@pytest.mark.parametrize("rule", ["alpha/r", "learned"])
def test_a_compiled_model_is_not_compiled_again_and_its_outputs_follow_the_merged_weights(rule):
    torch._dynamo.reset()
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    config = ReLoRAConfig(rank=3, restart_every=3, reset="zero", scaling_rule=rule)
    loop = Loop(config, wrap=lambda model: torch.compile(model, backend=counting))
    loop.run(1, 2)
    compiled_once = len(compilations)
    assert compiled_once >= 1
    base = loop.model.up.weight.detach().clone()
    for step in range(3, 10):
        loop.run(step, step)
        x, _ = batch(step)
        assert torch.equal(loop.called(x), loop.model(x))
    assert len(loop.reports) == 3
    assert not torch.equal(loop.model.up.weight, base)
    assert len(compilations) == compiled_once


def train_on_a_rank(rank, dtype, settings):
    """Train on this rank's own half of every batch, restarting on the calendar; return what came of it."""
    torch.manual_seed(rank)
    config = dataclasses.replace(CONFIG, **settings)
    loop = Loop(config, tiny_model(dtype), wrap=DistributedDataParallel)
    whole_loss, wrapper, trail = loop.loss, loop.called, []

    def loss_of_half(step):
        x, y = batch(step)
        half = slice(8 * rank, 8 * rank + 8)
        return (loop.called(x[half].to(dtype)).float() - y[half]).square().mean()

    loop.loss = loss_of_half
    for step in range(1, 11):
        loop.run(step, step)
        trail.append({name: p.detach().clone() for name, p in loop.model.named_parameters()})
    assert loop.called is wrapper
    return trail, loop.everything(), whole_loss(0).item()


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"forward": "factored"}),
        (torch.float32, {"forward": "effective"}),
        (torch.float32, {"base_dtype": "int8", "master": "host"}),
        (torch.bfloat16, {}),
    ],
)
def test_two_ddp_ranks_keep_bit_equal_weights_through_restarts(dtype, settings):
    first, second = on_two_ranks(train_on_a_rank, dtype, settings)
    (trail, everything, loss), (other_trail, other_everything, other_loss) = first, second
    for ours, theirs in zip(trail, other_trail, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {name for name in everything if not same(everything[name], other_everything[name])} == set()
    assert loss == other_loss
    if dtype == torch.bfloat16:
        return  # its rounding turns the sign of small gradients, which Adam makes whole steps of
    one_process = Loop(dataclasses.replace(CONFIG, **settings), tiny_model(dtype))
    one_process.run(1, 10)
    # The mean of two half-batch gradients is the whole batch's to rounding, which Adam hardly amplifies here.
    for name, value in one_process.model.named_parameters():
        torch.testing.assert_close(trail[-1][name], value.detach(), rtol=1e-3, atol=1e-4)


def same(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
