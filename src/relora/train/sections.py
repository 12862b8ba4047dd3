"""The sections of a recipe that belong to the trainer itself: what a user types, and what is wrong with it.

Settings that follow from others (none in the file) are properties, with the rule in their docstring.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relora.method.config import ReLoRAConfig
from relora.train.checks import unmet
from relora.train.methods import unknown_method

Precision = Literal["auto", "fp32", "bf16"]
Strategy = Literal["auto", "ddp", "fsdp"]
FactorOptimizer = Literal["adamw", "muon"]
WarmStartUntil = Literal["steps", "plateau"]
WarmStartKind = Literal["adamw", "sign", "column", "muon"]
NonFinitePolicy = Literal["stop", "skip", "rollback"]

_FOLDER_NAME = re.compile(r"[\w.+=@-][\w.+=@ -]*")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run is called, how it trains, and where it is kept."""

    name: str = "run"
    """Name of the run's folder in run.out; a recipe file without it lends its own name."""
    method: str = "relora"
    """"full" trains every weight, "lora" factors that are never merged, "relora" merges and restarts them;
    docs/laboratory.md lists the others, which have a [method] section of their own."""
    seed: int = 0
    """Seed of the initial weights, the factors, dropout, and the order of the data."""
    out: Path = Path("runs")
    """Folder that holds the runs."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.out / self.name

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        bare = _FOLDER_NAME.fullmatch(self.name) is not None and self.name.strip(". ") != ""
        return unknown_method(self.method) + unmet(
            (bare, f"name must be a plain folder name (letters, digits and -_.+=@), not {self.name!r}"),
            (0 <= self.seed < 2**63, f"seed must be between 0 and 2^63 - 1, not {self.seed}"),
            ("\0" not in str(self.out), "out must be a path, which has no NUL byte"),
        )


@dataclass(frozen=True, kw_only=True)
class ReLoRASection(ReLoRAConfig):
    """The low-rank phase; without effect where run.method has none, as "full"."""

    warm_start_steps: int = 0
    """Steps at full rank before the switch to low rank; 0 starts cold, with factors from the first step."""
    warm_start_until: WarmStartUntil = "steps"
    """"steps" ends the warm start after warm_start_steps; "plateau" before that, once the loss falls half as
    fast as it did on the whole since the first warm-up."""
    warm_start_kind: WarmStartKind = "adamw"
    """What trains the target matrices in the warm start: "adamw", or steps in place without a gradient, as
    those of `residual`: "sign" and "column" without state, "muon" with 2 bytes a weight. run.method "relora"
    and "lora" only."""
    warm_start_scale: float = 1.0
    """Size of a warm start's steps in place, over optim.lr; for "muon" 2.5 did best (docs/beyond.md)."""

    def __post_init__(self) -> None:
        """Leave the complaints to the recipe, which gives them together with those of other sections."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        steps = self.warm_start_steps
        return [
            *self._violations(),
            *unmet(
                (steps >= 0, f"warm_start_steps must be at least 0, not {steps}"),
                (
                    self.warm_start_scale > 0,
                    f"warm_start_scale must be above 0, not {self.warm_start_scale:g}",
                ),
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, with learning rates of their own for the full-rank phase, the low-rank phase and the factors."""

    lr: float = 1e-3
    """Peak learning rate of the weights that train at full rank."""
    low_rank_lr: float | None = None
    """lr in the low-rank phase, for embeddings, norms, head and biases; none means lr."""
    factor_lr: float | None = None
    """Peak learning rate of lora_A and lora_B; none means low_rank_lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    factor_optimizer: FactorOptimizer = "adamw"
    """What steps the factors: "adamw", or "muon", whose step is orthogonalised and has about AdamW's size at
    the same rate, with half of its state. run.method "relora" and "lora" only."""
    rest_lr_multiples: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Multiples of the rate for embeddings, the output head, and norms with biases, in every phase: of
    low_rank_lr at low rank, else of lr."""
    rest_beta2: float | None = None
    """betas[1] for embeddings, the output head, norms and biases; none means betas[1]."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weights that train at full rank; the factors have none."""
    clip_grad_norm: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""

    @property
    def low_rank_lr_in_force(self) -> float:
        """low_rank_lr, or lr where it is not given."""
        return self.lr if self.low_rank_lr is None else self.low_rank_lr

    @property
    def factor_lr_in_force(self) -> float:
        """factor_lr, or the low-rank phase's learning rate where it is not given."""
        return self.low_rank_lr_in_force if self.factor_lr is None else self.factor_lr

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        rates = {"lr": self.lr, "low_rank_lr": self.low_rank_lr, "factor_lr": self.factor_lr}
        given = {name: rate for name, rate in rates.items() if rate is not None}
        return unmet(
            *((rate > 0, f"{name} must be above 0, not {rate:g}") for name, rate in given.items()),
            (
                all(0 <= beta < 1 for beta in self.betas),
                f"betas must be at least 0 and below 1, not {self.betas[0]:g} and {self.betas[1]:g}",
            ),
            (
                all(multiple > 0 for multiple in self.rest_lr_multiples),
                f"rest_lr_multiples must be above 0, not {', '.join(map(str, self.rest_lr_multiples))}",
            ),
            (
                self.rest_beta2 is None or 0 <= self.rest_beta2 < 1,
                f"rest_beta2 must be at least 0 and below 1, or none, not {self.rest_beta2}",
            ),
            (self.weight_decay >= 0, f"weight_decay must be at least 0, not {self.weight_decay:g}"),
            (self.clip_grad_norm >= 0, f"clip_grad_norm must be at least 0, not {self.clip_grad_norm:g}"),
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The jagged cosine: a warm-up, one cosine over the run, a short ramp after the switch and restarts."""

    warmup_steps: int = 500
    """Steps of the first linear warm-up."""
    rewarmup_steps: int = 50
    """Steps of the ramp from 0 back to the cosine after the switch and after every restart; 0 has no ramp."""
    min_ratio: float = 0.1
    """Learning rate at the end of the run, as a fraction of the peak."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (self.warmup_steps >= 0, f"warmup_steps must be at least 0, not {self.warmup_steps}"),
            (self.rewarmup_steps >= 0, f"rewarmup_steps must be at least 0, not {self.rewarmup_steps}"),
            (0 <= self.min_ratio <= 1, f"min_ratio must be at least 0 and at most 1, not {self.min_ratio:g}"),
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which portions and in which precision the model trains."""

    steps: int | None = 10_000
    """Optimizer steps of the run; give this or tokens."""
    tokens: int | None = None
    """Tokens of the run; its steps are tokens // (batch_size * seq_len). Give this or steps."""
    batch_size: int = 32
    """Sequences in a step, over all devices."""
    micro_batch_size: int = 8
    """Sequences a device runs at once; gradients are accumulated up to batch_size."""
    precision: Precision = "auto"
    """"fp32", "bf16" (autocast over fp32 weights), or "auto": bf16 where the hardware has it fast."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    nonfinite: NonFinitePolicy = "stop"
    """A loss or gradient that is not finite, whose update is never made: "stop", "skip" the step, or
    "rollback" to the last good checkpoint and go on past the data since. May change when a run resumes."""
    nonfinite_limit: int = 3
    """"skip" stops after this many steps in a row, "rollback" after going back so often to one checkpoint."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time in the loss, so that (tokens, V) logits never do; none fits the
    device, 0 takes them whole, as a model must whose loss is not the plain cross-entropy of its head."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        counts = {"steps": self.steps, "tokens": self.tokens}
        sizes = {
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "nonfinite_limit": self.nonfinite_limit,
        }
        given = [name for name, count in counts.items() if count is not None]
        problems = unmet(
            (len(given) < 2, "steps and tokens must not both be given: each decides the other"),
            (len(given) > 0, "steps or tokens must be given"),
            *(
                (size is None or size >= 1, f"{name} must be at least 1, not {size}")
                for name, size in (counts | sizes).items()
            ),
        )
        chunk = self.loss_chunk_tokens
        problems += unmet(
            (chunk is None or chunk >= 0, f"loss_chunk_tokens must be at least 0, or none, not {chunk}")
        )
        if min(sizes.values()) >= 1 and self.batch_size % self.micro_batch_size:
            problems.append(
                f"batch_size must be a multiple of micro_batch_size, "
                f"but {self.batch_size} is not one of {self.micro_batch_size}"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several devices share the work."""

    strategy: Strategy = "auto"
    """"ddp" keeps the whole model on each device, "fsdp" shards it; "auto": ddp under torchrun."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return []


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on how much held-out text the loss is measured."""

    every: int = 500
    """Steps between evaluations; 0 evaluates at the switch and at the end only."""
    split: Literal["heldout", "tuning"] = "heldout"
    """"heldout" for what is reported, "tuning" (data.tuning_fraction) for choosing settings."""
    sequences: int = 256
    """Held-out sequences of an evaluation, always the same ones (fewer where there are not so many)."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (self.every >= 0, f"every must be at least 0, not {self.every}"),
            (self.sequences >= 1, f"sequences must be at least 1, not {self.sequences}"),
        )
