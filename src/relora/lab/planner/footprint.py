"""One optimizer step of a recipe, taken on tensors without memory: what it holds, and when it holds most.

Nothing here knows how large anything is. The real model is built on the meta device, the real `inject` puts
the factors in, and the real training step runs on fake tensors under `LiveBytes`: figures follow the code.
Fused kernels' scratch memory, the allocator's rounding and what a GPU's context takes are not in them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from relora.lab.planner.live import CAST, LiveBytes
from relora.train.blueprint import blueprint
from relora.train.config import Recipe
from relora.train.loss import TokenLoss
from relora.train.parallel import Processes
from relora.train.phase import Optimizer, build_optimizer, inject_factors, num_parameters, state_bytes
from relora.train.precision import Resolved
from relora.train.setup import enable_checkpointing_
from relora.train.step import train_step_

WEIGHTS, RESIDUAL, LORA, STATES = "weights", "residual", "factors", "optimizer"
FORWARD, LOSS, BACKWARD, GRADIENTS = "activations", "loss", "backward", "gradients"
UPDATE, OTHER = "update", "other"
_FACTORS = ("lora_A", "lora_B", "lora_scaling")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one device holds in a phase of a run, in bytes, and what a token costs."""

    parameters_total: int
    parameters_trainable: int
    parameters_factors: int
    weights_bytes: int
    """Parameters of the plain model, and its constants."""
    residual_bytes: int
    """What a base in low precision keeps beside it, so that merges lose nothing."""
    factors_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    casts_bytes: int
    """Copies of weights in the dtype of the products, at the end of a forward pass."""
    activations_bytes: int
    """Saved by the model's layers for the backward pass of one micro batch."""
    loss_bytes: int
    """The most that the head and the loss hold at one time, logits and the head's gradient included."""
    bucket_bytes: int
    """Buckets in which DDP keeps the gradients between steps; 0 on one device."""
    peak_bytes: int
    """The most held at one time in a step."""
    peak_by_kind: dict[str, int]
    """What the peak is made of."""
    activations_bytes_per_token: float
    flops_per_token: float
    """Matrix products of forward and backward, recomputation included."""


def footprint(
    recipe: Recipe, *, low_rank: bool, precision: Resolved, vocab_size: int | None = None, devices: int = 1
) -> Footprint:
    """Take a step of a recipe on fake tensors.

    Args:
        recipe: The run.
        low_rank: Whether with factors, or at full rank as before the switch.
        precision: Of the matrix products.
        vocab_size: As for `blueprint`.
        devices: Processes that share the batch under DDP.

    Raises:
        ConfigError: if the model cannot be built, or the factors do not fit into it.
    """
    model = blueprint(recipe, vocab_size=vocab_size)
    plain = cast(nn.Module, model)
    if recipe.train.gradient_checkpointing:
        enable_checkpointing_(model)
    if low_rank:
        inject_factors(plain, recipe)
    rows, live = recipe.train.micro_batch_size, LiveBytes()
    with FakeTensorMode(), _as_if_real():
        _as_fake_(plain)
        with live:
            _count_weights(live, plain)
            loss = TokenLoss(model, chunk_tokens=recipe.train.loss_chunk_tokens)
            optimizer = build_optimizer(plain, recipe, "low_rank" if low_rank else "full")
            _make_states_(live, optimizer)
            if devices > 1 or recipe.train.batch_size > rows * devices:
                _hold_gradients_(live, optimizer)
            seen = _watch(live, loss, optimizer)
            live.restart_peak()
            _step_(recipe, loss, optimizer, precision)
        tokens = rows * recipe.data.seq_len
        factors = [p for name, p in plain.named_parameters() if name.endswith(_FACTORS)]
        return Footprint(
            parameters_total=num_parameters(plain),
            parameters_trainable=num_parameters(plain, trainable=True),
            parameters_factors=sum(p.numel() for p in factors),
            weights_bytes=seen[WEIGHTS],
            residual_bytes=seen[RESIDUAL],
            factors_bytes=seen[LORA],
            gradients_bytes=live.bytes[GRADIENTS],
            optimizer_bytes=state_bytes(optimizer.adamw),
            casts_bytes=seen[CAST],
            activations_bytes=seen[FORWARD],
            loss_bytes=live.label_peaks[LOSS],
            bucket_bytes=live.bytes[GRADIENTS] if devices > 1 else 0,
            peak_bytes=live.peak,
            peak_by_kind={kind: num for kind, num in live.at_peak.items() if num},
            activations_bytes_per_token=seen[FORWARD] / tokens,
            flops_per_token=live.flops / tokens,
        )


