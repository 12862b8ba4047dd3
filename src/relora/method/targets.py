"""Which layers of a model get factors, which cannot, and why.

Nothing here changes the model. A layer is linear by what it is (an `nn.Linear` whose forward is
`nn.Linear`'s own, or a `Conv1D` by its attributes), never by a model's name, so any architecture works; and
whatever large weight is passed over is named with its reason.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from relora.errors import ConfigError
from relora.method.config import ALL_LINEAR, ReLoRAConfig
from relora.method.linear import LoRALinear
from relora.method.master import SUPPORTED_DTYPES

_WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
_DISTRIBUTED_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "output_projection", "head", "score", "classifier"})


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """A large weight without factors."""

    name: str
    """Full parameter name."""
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """The layers to wrap, by full name, and what was passed over."""

    layers: dict[str, nn.Module]
    left_alone: tuple[LeftAlone, ...]
    unmatched_patterns: tuple[str, ...]


def canonical_name(name: str) -> str:
    """Return a module's name without the parts that wrappers such as torch.compile add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def choose_targets(model: nn.Module, config: ReLoRAConfig) -> TargetChoice:
    """Choose the layers of `model` that `config` asks for.

    Raises:
        ConfigError: if the model is injected already or wrapped for distributed training, if nothing is
            left to wrap, or, listed all at once, if a target's weight is tied or too small for the rank.
    """
    _refuse_prepared(model)
    names = {canonical_name(name): module for name, module in model.named_modules()}
    reasons = {name: _obstacle(module) for name, module in names.items() if looks_linear(module)}
    reasons.update(_read_directly(names))
    heads = _output_heads(model)
    wanted = [name for name in names if _is_wanted(name, names[name], config, heads)]
    layers = {name: names[name] for name in wanted if reasons.get(name, "not linear") is None}
    if not layers:
        raise ConfigError(_nothing_to_wrap(reasons, wanted, config))
    violations = [*_tied(model, layers), *_too_small(layers, config.rank)]
    if violations:
        raise ConfigError.from_violations("inject", violations)
    return TargetChoice(
        layers=layers,
        left_alone=tuple(_left_alone(model, names, layers, reasons, heads, config.rank)),
        unmatched_patterns=tuple(_unmatched(names, config)),
    )


def looks_linear(module: nn.Module) -> bool:
    """Tell whether a module is an nn.Linear, a subclass of it, or a transposed `Conv1D`."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or weight.ndim != 2:
        return False
    return getattr(module, "nf", None) == weight.shape[1] and bias.shape == weight.shape[1:]


def _obstacle(module: nn.Module) -> str | None:
    """Say why a linear-looking layer cannot carry factors; None if it can."""
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "its weight or bias is computed by a parametrization"
    if hasattr(weight, "__tensor_flatten__"):  # quantised in a tensor that only says it is floating-point
        return f"its weight is stored as {type(weight).__name__}"
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"its weight is stored as {weight.dtype}"
    if weight.ndim == 2 and min(weight.shape) < 2:
        return "a side of 1 leaves no room for a rank"
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if own_forward or "forward" in vars(module):
        return f"{type(module).__name__} computes its output in its own way"
    return None


def _read_directly(names: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    for name, module in names.items():
        if isinstance(module, nn.MultiheadAttention):
            yield f"{name}.out_proj".lstrip("."), "nn.MultiheadAttention reads its weight without calling it"


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """Return the output heads: what the model declares, what is tied to an embedding, and the usual names."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = []
    for name, module in model.named_modules():
        declare = getattr(module, "get_output_embeddings", None)
        declared = declare() if callable(declare) else None
        if isinstance(declared, nn.Module):
            heads.append(declared)
        *path, leaf = name.split(".")
        # A model has one head: a layer of that name in a numbered block is something else.
        is_named = leaf in _HEAD_NAMES and not any(part.isdigit() for part in path)
        if looks_linear(module) and (is_named or id(module._parameters.get("weight")) in embeddings):
            heads.append(module)
    return heads


def _is_wanted(name: str, module: nn.Module, config: ReLoRAConfig, heads: list[nn.Module]) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in config.exclude):
        return False
    if config.targets == ALL_LINEAR:
        return not any(module is head for head in heads)
    return any(fnmatchcase(name, pattern) for pattern in config.targets)


