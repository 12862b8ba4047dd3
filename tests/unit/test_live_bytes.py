"""Bytes alive: every storage once, by label, until it is freed; real tensors and fake ones alike."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora.lab.planner.live import CAST, LiveBytes


def test_a_storage_counts_once_however_many_views_it_has() -> None:
    with LiveBytes() as live:
        tensor = torch.zeros(3, 5)
        views = [tensor.T, tensor[1:], tensor.view(15)]
        assert live.total == 60
        del tensor
        assert live.total == 60  # the views hold it
        del views
        assert live.total == 0 and live.peak == 60


def test_the_peak_is_the_most_at_one_time_and_knows_what_it_was_made_of() -> None:
    with LiveBytes() as live:
        live.label = "kept"
        kept = torch.zeros(10)
        live.label = "passing"
        for _ in range(3):
            passing = torch.zeros(7)
            del passing
        assert (live.total, live.peak) == (40, 68)
        assert live.at_peak == {"kept": 40, "passing": 28} and live.label_peaks["passing"] == 28
        live.restart_peak()
        assert live.peak == 40 and live.at_peak["passing"] == 0
    del kept


def test_tensors_from_before_are_counted_when_told_and_casts_of_parameters_apart() -> None:
    weight, other = torch.zeros(4, 4), torch.zeros(4)
    view = weight.T
    with LiveBytes() as live:
        live.count([weight, view], "weights", are_parameters=True)
        live.label = "activations"
        cast, converted = weight.to(torch.bfloat16), other.to(torch.bfloat16)
        assert dict(live.bytes) == {"weights": 64, CAST: 32, "activations": 8}
        live.relabel(converted, "gradients")
        assert live.bytes["activations"] == 0 and live.bytes["gradients"] == 8
        assert live.total == 104
        del cast, converted
    assert live.total == 64


def test_fake_tensors_are_counted_and_answer_one() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        huge = torch.empty(1 << 20, 1 << 20)
        assert live.total == 1 << 42
        assert bool(torch.isfinite(huge.sum())) and float(huge[0, 0]) == 1.0
        del huge
        assert live.total == 0


def test_real_tensors_answer_for_themselves() -> None:
    with LiveBytes():
        assert float(torch.full((2,), 3.0).sum()) == 6.0


@pytest.mark.parametrize("is_fake", [True, False])
def test_flops_are_those_of_matrix_products(is_fake: bool) -> None:
    def run() -> int:
        with LiveBytes() as live:
            left, right = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
            (left @ right).sum().backward()
            q = torch.ones(1, 2, 8, 4)
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return live.flops

    attention = 2 * (2 * 2 * 8 * 8 * 4)  # two products of (8, 4) and (8, 8) in each of two heads
    if is_fake:
        with FakeTensorMode():
            flops = run()
    else:
        flops = run()
    assert flops == 3 * (2 * 3 * 5 * 7) + attention