@contextmanager
def _as_if_real() -> Iterator[None]:
    """Let `transformers` look at the values of fake tensors, which `LiveBytes` answers for.

    It takes fake tensors for a graph being traced, where it cannot see that sequences are not packed, and
    hands attention a (T, T) mask that a run in eager mode never makes.
    """
    module: Any = masking_utils
    found = getattr(module, "is_tracing", None)
    module.is_tracing = lambda *_: False
    try:
        yield
    finally:
        module.is_tracing = found


def _as_fake_(model: nn.Module) -> None:
    """Put a fake tensor of the CPU in the place of every tensor of a model on the meta device.

    The CPU's kernels are the ones that choose how attention is computed; the meta device would write out
    the (T, T) weights that neither CPU nor GPU keep.
    """
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return fakes[id(tensor)]

    for module in model.modules():
        tensors: dict[str, Any]
        for tensors in (cast(dict[str, Any], module._parameters), module._buffers, vars(module)):
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    tensors[name] = fake(value)


def _count_weights(live: LiveBytes, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        live.count([parameter], LORA if name.endswith(_FACTORS) else WEIGHTS, are_parameters=True)
    for name, buffer in model.named_buffers():
        live.count([buffer], RESIDUAL if "residual" in name else WEIGHTS)


def _make_states_(live: LiveBytes, optimizer: Optimizer) -> None:
    """Let the optimizer make its states, as its first step does."""
    for parameter in _trained(optimizer):
        parameter.grad = torch.empty_like(parameter)
    live.label = STATES
    optimizer.adamw.step()
    optimizer.adamw.zero_grad(set_to_none=True)


def _hold_gradients_(live: LiveBytes, optimizer: Optimizer) -> None:
    """Keep gradients in memory through the forward pass.

    So they are in every micro step but a batch's first, and under DDP always, whose buckets they live in.
    """
    live.label = GRADIENTS
    for parameter in _trained(optimizer):
        parameter.grad = torch.empty_like(parameter)
    optimizer.adamw.zero_grad = _keep_gradients  # type: ignore[method-assign]


def _keep_gradients(set_to_none: bool = True) -> None:
    del set_to_none


def _watch(live: LiveBytes, loss: TokenLoss, optimizer: Optimizer) -> Counter[str]:
    """Tell `live` what is under way, and return what is held at the end of the layers' forward pass."""
    seen = Counter(live.bytes)

    def begin(label: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            live.label = label

        return hook

    def at_hidden_states(*_: object) -> None:
        for kind in (FORWARD, CAST):
            seen[kind] = live.bytes[kind]
        live.label = LOSS

    def at_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.relabel(parameter.grad, GRADIENTS)

    loss.register_forward_pre_hook(begin(FORWARD))
    loss.body.register_forward_hook(at_hidden_states)
    loss.register_forward_hook(begin(BACKWARD))
    optimizer.adamw.register_step_pre_hook(begin(UPDATE))
    for parameter in _trained(optimizer):
        parameter.register_post_accumulate_grad_hook(at_gradient)
    live.label = OTHER
    return seen


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.adamw.param_groups for parameter in group["params"]]


def _step_(recipe: Recipe, loss: TokenLoss, optimizer: Optimizer, precision: Resolved) -> None:
    """Take the trainer's own step, of one micro batch."""
    rows = recipe.train.micro_batch_size
    train_step_(
        loss,
        optimizer,
        torch.zeros(rows, recipe.data.seq_len, dtype=torch.int64),
        Processes(rank=0, world_size=1, device=torch.device("cpu")),
        step=1,
        seed=recipe.run.seed,
        micro_batch_size=rows,
        precision=precision,
        clip_grad_norm=recipe.optim.clip_grad_norm,
    )
