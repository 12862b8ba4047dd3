"""DDP around an injected model: what it broadcasts keeps ranks one model, and restarts happen in place."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from method_samples import layers_of, same_bits, snapshot, train_factors_
from ranks import on_two_ranks
from relora import ReLoRA, ReLoRAConfig, inject, merge_and_reinit_
from relora.train.parallel import Processes

CONFIG = ReLoRAConfig(rank=3, restart_every=2, init="orthonormal", scaling_rule="learned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def injected(dtype: torch.dtype, *, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 7)).to(dtype)
    inject(model, CONFIG)
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replica_trains_through_restarts_and_keeps_its_buckets(dtype: torch.dtype) -> None:
    model = injected(dtype, seed=0)
    # Its construction broadcasts every parameter and buffer, in the dtypes Gloo and NCCL know.
    replica = nn.parallel.DistributedDataParallel(model)
    parameters = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    relora = ReLoRA(replica, optimizer, CONFIG)
    reports = []
    for step in range(1, 6):
        optimizer.zero_grad()
        replica(torch.randn(4, 9).to(dtype)).float().square().mean().backward()
        optimizer.step()
        reports.append(relora.after_step(step))
    assert [report is not None for report in reports] == [False, True, False, True, False]
    assert all(report.relative_merge_error < 1e-3 for report in reports if report is not None)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == parameters


@torch.no_grad()
def broadcast_(source: nn.Module, target: nn.Module) -> None:
    """Do what DDP does at its construction: copy parameters and buffers of rank 0, in place."""
    sources = [*source.named_parameters(), *source.named_buffers()]
    targets = [*target.named_parameters(), *target.named_buffers()]
    for (name, theirs), (same_name, ours) in zip(sources, targets, strict=True):
        assert name == same_name
        ours.copy_(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_that_start_apart_are_one_model_after_the_broadcast_and_stay_so(dtype: torch.dtype) -> None:
    # Rank 0 alone has loaded a checkpoint with residuals; rank 1 has its own random weights.
    first, second = injected(dtype, seed=0), injected(dtype, seed=1)
    for model, merges in ((first, 3), (second, 1)):
        for restart_index in range(1, merges + 1):
            train_factors_(model, seed=restart_index)
            merge_and_reinit_(model, seed=0, restart_index=restart_index)
    broadcast_(first, second)
    for restart_index in (4, 5):
        for model in (first, second):
            train_factors_(model, seed=restart_index)
            merge_and_reinit_(model, seed=0, restart_index=restart_index)
    assert same_bits(snapshot(first), snapshot(second))
    if dtype == torch.bfloat16:
        residual = layers_of(first)["0"].weight_residual
        assert residual is not None and residual.count_nonzero() > 0


def leave_with_a_replica(rank: int) -> list[bool]:
    here = Processes(rank=rank, world_size=2, device=torch.device("cpu"))
    replica = here.wrap_for_training(nn.Linear(9, 11), compile_it=False)
    dropped = here.wrap_for_training(nn.Linear(9, 11), compile_it=False)
    assert set(here.replicas) == {replica, dropped}
    del dropped
    assert set(here.replicas) == {replica}
    replica(torch.randn(4, 9)).square().mean().backward()
    reducer = weakref.ref(replica.reducer)
    before = reducer() is not None
    here.leave()
    return [before, reducer() is None, not dist.is_initialized()]


def test_a_replica_that_outlives_its_group_does_not_hold_it_last() -> None:
    # Its reducer would: gloo's threads end under Python's lock then, which one of them may be waiting for.
    assert on_two_ranks(leave_with_a_replica) == ([True] * 3, [True] * 3)
