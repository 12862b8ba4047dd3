"""What one device holds in a phase of a run, and when it holds most.

Traced on fake tensors (module `trace`): the whole model where it is small or its layers differ, else two
shadows of it, whose difference is what one more layer holds. Fused kernels' scratch memory, the allocator's
rounding and what a GPU's context takes are not in the figures.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from relora.errors import ConfigError
from relora.lab.planner.shadow import SHADOW_DEPTHS, are_alike, in_large_blocks, repeated_layers
from relora.lab.planner.trace import Circumstances, Trace, chunk_tokens_of, trace
from relora.train.blueprint import blueprint
from relora.train.chunked_loss import auto_chunk_tokens
from relora.train.config import Recipe
from relora.train.precision import Resolved
from relora.train.sections import ReLoRASection, TrainConfig

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one device holds in a phase of a run, in bytes, and what a token costs."""

    parameters_total: int
    parameters_trainable: int
    parameters_factors: int
    weights_bytes: int
    """Parameters of the plain model, in the dtype they are kept in, and its constants."""
    residual_bytes: int
    """What a base in low precision keeps beside it on the device, so that merges lose nothing."""
    host_bytes: int
    """What it keeps of that in host memory (relora.master "host")."""
    factors_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    observed_bytes: int
    """What relora.residual, init "gradient" or a warm start by steps in place keep of a weight's gradient,
    from a layer's backward pass to the end of the step."""
    casts_bytes: int
    """Copies of weights in the dtype of the products, at the end of a forward pass."""
    activations_bytes: int
    """Saved by the model's layers for the backward pass of one micro batch."""
    loss_bytes: int
    """The most that the head and the loss hold at one time, logits and the head's gradient included."""
    bucket_bytes: int
    """Buckets in which DDP keeps the gradients between steps; 0 on one device."""
    checkpoint_bytes: int
    """The copy in host memory of what a checkpoint saves, while it is written."""
    peak_bytes: int
    """The most held at one time; host memory is in it where the device is the host."""
    peak_moment: str
    """When that is."""
    peak_by_kind: dict[str, int]
    """What the peak is made of."""
    moments: dict[str, int]
    """The most held in each stage: start, forward, loss, backward, update, evaluation, restart."""
    activations_bytes_per_token: float
    flops_per_token: float
    """Matrix products of forward and backward, recomputed ones too, and a token's share of the update's."""


def footprint(
    recipe: Recipe,
    *,
    low_rank: bool,
    precision: Resolved,
    vocab_size: int | None = None,
    devices: int = 1,
    device: DeviceType = "cpu",
) -> Footprint:
    """Take a step, an evaluation and a restart of a recipe on fake tensors.

    Args:
        recipe: The run.
        low_rank: Whether with factors, or at full rank as before the switch, by steps in place where the
            recipe's warm start takes them.
        precision: Of the matrix products.
        vocab_size: As for `blueprint`.
        devices: Processes that share the batch under DDP.
        device: "cuda" has a host beside it, and larger chunks in the loss.

    Raises:
        ConfigError: if the model cannot be built or traced, or the factors do not fit into it.
    """
    rows = recipe.train.micro_batch_size
    given = Circumstances(
        low_rank=low_rank,
        precision=precision,
        holds_gradients=devices > 1 or recipe.train.batch_size > rows * devices,
        accumulates=recipe.train.batch_size > rows * devices,
        has_host=device != "cpu",
        chunk_tokens=_chunk_tokens(_plain(recipe), vocab_size, device),
    )
    found = _whole_trace(recipe, given, vocab_size)
    counts, tokens = found.counts, rows * recipe.data.seq_len
    stages: dict[str, int] = {}
    for (name, _), kinds in found.moments.items():
        stage = name.removesuffix(", layers")
        stages[stage] = max(stages.get(stage, 0), kinds.total())
    (peak_name, _), peak = max(found.moments.items(), key=lambda item: item[1].total())
    return Footprint(
        parameters_total=counts["total"],
        parameters_trainable=counts["trainable"],
        parameters_factors=counts["in_factors"],
        weights_bytes=counts["weights"],
        residual_bytes=counts["residual"],
        host_bytes=counts["host"],
        factors_bytes=counts["factors"],
        gradients_bytes=counts["gradients"],
        optimizer_bytes=counts["states"],
        observed_bytes=counts["observed"],
        casts_bytes=counts["casts"],
        activations_bytes=counts["activations"],
        loss_bytes=counts["loss"],
        bucket_bytes=counts["gradients"] if devices > 1 else 0,
        checkpoint_bytes=counts["checkpoint"],
        peak_bytes=peak.total(),
        peak_moment=peak_name.removesuffix(", layers"),
        peak_by_kind={kind: num for kind, num in peak.items() if num},
        moments=stages,
        activations_bytes_per_token=counts["activations"] / tokens,
        flops_per_token=counts["flops"] / tokens + counts["update_flops"] / recipe.tokens_per_step,
    )


def _whole_trace(recipe: Recipe, given: Circumstances, vocab_size: int | None) -> Trace:
    """Trace the whole model, or as much of it as tells the rest."""
    model = blueprint(recipe, vocab_size=vocab_size)
    layers = repeated_layers(model)
    num_layers = len(layers)
    try:
        if num_layers <= SHADOW_DEPTHS[-1] or not are_alike(model, layers):
            return trace(recipe, model, layers, given)
        with in_large_blocks():
            less, more = SHADOW_DEPTHS
            del layers[less:]
            shallow = trace(recipe, model, layers, given)
            model = blueprint(recipe, vocab_size=vocab_size)
            layers = repeated_layers(model)
            del layers[more:]
            deep = trace(recipe, model, layers, given, restart_extra=shallow.restart_extra)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"{model.config.model_type} cannot be planned: what it does depends on values in a way that is "
            f"not known here ({error}). `relora doctor` takes a real step"
        ) from error
    added = num_layers - less
    moments = {name: _continued(kinds, deep.moments[name], added) for name, kinds in shallow.moments.items()}
    return replace(deep, counts=_continued(shallow.counts, deep.counts, added), moments=moments)


def _continued(shallow: Mapping[str, int], deep: Mapping[str, int], more: int) -> Counter[str]:
    """Return what is counted with so many more layers, each of which adds the same."""
    keys = shallow.keys() | deep.keys()
    first, second = Counter(shallow), Counter(deep)
    return Counter({key: first[key] + more * (second[key] - first[key]) for key in sorted(keys)})


def _plain(recipe: Recipe) -> Recipe:
    """Return a recipe that says no more than which model it is and how its loss is taken."""
    return replace(
        recipe,
        run=replace(recipe.run, method="full"),
        relora=ReLoRASection(),
        train=TrainConfig(loss_chunk_tokens=recipe.train.loss_chunk_tokens),
    )


@functools.lru_cache
def _chunk_tokens(recipe: Recipe, vocab_size: int | None, device: DeviceType) -> int:
    """Return the tokens that the loss takes at a time on the device planned for."""
    model, wanted = blueprint(recipe, vocab_size=vocab_size), recipe.train.loss_chunk_tokens
    head: object = model.get_output_embeddings()
    if wanted is None and isinstance(head, torch.nn.Linear):
        wanted = auto_chunk_tokens(head.out_features, torch.device(device))
    layers = repeated_layers(model)
    if are_alike(model, layers):
        del layers[1:]
    return chunk_tokens_of(model, wanted)
