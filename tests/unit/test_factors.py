"""New factors: their values, their seeds, and models that are injected before they have memory."""

import copy
import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from method_samples import (
    LAYER_KINDS,
    layers_of,
    linear,
    mlp,
    numpy64,
    same_bits,
    snapshot,
    tower,
    train_factors_,
)
from reference.low_rank import kaiming_bound
from relora import LoRALinear, ReLoRAConfig, inject, lora_parameters, merge_and_reinit_
from relora.method.factor_init import FACTOR_INITS, Draw, orthonormal_rows

R3 = ReLoRAConfig(rank=3)


# --- the factors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(5, 7, 3), (7, 5, 4), (96, 64, 24)])
def test_factors_have_their_shapes_and_start_at_zero_and_within_kaiming_s_bound(
    in_features: int, out_features: int, rank: int
) -> None:
    layer = linear(in_features, out_features)
    inject(layer, ReLoRAConfig(rank=rank, init="kaiming"))
    assert isinstance(layer, LoRALinear)
    assert layer.lora_A.shape == (rank, in_features) and layer.lora_B.shape == (out_features, rank)
    assert layer.lora_B.count_nonzero() == 0
    bound = kaiming_bound(in_features)
    assert float(layer.lora_A.detach().abs().max()) <= bound
    if layer.lora_A.numel() > 1000:
        assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_orthonormal_factors_have_orthonormal_rows(kind: str) -> None:
    for config in (ReLoRAConfig(rank=4), ReLoRAConfig(rank=4, factors="B", init="kaiming")):
        layer = LAYER_KINDS[kind](9, 7)
        inject(layer, config)
        assert isinstance(layer, LoRALinear)
        rows = numpy64(layer.lora_A)
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-6)


SHAPES = [(1, 1), (7, 1), (11, 3), (9, 9), (33, 33), (2048, 512), (2050, 300)]


@pytest.mark.parametrize(("in_features", "rank"), SHAPES)
def test_rows_made_as_on_a_gpu_are_the_cpu_s(in_features: int, rank: int) -> None:
    name = {"seed": 3, "restart_index": 2, "name": "blocks.0.q_proj"}
    draw = Draw(rank=rank, in_features=in_features, device=torch.device("cpu"), **name)  # type: ignore[arg-type]
    gaussian = torch.empty(in_features, rank).normal_(generator=draw.generator())
    rows = orthonormal_rows(gaussian)
    assert rows.dtype == torch.float32 and rows.is_contiguous()
    # The CPU's QR is off by some eps cond(G) in float32.
    torch.testing.assert_close(rows, FACTOR_INITS["orthonormal"].draw(draw), rtol=0, atol=1e-5)
    product = numpy64(rows) @ numpy64(rows).T
    np.testing.assert_allclose(product, np.eye(rank), atol=1e-6)


def test_a_gaussian_that_cholesky_cannot_factor_goes_the_cpu_s_way() -> None:
    gaussian = torch.empty(7, 3).normal_(generator=torch.Generator().manual_seed(0))
    gaussian[:, 1] = 0  # which no draw has: that it is the CPU's answer is what matters
    columns, triangle = torch.linalg.qr(gaussian)
    assert torch.equal(orthonormal_rows(gaussian), (columns * triangle.diagonal().sign()).T)


def factors_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, parameter in lora_parameters(model):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_factors_do_not_depend_on_the_number_of_threads(init: Any) -> None:
    threads_before = torch.get_num_threads()
    digests = set()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            layer = linear(333, 120)
            inject(layer, ReLoRAConfig(rank=100, init=init))
            merge_and_reinit_(layer, seed=0, restart_index=1)
            digests.add(factors_digest(layer))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(threads_before)
    assert len(digests) == 1


