"""The complement and gradient rows in real architectures: every layer gets what autograd says it should."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from loops import adamw
from method_samples import as_rows, layers_of
from reference.beyond import captured, complement, majority
from relora import ReLoRA, ReLoRAConfig, fold, inject
from tiny_sizes import GPT2_SIZES, GROUPED, SIZES, VOCAB_SIZE

MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES | GROUPED,
    "gpt2": GPT2_SIZES | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": SIZES | GROUPED | {"hidden_dropout": 0.0},
}
LR = 1e-3
CONFIG = ReLoRAConfig(
    rank=3, factors="B", residual="sign", scaling_rule="matched", reset="none", restart_every=2
)


def causal_lm(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.double().train()


def token_ids(step: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int, parts: int) -> None:
    for ids in token_ids(step).chunk(parts):
        (model(input_ids=ids, labels=ids, use_cache=False).loss / parts).backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("model_type", MODELS)
def test_every_base_moves_against_the_sign_of_its_complement(
    model_type: str, parts: int, checkpointing: bool
) -> None:
    plain = causal_lm(model_type)
    model = copy.deepcopy(plain)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    inject(model, CONFIG)
    optimizer = adamw(model, lr=LR)
    relora = ReLoRA(model, optimizer, CONFIG)
    before = {name: as_rows(layer).copy() for name, layer in layers_of(model).items()}
    perps: dict[str, list[Any]] = {name: [] for name in before}
    for ids in token_ids(1).chunk(parts):
        plain.zero_grad()
        plain(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, found in perps.items():
            weight = plain.get_submodule(name).weight
            assert isinstance(weight, Tensor) and weight.grad is not None
            gradient = weight.grad.T if model_type == "gpt2" else weight.grad
            lora_A = layers_of(model)[name].lora_A.detach().numpy()
            found.append(complement(gradient.numpy(), lora_A))
    backward(model, 1, parts)
    optimizer.step()
    relora.after_step(1)
    assert relora.complement_report is not None and relora.complement_report.without_backward == ()
    for name, layer in layers_of(model).items():
        wanted = before[name] - LR * majority(perps[name])
        # A key's bias and the like have no gradient at all; there the sign is rounding's.
        size = min(float(np.abs(perp).max()) for perp in perps[name])
        clear = np.min([np.abs(perp) for perp in perps[name]], axis=0) > 1e-9 * size
        assert clear.mean() > 0.9, name
        np.testing.assert_allclose(as_rows(layer)[clear], wanted[clear], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_rows_see_more_than_random_ones_and_the_model_folds(model_type: str) -> None:
    config = replace(CONFIG, init="gradient", residual="none")
    model = causal_lm(model_type)
    keys = list(model.state_dict())
    inject(model, config)
    optimizer = adamw(model, lr=LR)
    relora = ReLoRA(model, optimizer, config)
    for step in (1, 2):
        optimizer.zero_grad()
        gradients = dense_gradients(model, step)
        backward(model, step, 2)
        optimizer.step()
        report = relora.after_step(step)
    assert report is not None and report.gradient_init is not None
    assert report.gradient_init.gradient_rows == report.gradient_init.rows == 3 * len(gradients)
    shares = {
        name: captured(gradients[name], layer.lora_A.detach().numpy())
        for name, layer in layers_of(model).items()
    }
    assert np.mean(list(shares.values())) > 0.9 and min(shares.values()) > 0.6, shares
    fold(model)
    assert list(model.state_dict()) == keys


def dense_gradients(model: nn.Module, step: int) -> dict[str, Any]:
    """Every layer's gradient of the function's weight, on a folded copy."""
    folded = copy.deepcopy(model)
    names = list(layers_of(folded))
    fold(folded)
    backward(folded, step, 1)
    found = {}
    for name in names:
        weight = folded.get_submodule(name).weight
        assert isinstance(weight, Tensor) and weight.grad is not None
        is_transposed = type(folded.get_submodule(name)).__name__ == "Conv1D"
        found[name] = (weight.grad.T if is_transposed else weight.grad).numpy()
    return found


def test_an_expert_without_tokens_is_named_and_stays() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            routed = x[:, 0] > 1e9
            out = torch.zeros_like(x)
            out[~routed] = self.first(x[~routed])
            out[routed] = self.second(x[routed])
            return out

    torch.manual_seed(0)
    model = Experts()
    inject(model, CONFIG)
    optimizer = adamw(model, lr=LR)
    relora = ReLoRA(model, optimizer, CONFIG)
    second = model.second.weight.detach().clone()
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    relora.after_step(1)
    # A pass with no tokens is a pass; it has nothing to say.
    assert torch.equal(model.second.weight, second)
    assert relora.complement_report is not None
    assert relora.complement_report.moved_fraction == 0.5
