"""The orthogonalised step of lora_B: Muon within lora_A's rows, of the size of full rank's step."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from loops import Loop, differing, tiny_model
from relora import ReLoRAConfig, inject
from relora.method.factor_init import FACTOR_INITS
from relora.train.joint import matched_muon

LR = 1e-2
CONFIG = ReLoRAConfig(rank=3, factors="B", scaling_rule="matched", reset="none", restart_every=3)


def muon_and_adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    lora_Bs = [p for p in trained if p.ndim == 2]
    return [
        matched_muon([{"params": lora_Bs, "lr": LR, "weight_decay": 0.0}]),
        AdamW([p for p in trained if p.ndim != 2], lr=LR),
    ]


def orthogonalised(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("init", ["orthonormal", "cover", "kaiming"])
@pytest.mark.parametrize(("out", "width", "rank", "kappa"), [(96, 64, 16, 1.0), (48, 128, 8, 0.5)])
def test_the_step_in_w_is_muons_within_the_rows_of_lora_a(init, out, width, rank, kappa):
    factors = "both" if init == "kaiming" else "B"
    config = replace(CONFIG, rank=rank, init=init, factors=factors, kappa=kappa)
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=False)
    model = nn.Sequential(layer)
    inject(model, config)
    gradient = torch.randn(out, width)
    layer.lora_B.grad = layer.fixed_scaling * gradient @ layer.lora_A.detach().T
    before = layer.delta()
    matched_muon([{"params": [layer.lora_B], "lr": LR, "weight_decay": 0.0}]).step()
    step = layer.delta() - before
    # RMS(dW) = 0.2 lr scaling sqrt(rank) rms(A) = 0.2 kappa lr, exactly for an exact orthogonal factor.
    exact = -0.2 * LR * math.sqrt(out) * orthogonalised(gradient @ layer.lora_A.detach().T)
    wanted = layer.fixed_scaling * exact.double() @ layer.lora_A.detach().double()
    rms_A = FACTOR_INITS[config.factor_init].rms(width)
    assert layer.fixed_scaling * math.sqrt(rank) * rms_A == pytest.approx(kappa)
    tolerance = 0.05 if init == "kaiming" else 1e-6  # Kaiming's rms is that of one draw
    assert wanted.square().mean().sqrt() == pytest.approx(0.2 * kappa * LR, rel=tolerance)
    # Newton and Schulz leave singular values between 0.68 and 1.13.
    assert 0.68 < step.square().mean().sqrt() / wanted.square().mean().sqrt() < 1.14
    assert torch.cosine_similarity(step.flatten(), wanted.flatten(), dim=0) > 0.96
    # Muon at full rank makes a step of the same RMS.
    full = nn.Parameter(torch.zeros(out, width))
    full.grad = gradient.clone()
    Muon([full], lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    full_rms = full.detach().square().mean().sqrt()
    assert float(step.square().mean().sqrt() / full_rms / kappa) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("reset", ["none", "zero", "magnitude", "transport"])
def test_resumed_restarts_are_bit_equal_and_report_the_one_momentum(reset):
    config = replace(CONFIG, reset=reset, reset_ratio=0.5, residual="sign")
    whole, cut = (Loop(config, tiny_model(), muon_and_adamw) for _ in range(2))
    whole.run(1, 10)
    cut.run(1, 5)
    resumed = Loop(config, tiny_model(), muon_and_adamw)
    resumed.model.load_state_dict(cut.model.state_dict())
    for mine, theirs in zip(resumed.optimizers, cut.optimizers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    resumed.relora.load_state_dict(cut.relora.state_dict())
    resumed.run(6, 10)
    assert differing(resumed.everything(), whole.everything()) == []
    report = whole.reports[0].resets[0]
    touched = [(each.num_states, each.entries_zeroed, each.entries_carried) for each in report.parameters]
    expected = {
        "none": [(0, 0, 0)] * 2,
        "zero": [(1, 33, 0), (1, 27, 0)],
        "magnitude": [(1, 16, 0), (1, 14, 0)],
        "transport": [(1, 0, 33), (1, 0, 27)],
    }
    assert touched == expected[reset]


def test_half_of_adams_state():
    muon = Loop(CONFIG, tiny_model(), muon_and_adamw)
    adamw = Loop(CONFIG, tiny_model())
    entries = []
    for loop in (muon, adamw):
        loop.run(1, 2)
        states = {k: v for k, v in loop.everything().items() if "lora_B" in k and k.startswith("optimizer")}
        entries.append(sum(v.numel() for k, v in states.items() if not k.endswith("step")))
    assert entries == [60, 120]