def test_factors_depend_on_seed_restart_and_name_alone() -> None:
    def drawn(*, seed: int = 0, restart_index: int = 0, stream: int = 0) -> dict[str, Tensor]:
        model = tower()
        torch.manual_seed(stream)
        state = torch.get_rng_state()
        inject(model, ReLoRAConfig(rank=3, init="orthonormal"), seed=seed)
        if restart_index:
            merge_and_reinit_(model, seed=seed, restart_index=restart_index)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: layer.lora_A.detach() for name, layer in layers_of(model).items()}

    first = drawn()
    assert same_bits(first, drawn(stream=5))
    assert not torch.equal(first["blocks.0.q_proj"], first["blocks.1.q_proj"])
    for other in (drawn(seed=1), drawn(restart_index=1), drawn(seed=1, restart_index=1)):
        assert not any(torch.equal(first[name], other[name]) for name in first)
    alone = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])})
    inject(alone, ReLoRAConfig(rank=3, init="orthonormal"))
    assert torch.equal(layers_of(alone)["blocks.0.q_proj"].lora_A, first["blocks.0.q_proj"])


def test_a_numpy_seed_is_the_number_it_stands_for() -> None:
    models = [mlp(), mlp()]
    inject(models[0], R3, seed=7)
    inject(models[1], R3, seed=np.int64(7))  # type: ignore[arg-type]
    assert factors_digest(models[0]) == factors_digest(models[1])


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_factors_do_not_depend_on_torchs_default_dtype_or_device(init: str) -> None:
    config = ReLoRAConfig(rank=3, init=init)  # type: ignore[arg-type]
    models = [mlp() for _ in range(3)]
    inject(models[0], config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        inject(models[1], config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        inject(models[2], config)
    assert len({factors_digest(model) for model in models}) == 1
    assert all(p.dtype == torch.float32 for model in models for _, p in lora_parameters(model))


def test_another_process_draws_the_same_factors() -> None:
    program = (
        "import torch\n"
        "from test_factors import mlp, factors_digest, inject, merge_and_reinit_, ReLoRAConfig\n"
        "torch.manual_seed(99)\n"
        "model = mlp(); inject(model, ReLoRAConfig(rank=3, init='orthonormal'), seed=4)\n"
        "merge_and_reinit_(model, seed=4, restart_index=2)\n"
        "print(factors_digest(model))"
    )
    model = mlp()
    inject(model, ReLoRAConfig(rank=3, init="orthonormal"), seed=4)
    merge_and_reinit_(model, seed=4, restart_index=2)
    path = "\n".join(["import sys", *(f"sys.path.append({entry!r})" for entry in sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", f"{path}\n{program}"], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == factors_digest(model), run.stderr


# --- the meta device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["alpha/r", "learned"])
@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_injected_on_the_meta_device_is_complete_once_it_has_weights(
    rule: str, way: str, dtype: torch.dtype
) -> None:
    config = ReLoRAConfig(rank=3, alpha=6.0, scaling_rule=rule)  # type: ignore[arg-type]
    plain = mlp().to(dtype)
    wanted = copy.deepcopy(plain)
    inject(wanted, config, seed=4)
    with torch.device("meta"):
        model = mlp().to(dtype)
    inject(model, config, seed=4)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), assign=way == "assign")
    assert same_bits(snapshot(model), snapshot(wanted))
    for each in (model, wanted):
        train_factors_(each)
        merge_and_reinit_(each, seed=4, restart_index=1)
    assert same_bits(snapshot(model), snapshot(wanted))


def test_memory_alone_is_enough_for_the_factors() -> None:
    wanted = mlp()
    inject(wanted, R3)
    with torch.device("meta"):
        model = mlp()
    inject(model, R3)
    model.to_empty(device="cpu")
    assert factors_digest(model) == factors_digest(wanted)


def test_a_cast_on_the_meta_device_is_not_forgotten() -> None:
    with torch.device("meta"):
        model = mlp()
    inject(model, R3)
    model.bfloat16().to_empty(device="cpu")
    plain = dict(mlp().bfloat16().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plain:
                parameter.copy_(plain[name])
    train_factors_(model)
    assert merge_and_reinit_(model, seed=0, restart_index=1).relative_merge_error < 1e-3
