"""Data-parallel ranks agree on what they see of the base's gradient, and see what one process would."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from loops import Loop, batch, tiny_model
from ranks import on_two_ranks
from relora import ReLoRAConfig

CONFIG = ReLoRAConfig(
    rank=3,
    factors="B",
    restart_every=3,
    reset="transport",
    init="gradient",
    init_mix=0.3,
    residual="sign",
    scaling_rule="matched",
)
STEPS = 7


def micro_batches(step, rank, world_size):
    """Each rank's own two micro batches; one process alone takes all four."""
    x, y = batch(step)
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
    return parts[2 * rank : 2 * rank + 2] if world_size == 2 else parts


def train(config, *, rank=0, world_size=1, dtype=torch.float32, wrap=None):
    loop = Loop(config, tiny_model(dtype), wrap=wrap)
    trail, reports = [], []
    for step in range(1, STEPS + 1):
        loop.optimizers[0].zero_grad()
        parts = micro_batches(step, rank, world_size)
        for index, (x, y) in enumerate(parts):
            loss = (loop.called(x.to(dtype)).float() - y).square().mean() / len(parts)
            if wrap is not None and index < len(parts) - 1:
                with loop.called.no_sync():
                    loss.backward()
            else:
                loss.backward()
        loop.optimizers[0].step()
        restart = loop.relora.after_step(step)
        trail.append({name: value.clone() for name, value in loop.model.state_dict().items()})
        report = loop.relora.complement_report.as_dict()
        reports.append((report, restart and restart.as_dict()["gradient_init"]))
    return trail, reports, loop.everything()


def train_on_a_rank(rank, config, dtype):
    torch.manual_seed(rank)
    return train(config, rank=rank, world_size=2, dtype=dtype, wrap=DistributedDataParallel)


@pytest.mark.parametrize(
    ("residual", "dtype", "at_once"),
    [
        ("sign", torch.bfloat16, None),
        ("column", torch.float32, None),
        ("sign", torch.float32, 1),
        ("muon", torch.bfloat16, 1),
    ],
)
def test_two_ranks_keep_bit_equal_weights_and_reports(residual, dtype, at_once):
    left, right = on_two_ranks(
        train_on_a_rank, replace(CONFIG, residual=residual, residual_layers=at_once), dtype
    )
    if at_once:
        each = 1 if residual == "sign" else 2
        assert {(report["num_layers"], report["shared_bytes"]) for report, _ in left[1]} == {
            (1, 77 * each),
            (1, 99 * each),
        }
    for ours, theirs in zip(left[0], right[0], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert left[1] == right[1]
    assert [drawn is not None for _, drawn in left[1]] == [False, False, True, False, False, True, False]
    assert all(drawn is None or drawn["without_gradient"] == () for _, drawn in left[1])


@pytest.mark.parametrize(("residual", "dtype"), [("sign", torch.float32), ("muon", torch.float64)])
def test_two_ranks_select_and_step_on_the_same_inputs(residual, dtype):
    config = replace(CONFIG, init="columns", init_mix=0.0, residual=residual)
    left, right = on_two_ranks(train_on_a_rank, config, dtype)
    alone, _, _ = train(config, dtype=dtype)
    for ours, theirs, single in zip(left[0], right[0], alone, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name])
            torch.testing.assert_close(value, single[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_take_the_steps_of_one_process_with_all_micro_batches():
    # fp32; a vote goes another way only where a gradient is 0 to rounding, which would show as 2 * lr.
    (trail, reports, _), _ = on_two_ranks(train_on_a_rank, CONFIG, torch.float32)
    alone, alone_reports, _ = train(CONFIG)
    for ours, theirs in zip(trail, alone, strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    for (ours, drawn), (theirs, drawn_alone) in zip(reports, alone_reports, strict=True):
        assert drawn == drawn_alone
        assert ours["moved_fraction"] == pytest.approx(theirs["moved_fraction"], abs=0.02)
    # Four votes tie often: the test would not see a rank that votes alone otherwise.
    assert 0.4 < reports[0][0]["moved_fraction"] < 0.9
