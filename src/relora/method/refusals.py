"""Which layers and optimizers cannot be restarted, said before anything changes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from relora.errors import ConfigError
from relora.method.adapters import OptimizerAdapter
from relora.method.config import ReLoRAConfig
from relora.method.linear import LoRALinear
from relora.method.shards import is_sharded, local


def refuse_unmergeable(layers: Sequence[LoRALinear]) -> None:
    """Refuse layers of which this process holds a part that it cannot merge by itself.

    Raises:
        ConfigError: naming the first.
    """
    for layer in layers:
        if why := _obstacle(layer):
            raise ConfigError(f"{layer.name or 'the layer'} is sharded {why}")


def _obstacle(layer: LoRALinear) -> str | None:
    base, lora_B = layer.weight, layer.lora_B
    if base.ndim != 2 or lora_B.ndim != 2:
        return (
            "by FullyShardedDataParallel, which cuts weights regardless of rows: use fully_shard (FSDP2), or "
            "DistributedDataParallel"
        )
    placements, beside = (getattr(parameter, "placements", ()) for parameter in (base, lora_B))
    if not placements and not beside:
        return None
    by_rows = all(placement.is_replicate() or placement.is_shard(0) for placement in placements)
    if placements != beside or not by_rows or len(local(base)) != len(local(lora_B)):
        return (
            f"otherwise than by its rows, as fully_shard does it: its base is placed {placements}, lora_B "
            f"{beside}; shard whole layers, by dimension 0, and ignore none of their parameters"
        )
    if base.device.type != cast(Any, base).device_mesh.device_type:
        return f"and offloaded to the {base.device.type}, where ranks do not meet: leave that policy out"
    residual = layer.weight_residual if layer.host_residual is None else layer.host_residual
    if layer.is_transposed or residual is not None:
        kind = "a Conv1D, stored transposed" if layer.is_transposed else f"of {base.dtype}"
        return (
            f"and {kind}: of sharded layers only an nn.Linear in float32 can be merged; torch.autocast "
            "computes in bf16 with it"
        )
    return None


def refuse_other_config(layers: Sequence[LoRALinear], config: ReLoRAConfig) -> None:
    """Refuse layers that were injected with a config other than the one they are to be restarted by.

    Raises:
        ConfigError: naming the first, and what differs.
    """
    for layer in layers:
        if layer.config == config:
            continue
        mine, theirs = asdict(config), asdict(layer.config)
        fields = [f"{k} {theirs[k]!r} (here {mine[k]!r})" for k in mine if mine[k] != theirs[k]]
        raise ConfigError(
            f"{layer.name} was injected with another config: {', '.join(fields)}; pass inject and ReLoRA the "
            "same"
        )


def refuse_encoded_shards(layers: Sequence[LoRALinear], adapters: Sequence[OptimizerAdapter]) -> None:
    """Refuse states that a reset would have to gather and to decode at once.

    Raises:
        ConfigError: naming the first optimizer that has them.
    """
    encoding = [adapter for adapter in adapters if type(adapter).read is not OptimizerAdapter.read]
    if encoding and any(is_sharded(layer.lora_B) for layer in layers):
        raise ConfigError(
            f"the factors are sharded, and {encoding[0].optimizer.__name__} encodes its states: a reset "
            "knows one of them at a time; use an optimizer of torch.optim, or DistributedDataParallel"
        )
