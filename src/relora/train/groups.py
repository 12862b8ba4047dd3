"""What trains in a phase, in groups that share a learning rate, a weight decay and an optimizer.

Embeddings, the output head, and norms with biases train at full rank in every phase and by every method; each
has its own multiple of the rate (`optim.rest_lr_multiples`) and all of them a beta2 (`optim.rest_beta2`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from relora.errors import ConfigError
from relora.method.inject import lora_parameters
from relora.train.config import Recipe
from relora.train.sections import OptimConfig

PhaseName = Literal["full", "warm_start", "low_rank"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a peak learning rate, a weight decay and the rest of an optimizer's options."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    """None means the optimizer's."""
    by_muon: bool = False
    """Whether Muon steps them, instead of AdamW."""

    def options(self) -> dict[str, Any]:
        """Return the group as torch optimizers take it."""
        own = {} if self.betas is None else {"betas": self.betas}
        return {"params": self.params, "lr": self.lr, "weight_decay": self.weight_decay, **own}


def parameter_groups(model: nn.Module, recipe: Recipe, phase: PhaseName) -> list[Group]:
    """Return what trains in a phase: factors first, then the groups of `rest_groups`; none of them empty.

    Weight decay acts on matrices that train at full rank; never on factors, where it would shrink the delta
    instead of the weight, nor on norms and biases.

    Raises:
        ConfigError: as `rest_groups`.
    """
    optim = recipe.optim
    factors = {id(parameter) for _, parameter in lora_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    low_rank = [p for p in trained if id(p) in factors]
    is_muon = optim.factor_optimizer == "muon"
    # A learned scaling is no matrix, and stays with AdamW.
    muon = [p for p in low_rank if is_muon and p.ndim == 2]
    adamw = [p for p in low_rank if not is_muon or p.ndim != 2]
    groups = [
        Group(params=muon, lr=optim.factor_lr_in_force, by_muon=True),
        Group(params=adamw, lr=optim.factor_lr_in_force),
        *rest_groups(
            model,
            (p for p in trained if id(p) not in factors),
            optim,
            lr=optim.low_rank_lr_in_force if phase == "low_rank" else optim.lr,
        ),
    ]
    return [group for group in groups if group.params]


def rest_groups(
    model: nn.Module, params: Iterable[nn.Parameter], optim: OptimConfig, *, lr: float
) -> list[Group]:
    """Return groups of what trains at full rank: hidden matrices, embeddings, head, vectors; none empty.

    Those that have all in common are one group, so that by default there are two: matrices and vectors.

    Args:
        model: Tells which matrices are embeddings and which is the head.
        params: Of the model.
        optim: Multiples, beta2 and weight decay.
        lr: Peak learning rate, where the multiple is 1.

    Raises:
        ConfigError: if the head is tied to an embedding and its multiple another.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = head_weights(model)
    for_embeddings, for_head, for_vectors = optim.rest_lr_multiples
    if embeddings & head and for_embeddings != for_head:
        raise ConfigError(
            "optim.rest_lr_multiples: this model's output head is its embedding (tied), so that both must "
            f"have the same multiple, not {for_embeddings:g} and {for_head:g}"
        )
    betas = None if optim.rest_beta2 is None else (optim.betas[0], optim.rest_beta2)
    decay = optim.weight_decay
    groups: dict[tuple[Any, ...], Group] = {}

    def put(parameter: nn.Parameter, kind: str, multiple: float, *, own_betas: bool = True) -> None:
        group = Group(
            params=[],
            lr=multiple * lr,
            weight_decay=0.0 if kind == "vectors" else decay,
            betas=betas if own_betas else None,
        )
        key = (kind == "vectors", group.lr, group.weight_decay, group.betas)
        groups.setdefault(key, group).params.append(parameter)

    listed = list(params)
    special = embeddings | head
    for parameter in (p for p in listed if p.ndim >= 2 and id(p) not in special):
        put(parameter, "matrices", 1.0, own_betas=False)
    for parameter in (p for p in listed if p.ndim >= 2 and id(p) in special):
        put(parameter, "special", for_embeddings if id(parameter) in embeddings else for_head)
    for parameter in (p for p in listed if p.ndim < 2):
        put(parameter, "vectors", for_vectors)
    return list(groups.values())


def head_weights(model: nn.Module) -> set[int]:
    """Return the id of the output head's weight, as the model declares it; empty where it declares none."""
    declare = getattr(model, "get_output_embeddings", None)
    head = declare() if callable(declare) else None
    return {id(head.weight)} if isinstance(head, nn.Module) and hasattr(head, "weight") else set()
