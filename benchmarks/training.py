"""Models, methods and the training step that the benchmarks of speed share, on the CPU and on a GPU.

A method takes a plain LLaMA and returns the optimizer that trains it. The step is the trainer's own for all
of them: forward, backward, clipping of the gradient, update.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import Optimizer as TorchOptimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from relora import LoRALinear, ReLoRA, ReLoRAConfig, RestartReport, inject, lora_parameters
from relora.lab.planner.live import LiveBytes
from relora.method.linear import lora_layers
from relora.train.loss import TokenLoss
from relora.train.parallel import Processes
from relora.train.phase import Optimizer
from relora.train.precision import Resolved
from relora.train.step import train_step_

CPU = Processes(rank=0, world_size=1, device=torch.device("cpu"))
SEQ_LEN = 256
VOCAB_SIZE = 512
LR = 1e-4
_HEAD_WIDTH = 64
_NEVER = 10**9


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train a LLaMA."""

    prepare: Callable[[PreTrainedModel, int], TorchOptimizer]
    """Changes a model in place for a rank, and returns its optimizer."""
    packages: tuple[str, ...] = ()
    """What it imports besides the project's own dependencies."""

    @property
    def obstacle(self) -> str | None:
        """Say why it cannot run here, or None."""
        lacking = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(lacking)} not installed" if lacking else None


class Stepper:
    """A model in training: every call takes one step on the same batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: TorchOptimizer,
        tokens: Tensor,
        *,
        precision: Resolved,
        here: Processes = CPU,
        compile_it: bool = False,
    ) -> None:
        """Take hold of a model that a method has made ready; `tokens` (B, T) is one micro batch."""
        self.model, self.optimizer, self.tokens = model, optimizer, tokens
        self._precision: Resolved = precision
        self._here = here
        self._wrapped = here.wrap_for_training(TokenLoss(model, chunk_tokens=None), compile_it=compile_it)
        self.step = 0

    def __call__(self) -> float:
        """Take a step and return its loss."""
        self.step += 1
        result = train_step_(
            self._wrapped,
            Optimizer(adamw=self.optimizer, peaks=()),
            self.tokens,
            self._here,
            step=self.step,
            seed=0,
            micro_batch_size=len(self.tokens),
            precision=self._precision,
            clip_grad_norm=1.0,
        )
        assert result.is_applied, f"loss {result.loss}, gradient norm {result.grad_norm}"
        return result.loss

    def flops(self) -> int:
        """Take a step and count the FLOPs of its matrix products, those of the optimizer included."""
        with LiveBytes() as live:
            self()
        return live.flops


def steppers(
    plain: PreTrainedModel, names: Iterable[str], *, rank: int, tokens: Tensor, precision: Resolved
) -> dict[str, Stepper]:
    """Return a copy of a model in training by each of some methods."""
    found = {}
    for name in names:
        model = copy.deepcopy(plain)
        found[name] = Stepper(model, METHODS[name].prepare(model, rank), tokens, precision=precision)
    return found


def restarter(stepper: Stepper) -> Callable[[], RestartReport]:
    """Return what restarts a ReLoRA model after the step that was just taken; call it after each one."""
    model = cast(nn.Module, stepper.model)
    config = lora_layers(model)[0].config
    relora = ReLoRA(model, stepper.optimizer, config, start=stepper.step)

    def restart() -> RestartReport:
        report = relora.after_step(stepper.step)
        assert report is not None and not report.merge.unmoved_layers
        return report

    return restart


def llama(hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """Return decoder layers of the usual proportions, with a vocabulary small enough not to dominate."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=-(-hidden_size * 8 // 3 // 16) * 16,
            num_hidden_layers=num_layers,
            num_attention_heads=max(hidden_size // _HEAD_WIDTH, 1),
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=SEQ_LEN,
        )
    )


def token_batch(num_tokens: int, *, vocab_size: int = VOCAB_SIZE, seq_len: int = SEQ_LEN) -> Tensor:
    """Return (num_tokens / seq_len, seq_len) random ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (max(num_tokens // seq_len, 1), seq_len), generator=generator)


def wrapped_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights that all low-rank methods here replace: every linear layer's but the head's."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | LoRALinear) and m is not head]


def adamw(model: PreTrainedModel) -> AdamW:
    """Return the trainer's AdamW over what requires a gradient."""
    trained = [p for p in cast(nn.Module, model).parameters() if p.requires_grad]
    return AdamW(trained, lr=LR, fused=True)


def _full(model: PreTrainedModel, rank: int) -> TorchOptimizer:
    del rank
    return adamw(model)


def _relora(
    *, factors_only: bool = False, **settings: Any
) -> Callable[[PreTrainedModel, int], TorchOptimizer]:
    def prepare(model: PreTrainedModel, rank: int) -> TorchOptimizer:
        plain = cast(nn.Module, model)
        # A cycle of one step, so that whoever measures restarts has one after any.
        inject(plain, ReLoRAConfig(rank=rank, restart_every=1, **settings))
        if factors_only:
            factors = {id(parameter) for _, parameter in lora_parameters(plain)}
            for parameter in plain.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in factors)
        return adamw(model)

    return prepare


def _peft(model: PreTrainedModel, rank: int) -> TorchOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    return adamw(model)


def _galore(model: PreTrainedModel, rank: int) -> TorchOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from galore_torch import GaLoreAdamW
    projected = wrapped_matrices(model)
    known = {id(weight) for weight in projected}
    rest = [p for p in cast(nn.Module, model).parameters() if id(p) not in known]
    # The projector is made in the first step and then kept: no timed step contains a refresh.
    galore = {"rank": rank, "update_proj_gap": _NEVER, "scale": 0.25, "proj_type": "std"}
    optimizer: TorchOptimizer = GaLoreAdamW(
        [{"params": rest}, {"params": projected, **galore}], lr=LR, no_deprecation_warning=True
    )
    return optimizer


METHODS = {
    "full": Method(prepare=_full),
    "factored": Method(prepare=_relora(forward="factored")),
    "effective": Method(prepare=_relora(forward="effective")),
    "auto": Method(prepare=_relora()),
    "one-sided": Method(prepare=_relora(factors="B")),
    "columns": Method(prepare=_relora(factors="B", init="columns")),
    "PEFT LoRA": Method(prepare=_peft, packages=("peft",)),
    "effective, factors only": Method(prepare=_relora(forward="effective", factors_only=True)),
    "one-sided, factors only": Method(prepare=_relora(factors="B", factors_only=True)),
    "columns, factors only": Method(prepare=_relora(factors="B", init="columns", factors_only=True)),
    "GaLore": Method(prepare=_galore, packages=("galore_torch", "bitsandbytes")),
    "auto, bf16 base": Method(prepare=_relora(base_dtype="bf16", master="host")),
    "one-sided, bf16 base": Method(prepare=_relora(factors="B", base_dtype="bf16", master="host")),
    "one-sided, int8 base": Method(prepare=_relora(factors="B", base_dtype="int8", master="host")),
}
"""By the names in the results. ReLoRA trains embeddings, norms and head besides its factors, PEFT LoRA the
factors alone; "factors only" is ReLoRA on those same parameters. GaLore is its authors' package."""
