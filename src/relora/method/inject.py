"""Put low-rank factors into a model, and take them out again.

`inject` turns the target layers into `LoRALinear` in place and freezes their weights; what else was trainable
(embeddings, norms, head, biases) stays so. `fold` merges once more and gives the plain layers back.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.casts import InputCasts
from relora.method.codecs import base_codec
from relora.method.config import ReLoRAConfig
from relora.method.linear import LoRALinear, lora_layers
from relora.method.merge import merge_
from relora.method.shards import is_sharded, reshard_
from relora.method.targets import LeftAlone, TargetChoice, choose_targets


@dataclass(frozen=True, kw_only=True)
class WrappedLayer:
    """A layer that carries factors now."""

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class InjectReport:
    """What `inject` did to a model."""

    wrapped: tuple[WrappedLayer, ...]
    full_rank: tuple[str, ...]
    """Names of the parameters outside the factors that still train, at full rank."""
    left_alone: tuple[LeftAlone, ...]
    """Large 2-D and 3-D weights without factors, each with its reason; they train as before."""
    unmatched_patterns: tuple[str, ...]
    """Patterns of `targets` and `exclude` that matched no module at all."""
    num_base_parameters: int
    """Parameters of the plain model."""
    num_factor_parameters: int
    """Parameters added: lora_A, lora_B and learned scalings."""
    num_trainable_parameters: int
    """Parameters that require gradients now."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.wrapped)} layers wrapped; {self.num_trainable_parameters:,} of "
            f"{self.num_base_parameters + self.num_factor_parameters:,} parameters train "
            f"({self.num_factor_parameters:,} in factors)"
        ]
        lines += [f"left alone: {w.name} {list(w.shape)}: {w.reason}" for w in self.left_alone]
        return "\n".join(lines)


def inject(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0) -> InjectReport:
    """Add low-rank factors to a model's target layers, in place (paper Algorithm 1, line 3).

    The outputs stay bit-equal, since lora_B starts at 0, and the first backward already gives lora_B a
    gradient. Build the optimizer after this call.

    Args:
        model: Any module with linear layers; inject before wrapping it for distributed training.
        config: What to wrap and how.
        seed: Root of the seeds of every lora_A; each also depends on the layer's name.

    Raises:
        ConfigError: if the model is injected already, nothing matches, a target's weight is tied, or the
            rank does not fit a target; the model is then unchanged.
    """
    choice = choose_targets(model, config)
    _refuse_storage(config, choice.layers)
    _warn_of_settings(config, choice)
    num_base = _num_parameters(model)
    casts = InputCasts()
    for name, layer in choice.layers.items():
        LoRALinear.wrap_(layer, config, name=name, seed=seed, casts=casts)
    _keep_fused_encoder_path_off(model)
    factors = dict(lora_parameters(model))
    return InjectReport(
        wrapped=tuple(_describe(layer) for layer in lora_layers(model)),
        full_rank=tuple(n for n, p in model.named_parameters() if p.requires_grad and n not in factors),
        left_alone=choice.left_alone,
        unmatched_patterns=choice.unmatched_patterns,
        num_base_parameters=num_base,
        num_factor_parameters=sum(p.numel() for p in factors.values()),
        num_trainable_parameters=_num_parameters(model, trainable=True),
    )


def fold(model: nn.Module) -> nn.Module:
    """Merge the factors once more and give the original layer kinds back, in place.

    State-dict keys are as before `inject`, and the weights require gradients where they did then.

    Returns:
        The same object.

    Raises:
        ConfigError: if the model holds no factors, or is sharded.
        NonFiniteError: if a merged weight would not be finite; nothing has changed then.
    """
    reshard_(model)
    layers = lora_layers(model)
    for layer in layers:
        if is_sharded(layer.weight):
            raise ConfigError(
                f"{layer.name or 'the layer'} is sharded: fold a whole model instead, injected alike, into "
                "which torch.distributed.checkpoint.state_dict.get_model_state_dict(..., "
                "options=StateDictOptions(full_state_dict=True)) of this one is loaded"
            )
    merge_(layers)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _release_fused_path(module)
    for layer in layers:
        layer.unwrap_()
    return model


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every lora_A, lora_B and learned scaling with its full parameter name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for leaf in ("lora_A", "lora_B", "lora_scaling"):
                parameter = getattr(module, leaf)
                if parameter is not None:
                    yield f"{name}.{leaf}".lstrip("."), parameter


def _describe(layer: LoRALinear) -> WrappedLayer:
    return WrappedLayer(
        name=layer.name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=layer.config.rank,
        scaling=layer.fixed_scaling,
    )


def _num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad or not trainable)


def _refuse_storage(config: ReLoRAConfig, layers: dict[str, nn.Module]) -> None:
    codec = base_codec(config.base_dtype)
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight)
        if config.base_dtype != "keep" and weight.dtype == torch.float64:
            raise ConfigError(
                f"inject: {name} is float64, and base_dtype={config.base_dtype!r} keeps float32 of it: "
                "use base_dtype='keep'"
            )
        if codec is not None and weight.is_meta:
            raise ConfigError(
                f"inject: {name} is on the meta device, where there is nothing to code as "
                f"{config.base_dtype}: load the weights first"
            )


def _warn_of_settings(config: ReLoRAConfig, choice: TargetChoice) -> None:
    messages = []
    if config.merge_precision == "native":
        messages.append(
            "merge_precision='native' rounds every merge to the base's dtype; bf16 loses most of it"
        )
    if config.scaling_rule == "matched" and config.alpha is not None:
        messages.append("alpha has no effect with scaling_rule='matched'; kappa is its multiplier")
    rule = config.scaling_rule_in_force
    if rule != "matched" and config.kappa != 1.0:
        messages.append(f"kappa has no effect with scaling_rule={rule!r}")
    dtypes = {cast(Tensor, layer.weight).dtype for layer in choice.layers.values()}
    if config.master == "host" and config.base_dtype == "keep" and dtypes <= {torch.float32, torch.float64}:
        messages.append(
            "master='host' has no effect: a float32 base is its own master; base_dtype='bf16' halves it"
        )
    if config.init != "gradient" and config.init_mix:
        messages.append(f"init_mix has no effect with init={config.init!r}")
    if config.residual == "none":
        given = {"residual_scale": config.residual_scale, "residual_every": config.residual_every}
        messages += [f"{name} has no effect with residual='none'" for name, k in given.items() if k != 1]
    messages += [f"pattern {pattern!r} matches no module" for pattern in choice.unmatched_patterns]
    for message in messages:
        warnings.warn(message, stacklevel=3)


# In eval mode nn.TransformerEncoderLayer hands linear1.weight and linear2.weight to a fused kernel, past the
# layers' forward and so past their factors. It keeps to the Python path where a forward hook is attached.
_FUSED_PATH_HOOK = "_relora_keeps_fused_path_off"


def _keep_fused_encoder_path_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            wrapped = [layer for layer in module.children() if isinstance(layer, LoRALinear)]
            if wrapped:
                setattr(module, _FUSED_PATH_HOOK, wrapped[0].register_forward_pre_hook(_do_nothing))


def _release_fused_path(module: nn.Module) -> None:
    handle = module.__dict__.pop(_FUSED_PATH_HOOK, None)
    if handle is not None:
        handle.remove()


def _do_nothing(module: nn.Module, args: object) -> None:
    del module, args