def _refuse_prepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ in _DISTRIBUTED_WRAPPERS:
            kind = type(module).__name__
            raise ConfigError(f"inject: {name or 'the model'} is wrapped in {kind} already; inject it before")
        if isinstance(module, LoRALinear):
            raise ConfigError(
                f"inject: {name or 'the model'} is a LoRALinear already; a model is injected once "
                "(fold(model) gives the plain layers back)"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ConfigError(f"inject: {name} is not initialised yet; run one forward pass first")
        if hasattr(parameter, "placements"):
            raise ConfigError(f"inject: {name} is sharded already; call inject before fully_shard")


def _tied(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[str]:
    """Name the targets whose weight somebody else uses too: a merge would change both."""
    holders: dict[object, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[_storage(parameter)].append(canonical_name(name))
    for name, layer in layers.items():
        weight = f"{name}.weight".lstrip(".")
        others = [holder for holder in holders[_storage(layer.weight)] if holder != weight]
        if others:
            yield f"{name}: its weight is tied to {', '.join(others)}; add it to `exclude`"


def _storage(tensor: object) -> object:
    assert isinstance(tensor, Tensor)
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _too_small(layers: dict[str, nn.Module], rank: int) -> Iterator[str]:
    for name, layer in layers.items():
        shape = tuple(_weight(layer).shape)
        if rank >= min(shape):
            yield (
                f"{name or 'the model'}: rank {rank} is not smaller than both sides of its weight "
                f"{shape}; lower the rank, or add it to `exclude`"
            )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _left_alone(  # noqa: PLR0917
    model: nn.Module,
    names: dict[str, nn.Module],
    layers: dict[str, nn.Module],
    reasons: dict[str, str | None],
    heads: list[nn.Module],
    rank: int,
) -> Iterator[LeftAlone]:
    """Yield every 2-D or 3-D weight with room for factors of this rank that gets none."""
    for full_name, parameter in model.named_parameters():
        name = canonical_name(full_name)
        owner, _, leaf = name.rpartition(".")
        module = names[owner]
        is_large = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > rank
        if not is_large or (owner in layers and leaf == "weight"):
            continue
        if isinstance(module, nn.Embedding):
            reason = "embedding"
        elif any(module is head for head in heads):
            reason = "output head"
        elif owner in reasons:
            reason = reasons[owner] or "not among the targets"
        else:
            reason = f"{type(module).__name__} is not a linear layer"
        yield LeftAlone(name=name, shape=tuple(parameter.shape), reason=reason)


def _unmatched(names: dict[str, nn.Module], config: ReLoRAConfig) -> Iterator[str]:
    patterns = (*(config.targets if config.targets != ALL_LINEAR else ()), *config.exclude)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield pattern


def _nothing_to_wrap(reasons: dict[str, str | None], wanted: list[str], config: ReLoRAConfig) -> str:
    linear = [name for name, reason in reasons.items() if reason is None]
    if not linear:
        shown = _first(f"{name or 'the model'}: {reason}" for name, reason in reasons.items())
        found = shown or "it has none at all"
        return f"inject: no linear layer of this model can carry factors ({found})"
    if blocked := [name for name in wanted if name in reasons]:
        found = _first(f"{name or 'the model'}: {reasons[name]}" for name in blocked)
        return f"inject: no target can carry factors ({found})"
    patterns = config.targets if config.targets != ALL_LINEAR else ()
    for pattern in patterns:
        near = [name for name in linear if name.endswith(f".{pattern}")]
        near = near or difflib.get_close_matches(pattern, linear, 1)
        if near:
            leaf = near[0].rpartition(".")[2]
            return (
                f"inject: targets {config.targets} match no linear layer; patterns are matched against full "
                f"names such as {near[0]!r}: did you mean '*{leaf}'?"
            )
    return (
        f"inject: targets {config.targets!r} less exclude {config.exclude!r} leave no linear layer to wrap; "
        f"linear layers here are {_first(map(repr, linear))}"
    )


def _first(items: Iterable[str], most: int = 3) -> str:
    shown = list(items)
    return "; ".join([*shown[:most], *(["..."] if len(shown) > most else [])])
