"""DDP over an injected model: two processes stay one model through restarts, whatever the base's dtype."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from relora import ReLoRA, ReLoRAConfig, inject

NUM_STEPS = 5
CONFIG = ReLoRAConfig(rank=3, restart_every=2, init="orthonormal", scaling_rule="learned")


def train(rank: int, folder: str, dtype: torch.dtype, broadcast_buffers: bool) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{dtype}-{broadcast_buffers}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Broadcasting buffers, DDP also takes weights and residuals from rank 0, as after loading there alone.
    torch.manual_seed(rank if broadcast_buffers else 0)
    model = nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 7)).to(dtype)
    inject(model, CONFIG)
    if broadcast_buffers and rank == 0:
        for layer in model[::2]:
            layer.load_state_dict({"weight": layer.weight.float() / 3, "bias": layer.bias})
    replica = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    relora = ReLoRA(replica, optimizer, CONFIG)
    torch.manual_seed(100 + rank)
    reports = []
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        replica(torch.randn(4, 9).to(dtype)).float().square().mean().backward()
        optimizer.step()
        reports.append(relora.after_step(step))
    state = {name: value.double().flatten().tolist() for name, value in model.state_dict().items()}
    merged = [report.relative_merge_error for report in reports if report is not None]
    Path(folder, f"{rank}.json").write_text(json.dumps({"state": state, "merged": merged}))
    dist.destroy_process_group()


def train_all(rank: int, folder: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for broadcast_buffers in (True, False):
            run = Path(folder, f"{dtype}-{broadcast_buffers}")
            run.mkdir(exist_ok=True)
            train(rank, str(run), dtype, broadcast_buffers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(train_all, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_processes_hold_the_same_bits_after_restarts(
    runs: Path, dtype: torch.dtype, broadcast_buffers: bool
) -> None:
    run = runs / f"{dtype}-{broadcast_buffers}"
    first, second = (json.loads((run / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["merged"]) == 2 and max(first["merged"]) < 1e-3
    assert first["state"] == second["state"]
    assert ("0.weight_residual" in first["state"]) == (dtype == torch.bfloat16)
