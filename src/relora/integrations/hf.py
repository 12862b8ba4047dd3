"""Hugging Face's Trainer: restarts by a callback (extra "hf", which is what the Trainer needs itself).

    inject(model, config, seed=0)
    trainer = Trainer(model, args, ..., callbacks=[ReLoRACallback()])
    trainer.train()                     # resume_from_checkpoint as ever
    fold(model)                         # plain layers again, for save_pretrained

The restart follows the optimizer's step and precedes the scheduler's, an evaluation and a checkpoint of that
step. Its counters are in the checkpoint's trainer_state.json, factors and base in its weights. A warm start
is a training of its own before `inject`.
"""

import logging
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from relora.errors import CheckpointError, ConfigError
from relora.method.inject import lora_parameters
from relora.method.linear import lora_layers
from relora.method.restart import ReLoRA
from relora.method.restart_report import RestartReport
from relora.method.schedule import JaggedCosineLR

_logger = logging.getLogger(__name__)


class ReLoRACallback(TrainerCallback, ExportableState):
    """Restarts an injected model that a `transformers.Trainer` trains.

    The config is the one the model was injected with. Where the scheduler is a `JaggedCosineLR`, it must have
    the same cycles, and its last restart is the last.

    Args:
        seed: Root of the factors' seeds at restarts; that of `inject`.

    Raises:
        ConfigError: when training begins, if `ReLoRA` refuses model or optimizer, the scheduler has other
            cycles, fp16 is on, whose skipped steps the scheduler does not count, or the Trainer copies the
            model to several GPUs within one process.
        CheckpointError: when training is resumed, if the checkpoint is not of a run with this callback.

    Attributes:
        relora: What restarts; None before training begins.
        reports: Of the restarts so far, in this process.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.relora: ReLoRA | None = None
        self.reports: list[RestartReport] = []

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in a checkpoint."""
        counters = None if self.relora is None else self.relora.state_dict()
        return {"args": {"seed": self.seed}, "attributes": {"counters": counters}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take hold of model and optimizer, and of the counters where training is resumed."""
        del control
        model: nn.Module = kwargs["model"]
        # Accelerate's wrapper hands everything on; what it wraps has the states.
        optimizer: Optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        config = lora_layers(model)[0].config
        if args.fp16:
            raise ConfigError(
                "fp16 is not supported with ReLoRACallback: the learning rate does not move where a step is "
                "skipped, and would drift from the restarts; use bf16=True"
            )
        if args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer would copy the model to {args.n_gpu} GPUs in every step (DataParallel), where "
                "restarts are not tested: start one process a GPU with torchrun, or show it one GPU"
            )
        _warn_of_decay(model, optimizer)
        scheduler = kwargs.get("lr_scheduler")
        last_restart = None
        if isinstance(scheduler, JaggedCosineLR):
            _refuse_other_cycles(scheduler, config.restart_every, config.restart_growth)
            last_restart = scheduler.last_restart
        relora = ReLoRA(
            model, optimizer, config, seed=self.seed, end=state.max_steps, last_restart=last_restart
        )
        if state.global_step:
            relora.load_state_dict(_saved(state))
        self.relora = relora
        self.reports.clear()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart if the step ends a cycle; what was done is in the log history."""
        del args, control, kwargs
        assert self.relora is not None
        report = self.relora.after_step(state.global_step + 1)
        if report is not None:
            self.reports.append(report)
            _logger.info("%s", report)
            state.log_history.append(
                {
                    "step": report.step,
                    "relora/restart_index": report.restart_index,
                    "relora/entries_zeroed": report.entries_zeroed,
                    "relora/relative_merge_error": report.relative_merge_error,
                    "relora/max_function_change": report.max_function_change,
                }
            )


def _saved(state: TrainerState) -> dict[str, Any]:
    """Return the counters of a resumed run."""
    callbacks: Any = state.stateful_callbacks or {}
    own = callbacks.get(ReLoRACallback.__name__)
    counters = own["attributes"]["counters"] if isinstance(own, dict) else None
    if not isinstance(counters, dict):
        raise CheckpointError(
            f"the checkpoint of step {state.global_step} has no counters of one ReLoRACallback: it was saved "
            "without it, or with several. Begin anew, or resume a checkpoint that has them"
        )
    return counters


def _refuse_other_cycles(scheduler: JaggedCosineLR, restart_every: int, restart_growth: float) -> None:
    wanted = {"restart_every": restart_every, "restart_growth": restart_growth, "start": 0}
    other = [
        f"{name} {getattr(scheduler, name)!r} (the model's config: {value!r})"
        for name, value in wanted.items()
        if getattr(scheduler, name) != value
    ]
    if other:
        raise ConfigError(
            f"the JaggedCosineLR has other cycles than the restarts: {', '.join(other)}; build it with those"
        )


def _warn_of_decay(model: nn.Module, optimizer: Optimizer) -> None:
    factors = {id(parameter) for _, parameter in lora_parameters(model)}
    decayed = any(
        group.get("weight_decay") and any(id(parameter) in factors for parameter in group["params"])
        for group in optimizer.param_groups
    )
    if decayed:
        warnings.warn(
            "weight decay acts on lora_A and lora_B, where it shrinks the update and not the weight: give "
            "the Trainer an optimizer whose groups leave it out, and set base_weight_decay for the weights",
            stacklevel=3,
        )
