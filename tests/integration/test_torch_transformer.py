"""torch.nn's own transformer, whose evaluation may pass its layers by."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from method_samples import max_difference, train_factors_
from relora import ReLoRAConfig, fold, inject

R3 = ReLoRAConfig(rank=3)
COLUMNS = ReLoRAConfig(rank=3, factors="B", init="columns")
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def torch_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
    if kind == "layer":
        return nn.TransformerEncoderLayer(16, 2, **sizes)
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, activation="gelu", **sizes), 2)
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **sizes), 2)
    return nn.Transformer(16, 2, 1, 1, **sizes)


def run(model: nn.Module, *, padded: bool) -> Tensor:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    if isinstance(model, nn.TransformerDecoder | nn.Transformer):
        out = model(x, x, **({"tgt_key_padding_mask": PADDING} if padded else {}))
    else:
        out = model(x, **({"src_key_padding_mask": PADDING} if padded else {}))
    return out[~PADDING]


@NESTED
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["layer", "encoder", "decoder", "transformer"])
@pytest.mark.parametrize("config", [R3, COLUMNS], ids=["both factors", "columns"])
def test_evaluation_of_torchs_transformer_does_not_pass_by_the_factors(
    kind: str, padded: bool, config: ReLoRAConfig
) -> None:
    model = torch_model(kind).eval()
    with torch.no_grad():
        before = run(model, padded=padded)
        report = inject(model, config)
        torch.testing.assert_close(run(model, padded=padded), before, rtol=0, atol=1e-6)
    assert all(w.name.split(".")[-1] in ("linear1", "linear2") for w in report.wrapped)
    train_factors_(model, std=0.5)
    trained = run(model.train(), padded=padded)
    assert max_difference(trained, before) > 0.05
    with torch.no_grad():
        assert max_difference(run(model.eval(), padded=padded), trained) <= 5e-6
    with torch.inference_mode():
        assert max_difference(run(model, padded=padded), trained) <= 5e-6
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert max_difference(run(other, padded=padded), trained) <= 5e-6
        assert max_difference(run(fold(other), padded=padded), trained) <= 5e-6


def test_fold_gives_torchs_encoder_its_fused_path_back() -> None:
    model = torch_model("encoder")
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    inject(model, R3)
    fold(model)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_attention_whose_projections_are_read_directly_is_listed() -> None:
    report = inject(torch_model("encoder"), R3)
    reasons = {weight.name: weight.reason for weight in report.left_alone}
    assert "without calling it" in reasons["layers.1.self_attn.out_proj.weight"]
    assert "layers.0.self_attn.in_proj_weight" in reasons
