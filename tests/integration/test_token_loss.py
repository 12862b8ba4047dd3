"""The loss as a module: equal to the model's own for every architecture, and its own where it must be."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora import ReLoRAConfig, inject
from relora.train.loss import TokenLoss
from relora.train.sections import TrainConfig
from tiny_sizes import GPT2_SIZES, GROUPED
from tiny_sizes import SIZES as PLAIN_SIZES
from tiny_sizes import VOCAB_SIZE as V

IDS = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = PLAIN_SIZES | GROUPED
PLAIN: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 6},
    "gemma": SIZES | {"head_dim": 6},  # tied
    "gpt_neox": SIZES,
    "phi": SIZES,  # a head with a bias
    "opt": SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8},  # the decoder is inside the base model
    "gpt2": GPT2_SIZES,  # tied
}
OF_THEIR_OWN: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": (SIZES | {"head_dim": 6, "final_logit_softcapping": 2.0}, "changes the logits"),
    "cohere": (SIZES | {"logit_scale": 0.5}, "changes the logits"),
    "granite": (SIZES | {"logits_scaling": 3.0}, "changes the logits"),
    "mixtral": (SIZES | {"num_local_experts": 2, "output_router_logits": True}, "not the mean cross-entropy"),
}


def causal_lm(model_type: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return cast(PreTrainedModel, transformers.AutoModelForCausalLM.from_config(config)).eval()


def loss_and_gradients(model: nn.Module, *, chunk_tokens: int | None) -> tuple[TokenLoss, dict[str, Tensor]]:
    module = TokenLoss(cast(PreTrainedModel, model), chunk_tokens=chunk_tokens)
    model.zero_grad()
    loss = module(IDS)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return module, {"loss": loss.detach(), **found}


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_plain_head_gives_the_models_own_loss_and_gradients(model_type: str) -> None:
    model = causal_lm(model_type, PLAIN[model_type])
    module, ours = loss_and_gradients(model, chunk_tokens=5)
    assert module.obstacle is None and module.chunk_tokens == 5
    _, own = loss_and_gradients(model, chunk_tokens=0)
    assert own["loss"] == model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", OF_THEIR_OWN)
def test_a_model_with_a_loss_of_its_own_keeps_it_and_says_why(model_type: str) -> None:
    sizes, why = OF_THEIR_OWN[model_type]
    model = causal_lm(model_type, sizes)
    module, ours = loss_and_gradients(model, chunk_tokens=5)
    assert module.chunk_tokens == 0 and module.obstacle is not None and why in module.obstacle
    assert ours["loss"] == model(input_ids=IDS, labels=IDS).loss


def test_a_head_with_factors_keeps_whole_logits() -> None:
    model = causal_lm("llama", SIZES)
    inject(model, ReLoRAConfig(rank=3, targets=("*lm_head", "*q_proj")))
    module, _ = loss_and_gradients(model, chunk_tokens=None)
    assert module.obstacle == "its output head is a LoRALinear, not a plain linear layer"


def test_an_injected_model_trains_its_factors_through_it() -> None:
    model = causal_lm("llama", SIZES)
    inject(model, ReLoRAConfig(rank=3))
    module, ours = loss_and_gradients(model, chunk_tokens=None)
    _, own = loss_and_gradients(model, chunk_tokens=0)
    assert module.chunk_tokens == 256 and any(name.endswith("lora_B") for name in ours)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


def test_the_look_at_the_head_leaves_no_trace() -> None:
    model = causal_lm("llama", SIZES).train()
    state = torch.get_rng_state()
    TokenLoss(model, chunk_tokens=None)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_whole_logits_never_exist() -> None:
    model = causal_lm("llama", SIZES)
    sizes: list[int] = []
    module = TokenLoss(model, chunk_tokens=3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        module(IDS).backward()
    assert max(sizes) < IDS.numel() * V


# torch.compile itself instantiates the autograd function that it traces, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_ddp_and_compile_wrap_the_loss(tmp_path: Path, chunk_tokens: int | None) -> None:
    model = causal_lm("llama", SIZES)
    module, own = loss_and_gradients(model, chunk_tokens=chunk_tokens)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        compiled = cast(nn.Module, torch.compile(module, backend="aot_eager"))
        replica = nn.parallel.DistributedDataParallel(compiled)
        model.zero_grad()
        loss = replica(IDS)
        loss.backward()
        del replica  # see Processes.leave
    finally:
        dist.destroy_process_group()
    got = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close({"loss": loss.detach(), **got}, own, rtol=1e-5, atol=1e-6)


def test_a_negative_chunk_is_refused() -> None:
    assert TrainConfig(loss_chunk_tokens=-1).violations() == [
        "loss_chunk_tokens must be at least 0, or none, not -1"
    ]
