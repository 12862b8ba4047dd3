"""The cells of the quickstart's sweep."""

from dataclasses import dataclass, field
from typing import Any

Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the sweep."""

    arm: str
    stage: str
    lr: float
    seed: int = 0
    rest: float = 1.0
    """Multiple of the rate for embeddings, head and norms, in both phases."""
    label: str = ""
    changes: Overrides = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        rest = f"m{self.rest:g}" if self.rest != 1 else ""
        return "-".join(filter(None, [self.arm, f"lr{self.lr:g}", self.label, rest, f"s{self.seed}"]))

    @property
    def overrides(self) -> Overrides:
        """What the cell sets otherwise than the shipped recipe."""
        sections: Overrides = {"optim": {"lr": self.lr, "rest_lr_multiples": [self.rest] * 3}}
        for section, fields in self.changes.items():
            sections[section] = {**sections.get(section, {}), **fields}
        return sections

    @property
    def has_warm_start(self) -> bool:
        """Whether the run begins with a full-rank phase that others may share."""
        at_full_rank = ("full", "full-muon", "muon-in-place")
        return self.arm not in (*at_full_rank, "relora-cold", "relora-columns", "relora-muon")

    @property
    def warm_start(self) -> tuple[float, float, int]:
        """What determines the warm start."""
        return self.lr, self.rest, self.seed


RANK = 32
"""Of the shipped recipe."""

BOTH = {
    "factors": "both",
    "init": "kaiming",
    "scaling_rule": "alpha/r",
    "restart_every": 80,
    "residual": "none",
}
ONE_SIDED = {
    "factors": "B",
    "scaling_rule": "matched",
    "reset": "none",
    "restart_every": 40,
    "residual": "none",
}


COLUMNS = {"init": "columns", "reset": "transport"}


def full(lr: float, **cell: Any) -> Cell:
    """Full rank throughout."""
    return Cell(arm="full", lr=lr, changes={"run": {"method": "full"}}, **cell)


def one_sided(lr: float, times: float, **cell: Any) -> Cell:
    """ReLoRA with lora_B alone trained, matched scale, nothing reset, no re-warm; factors at times x lr.

    Its scale is its rate: Adam's step in lora_B does not depend on the scale, so twice the scale is twice the
    step in W, as twice the rate is.
    """
    changes = {"relora": ONE_SIDED, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-B", lr=lr, label=f"f{times:g}", changes=changes, **cell)


def signed(lr: float, times: float, *, scale: float = 1.0, **cell: Any) -> Cell:
    """One-sided, and a sign step on the complement of lora_A's rows in every step (docs/beyond.md).

    `scale` multiplies the step on the complement.
    """
    label = f"f{times:g}" + (f"c{scale:g}" if scale != 1 else "")
    relora = ONE_SIDED | {"residual": "sign"} | ({} if scale == 1 else {"residual_scale": scale})
    changes = {"relora": relora, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-sign", lr=lr, label=label, changes=changes, **cell)


def cold(lr: float, times: float, **cell: Any) -> Cell:
    """As `signed`, without a warm start: no full-rank phase at all."""
    relora = ONE_SIDED | {"residual": "sign", "warm_start_steps": 0}
    changes = {"relora": relora, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-cold", lr=lr, label=f"f{times:g}", changes=changes, **cell)


def muon(lr: float, times: float, *, scale: float, rank: int = RANK, **cell: Any) -> Cell:
    """As `cold`, with Muon's step on the complement at `scale` times the factors' rate."""
    relora = ONE_SIDED | {"residual": "muon", "residual_scale": scale, "warm_start_steps": 0}
    relora |= {} if rank == RANK else {"rank": rank}
    label = f"f{times:g}c{scale:g}" + (f"r{rank}" if rank != RANK else "")
    changes = {"relora": relora, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-muon", lr=lr, label=label, changes=changes, **cell)


def warm_muon(lr: float, times: float, *, scale: float, **cell: Any) -> Cell:
    """As `muon`, after the warm start that the other arms share."""
    relora = ONE_SIDED | {"residual": "muon", "residual_scale": scale}
    changes = {"relora": relora, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-muon-warm", lr=lr, label=f"f{times:g}c{scale:g}", changes=changes, **cell)


def full_muon(lr: float, **cell: Any) -> Cell:
    """Full rank, hidden matrices by Muon at `lr`; embeddings, head and norms at the rate of `full`."""
    changes = {"run": {"method": "full-muon"}, "method": {"adamw_lr": PEAK}}
    return Cell(arm="full-muon", lr=lr, changes=changes, **cell)


def in_place(lr: float, **cell: Any) -> Cell:
    """Full rank by the step that `muon` takes on the complement: no factors, no gradient of the matrices."""
    changes = {"run": {"method": "muon-in-place"}, "method": {"adamw_lr": PEAK}}
    return Cell(arm="muon-in-place", lr=lr, changes=changes, **cell)


def columns(lr: float, times: float, **cell: Any) -> Cell:
    """As `one_sided`, but lora_A selects inputs, and what Adam knows of a row is carried over restarts."""
    changes = {"relora": ONE_SIDED | COLUMNS, "optim": {"factor_lr": lr * times}}
    return Cell(arm="relora-B-columns", lr=lr, label=f"f{times:g}", changes=changes, **cell)


def cold_columns(lr: float, times: float, *, scale: float, every: int = 40, **cell: Any) -> Cell:
    """As `cold`, with lora_A as in `columns`."""
    relora = ONE_SIDED | COLUMNS | {"residual": "sign", "warm_start_steps": 0, "residual_scale": scale}
    relora |= {"restart_every": every}
    changes = {"relora": relora, "optim": {"factor_lr": lr * times}}
    return Cell(
        arm="relora-columns",
        lr=lr,
        label=f"f{times:g}c{scale:g}" + (f"e{every}" if every != 40 else ""),
        changes=changes,
        **cell,
    )


def both(lr: float, times: float, *, scale: float = 1.0, **cell: Any) -> Cell:
    """The paper's form: both factors, magnitude reset, re-warm."""
    relora = BOTH | {"reset": "magnitude", "reset_ratio": 0.99}
    return _two_factors("relora-both", {"relora": relora}, lr, times=times, scale=scale, **cell)


