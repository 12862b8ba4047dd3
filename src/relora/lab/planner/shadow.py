"""A model of fake tensors: the real modules with shapes and no memory, and only as deep as it need be.

The layers of a decoder are alike, so what a model holds at any moment that can be the peak grows by the same
amount with each of them. Two shadows, of three and of four layers, tell that amount.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from relora.train.method_parts import LoRALinear

SHADOW_DEPTHS = (3, 4)
_LARGE_BLOCKS = 8


def repeated_layers(model: nn.Module) -> nn.ModuleList:
    """Return a decoder's list of layers, the longest by parameters; an empty one if there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=nn.ModuleList())


def are_alike(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Tell whether each layer holds what the others hold."""
    kinds = getattr(model.config, "layer_types", None) or ()
    shapes = {
        (type(layer), tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters()))
        for layer in layers
    }
    return len(shapes) == 1 and len(set(kinds)) < 2


def as_fake_(model: nn.Module) -> None:
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


@contextmanager
def as_if_real() -> Iterator[None]:
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


@contextmanager
def in_large_blocks() -> Iterator[None]:
    """Let low-rank layers go over a few blocks of rows where they take many small ones.

    It saves time. A block's bytes, a fraction of one layer, are nothing beside a model that is deep.
    """

    own_blocks = LoRALinear.row_blocks

    def row_blocks(layer: LoRALinear) -> Iterator[slice]:
        step = max(next(own_blocks(layer)).stop, -(-layer.out_features // _LARGE_BLOCKS))
        for first in range(0, layer.out_features, step):
            yield slice(first, min(first + step, layer.out_features))

    LoRALinear.row_blocks = row_blocks  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del LoRALinear.row_blocks  # the inherited one is there again
