"""Training on a CUDA GPU: the same curve as on the CPU, the same bits on resume, no graph compiled twice.

Nothing here runs without a GPU. On a machine with one, the other integration tests train on it as well.
"""

import json
from pathlib import Path

import pytest
import torch
from test_train import _Death, _fit_until, assert_same_run

import relora.lab.methods  # noqa: F401
from method_samples import linear
from ranks import on_two_ranks
from relora import LoRALinear, ReLoRAConfig, inject, merge_and_reinit_
from relora.train.fit import fit
from tiny_run import tiny_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ONE_SIDED = {"factors": "B", "reset": "none", "reset_step_count": False}
POLICIES: dict[str, dict[str, dict[str, object]]] = {
    "both factors": {},
    "zero reset": {"relora": {"reset": "zero"}},
    "effective forward": {"relora": {"forward": "effective"}},
    "one-sided": {"relora": ONE_SIDED},
    "columns": {"relora": {**ONE_SIDED, "init": "columns"}},
    "cover": {"relora": {**ONE_SIDED, "init": "cover"}},
    "gradient rows": {"relora": {**ONE_SIDED, "init": "gradient"}},
    "transport": {"relora": {**ONE_SIDED, "reset": "transport"}},
    "sign residual": {"relora": {**ONE_SIDED, "residual": "sign", "residual_scale": 0.1}},
    "column residual": {"relora": {**ONE_SIDED, "residual": "column"}},
    "muon residual": {"relora": {**ONE_SIDED, "residual": "muon"}},
    "muon for the factors": {"relora": ONE_SIDED, "optim": {"factor_optimizer": "muon"}},
    "bf16 base, master on the host": {"relora": {"base_dtype": "bf16", "master": "host"}},
    "int8 base, master on the host": {"relora": {**ONE_SIDED, "base_dtype": "int8", "master": "host"}},
    "checkpointed activations": {"train": {"gradient_checkpointing": True}},
    "full": {"run": {"method": "full"}},
    "full-muon": {"run": {"method": "full-muon"}},
    "muon-in-place": {"run": {"method": "muon-in-place"}},
    "galore": {"run": {"method": "galore"}},
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_curve_is_the_cpu_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    # At this rate each policy's curve lies further from the others' than GPU and CPU may from each other.
    changes = {**POLICIES[policy], "optim": {"factor_lr": 5e-2, **POLICIES[policy].get("optim", {})}}
    recipe = tiny_recipe(tmp_path, **changes)
    on_gpu = fit(recipe)
    assert on_gpu.summary["device"] == torch.cuda.get_device_name()
    metrics, restarts = lines(on_gpu.folder / "metrics.jsonl"), lines(on_gpu.folder / "restarts.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = fit(recipe, overwrite=True)
    assert on_cpu.summary["device"] == "cpu"
    for mine, other in zip(metrics, lines(on_cpu.folder / "metrics.jsonl"), strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3), mine["step"]
    there = lines(on_cpu.folder / "restarts.jsonl")
    assert [line["step"] for line in restarts] == [line["step"] for line in there]
    assert all(not line["unmoved_layers"] for line in restarts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["both factors", "muon residual", "int8 base, master on the host"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, policy: str, precision: str) -> None:
    changes = POLICIES[policy] | {"train": {"precision": precision}}
    whole = fit(tiny_recipe(tmp_path, **changes))
    recipe = tiny_recipe(tmp_path, **changes, run={"out": str(tmp_path / "again")})
    with pytest.raises(_Death):
        _fit_until(recipe, 7)
    assert_same_run(fit(recipe).folder, whole.folder)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # products stay in float32 here
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile's, torch 2.11
def test_restarts_compile_nothing_anew(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    torch.compiler.reset()
    result = fit(tiny_recipe(tmp_path, relora={**ONE_SIDED, "warm_start_steps": 0}, train={"compile": True}))
    assert result.summary["restarts"] == 5
    few = counters["stats"]["unique_graphs"]
    counters.clear()
    torch.compiler.reset()
    once = tiny_recipe(
        tmp_path,
        run={"out": str(tmp_path / "once")},
        relora={**ONE_SIDED, "warm_start_steps": 0, "restart_every": 12},
        train={"compile": True},
    )
    assert fit(once).summary["restarts"] == 0
    assert few == counters["stats"]["unique_graphs"] > 0


def reinitialised(device: str, *, seed: int = 0) -> torch.Tensor:
    layer = linear(333, 120).to(device)
    inject(layer, ReLoRAConfig(rank=100, factors="B"))
    merge_and_reinit_(layer, seed=seed, restart_index=1)
    assert isinstance(layer, LoRALinear)
    return layer.lora_A.detach().cpu()


def test_new_rows_are_the_cpu_s() -> None:
    # The CPU's QR is off by some eps cond(G) in float32.
    torch.testing.assert_close(reinitialised("cuda"), reinitialised("cpu"), rtol=0, atol=1e-5)


def rows_of_a_seed_of_its_own(rank: int) -> torch.Tensor:
    return reinitialised("cuda", seed=rank)


def test_new_rows_are_the_first_rank_s() -> None:
    first, second = on_two_ranks(rows_of_a_seed_of_its_own)
    assert torch.equal(first, second) and torch.equal(first, reinitialised("cuda"))