def lora(lr: float, times: float, *, scale: float = 1.0, **cell: Any) -> Cell:
    """LoRA from the same warm start: both factors, no restarts."""
    changes = {"run": {"method": "lora"}, "relora": BOTH}
    return _two_factors("lora", changes, lr, times=times, scale=scale, **cell)


def _two_factors(arm: str, changes: Overrides, lr: float, *, times: float, scale: float, **cell: Any) -> Cell:
    """An arm that trains both factors, at a scale of alpha / r."""
    relora = changes["relora"] if scale == 1 else changes["relora"] | {"alpha": scale * RANK}
    optim, schedule = {"factor_lr": lr * times}, {"rewarmup_steps": 10}
    changes = {**changes, "relora": relora, "optim": optim, "schedule": schedule}
    label = f"f{times:g}" + (f"s{scale:g}" if scale != 1 else "")
    return Cell(arm=arm, lr=lr, label=label, changes=changes, **cell)


PEAK = 4e-3
"""The best full-rank learning rate of the stage "full"; warm starts use it where no other is named."""

REST = 32.0
"""The multiple for embeddings, head and norms that full rank wants; 64 was worse, and not run to its end."""

CELLS = [
    *(full(lr, stage="full") for lr in (2e-3, 4e-3, 8e-3)),
    *(full(PEAK, rest=rest, stage="full") for rest in (2, 4, 8, 16, 32)),
    *(full(PEAK * times, rest=REST / times, stage="full") for times in (0.5, 2)),
    *(full(PEAK, rest=REST, stage="full", seed=seed) for seed in (1, 2)),
    *(arm(PEAK, times, rest=REST, stage="factors") for times in (1, 2, 4) for arm in (lora, both)),
    *(arm(PEAK, times, rest=REST, stage="factors") for times in (0.5, 1, 2) for arm in (signed, one_sided)),
    one_sided(PEAK, 4, rest=REST, stage="factors"),
    *(signed(PEAK, 1, scale=scale, rest=REST, stage="factors") for scale in (0.25, 0.5, 2)),
    *(cold(PEAK, times, rest=REST, stage="cold") for times in (1, 0.5, 2)),
    *(cold(PEAK, 0.5, rest=REST, stage="cold", seed=seed) for seed in (1, 2)),
    *(muon(PEAK, 0.5, scale=scale, rest=REST, stage="muon") for scale in (5, 2.5, 10)),
    *(muon(PEAK, times, scale=2.5 / times, rest=REST, stage="muon") for times in (1, 0.25)),
    *(full_muon(lr, rest=REST, stage="muon") for lr in (1e-2, 5e-3, 2.5e-3)),
    *(muon(PEAK, 0.5, scale=5, rest=REST, stage="muon seeds", seed=seed) for seed in (1, 2)),
    *(muon(PEAK, 0.5, scale=5, rank=rank, rest=REST, stage="muon rank") for rank in (4, 16)),
    *(warm_muon(PEAK, 0.5, scale=scale, rest=REST, stage="muon warm") for scale in (5, 2.5)),
    *(full_muon(5e-3, rest=REST, stage="muon seeds", seed=seed) for seed in (1, 2)),
    *(in_place(lr, rest=REST, stage="in place") for lr in (1e-2, 5e-3, 2e-2, 2.5e-3)),
    *(in_place(1e-2, rest=REST, stage="in place seeds", seed=seed) for seed in (1, 2)),
    *(columns(PEAK, times, rest=REST, stage="columns") for times in (1, 2)),
    *(cold_columns(PEAK, 1, scale=0.5, rest=REST, stage="cold", seed=seed) for seed in (0, 1, 2)),
    *(cold_columns(PEAK, 1, scale=0.5, every=every, rest=REST, stage="every") for every in (100, 200)),
    *(signed(PEAK, 1, rest=REST, stage="seeds", seed=seed) for seed in (1, 2)),
    *(signed(PEAK, 1, scale=0.5, rest=REST, stage="seeds", seed=seed) for seed in (1, 2)),
    *(lora(PEAK, 2, rest=REST, stage="seeds", seed=seed) for seed in (1, 2)),
    *(both(PEAK, 2, rest=REST, stage="seeds", seed=seed) for seed in (1, 2)),
    *(one_sided(PEAK, 2, rest=REST, stage="seeds", seed=seed) for seed in (1, 2)),
    *(arm(PEAK, 2, scale=scale, rest=REST, stage="scale") for scale in (0.5, 2, 4) for arm in (lora, both)),
    both(PEAK, 2, scale=8, rest=REST, stage="scale"),
    *(signed(PEAK, 1, rest=rest, stage="rest") for rest in (16, 64)),
]
