"""ReLoRA: the restarts of a training loop, one call a step (paper Algorithm 1).

A restart is merge, reinit and optimizer reset, in that order and as a whole: what could be refused is checked
before the first weight changes. It happens in place, so Parameters, the optimizer's references to them,
compiled graphs and DDP buckets stay valid. What a config needs to see of the base's gradient (`residual`,
init="gradient") is observed in the steps that need it, which are known from the calendar.
"""

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from relora.errors import CheckpointError, ConfigError
from relora.method.adapters import adapter_for
from relora.method.base_error import carry_base_error_
from relora.method.complement_report import ComplementReport
from relora.method.config import ReLoRAConfig, ResetMethod
from relora.method.linear import LoRALinear, lora_layers
from relora.method.merge import merge_, reinit_
from relora.method.refusals import refuse_encoded_shards, refuse_other_config, refuse_unmergeable
from relora.method.reset import check_resettable
from relora.method.restart_report import RestartReport
from relora.method.schedule import Calendar
from relora.method.seeds import derived_seed
from relora.method.shards import is_sharded, reshard_, whole
from relora.method.state_policies import NEEDS_OVERLAPS, STATE_POLICIES, Renewal
from relora.method.transport import overlap, refuse_untransportable
from relora.method.watch import Watch

Factor = tuple[str, nn.Parameter]


class ReLoRA:
    """Restarts an injected model at the ends of its cycles.

    Args:
        model: The injected model, or a wrapper around it (DDP, torch.compile); it may be sharded by FSDP2.
        optimizer: The optimizer that holds the factors, or several that share them.
        config: The config the model was injected with.
        seed: Root of the factors' seeds at restarts.
        start: The step at injection, after which cycles are counted.
        end: The last step of the run; no restart falls on it.
        last_restart: No restart falls later than this step, so that its re-warm ends before the run does.

    Raises:
        ConfigError: if the model holds no factors, was injected with another config or is sharded in a way
            that cannot be merged, an optimizer lacks factors or is of an unknown family, the calendar is out
            of range, or the model is compiled and the config observes gradients.

    Attributes:
        complement_report: What the last step on the complement did (`residual`); None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: ReLoRAConfig,
        *,
        seed: int = 0,
        start: int = 0,
        end: int | None = None,
        last_restart: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.seed = seed
        self.calendar = Calendar(
            restart_every=config.restart_every,
            restart_growth=config.restart_growth,
            start=start,
            end=end,
            last_restart=last_restart,
        )
        self.restart_index = 0
        self._step = start
        self._restarted_at: int | None = None
        self._keep = 1.0
        reshard_(model)
        self._layers = lora_layers(model)
        self._has_stepped = False
        self._may_be_sharded = any(is_sharded(layer.weight) for layer in self._layers)
        refuse_unmergeable(self._layers)
        refuse_other_config(self._layers, config)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._held = self._factors_by_optimizer(optimizers)
        for held_by, _ in self._held if config.reset in NEEDS_OVERLAPS else ():
            refuse_untransportable(held_by)
        for layer in self._layers:
            layer.bring_momentum_()
        adapters = [adapter_for(held_by) for held_by, _ in self._held]
        refuse_encoded_shards(self._layers, adapters)
        if config.reset_step_count and all(adapter.step is None for adapter in adapters):
            warnings.warn("reset_step_count has no effect: the optimizer counts no steps", stacklevel=2)
        self.complement_report: ComplementReport | None = None
        self._watch = Watch(model, self._layers, config, seed=seed)
        self._watch_next_step()

    def after_step(self, step: int, *, was_taken: bool = True) -> RestartReport | None:
        """Restart if `step` ends a cycle; call it after `optimizer.step()` of every step, in order.

        Call it before a learning-rate scheduler's `step()` and before a checkpoint of this step is written.

        Args:
            step: The optimizer step just taken, counted from 1.
            was_taken: False where the loop left out `optimizer.step()`, because the gradient was not finite:
                the step counts, but what was observed of it moves nothing and decays nothing; a momentum
                that it has gone into (residual="muon") begins anew.

        Returns:
            What the restart did, or None between restarts.

        Raises:
            ConfigError: if steps are skipped or repeated, or pass `end`.
            NonFiniteError: if a merged weight or an optimizer state would not be finite; nothing has changed.
            OptimizerResetError: if the reset did not do what it reports.
        """
        step = operator.index(step)  # a loop may count in numpy or torch integers, which are not JSON
        if step != self._step + 1:
            raise ConfigError(
                f"after_step({step}) follows step {self._step}: steps come in order, one call for each; "
                f"{self._step + 1} was expected (load_state_dict resumes a counter)"
            )
        if self.calendar.end is not None and step > self.calendar.end:
            raise ConfigError(
                f"after_step({step}) lies past end={self.calendar.end}, the last step: build ReLoRA with the "
                "end of the longer run"
            )
        self._reshard_()
        if not self._has_stepped:  # not at the first restart only: until then no factor would have trained
            self._refuse_other_factors()
            self._has_stepped = True
        if was_taken:
            self._watch.refuse_unseen(step)
        else:
            self._watch.drop(was_seen=True)
        keep = self._keep
        if self.config.base_weight_decay and was_taken:
            keep *= 1 - self._factor_lr() * self.config.base_weight_decay
        report = self._restart(step, keep) if self.calendar.restarts_at(step) else None
        self._step, self._keep = step, 1.0 if report else keep
        # After the restart, which commutes with it and may refuse: then no weight has changed.
        moved = self._watch.step_complement_(step, [optimizer for optimizer, _ in self._held])
        self.complement_report = moved or self.complement_report
        self._watch_next_step()
        return report

    def discard_step(self) -> None:
        """Forget what was observed of a step that is given up, before its batch is replaced by another; with
        residual="muon" the momentum begins anew.

        Call it instead of `after_step`, where a loop skips `optimizer.step()` and tries the step again.
        """
        self._watch.drop(was_seen=False)
        self._watch_next_step()

    def catch_up(self) -> RestartReport | None:
        """Do the restart that a run left out because it ended on that step, where a longer one goes on.

        Call it after `load_state_dict`; the learning rate of the longer run drops there too. One that
        was left out further back stays so: the learning rate has re-warmed without it. With init="gradient"
        its step's gradient is gone: the new lora_A is random, and the report names every layer.

        Returns:
            What the restart did, or None if this step has none or had it.
        """
        if self._restarted_at == self._step or not self.calendar.restarts_at(self._step):
            return None
        self._reshard_()
        report = self._restart(self._step, self._keep, seen=False)
        self._keep = 1.0
        self._watch_next_step()
        return report

    def _reshard_(self) -> None:
        if self._may_be_sharded:
            reshard_(self.model)

    @torch.no_grad()
    def _restart(self, step: int, keep: float, *, seen: bool = True) -> RestartReport:
        self._refuse_other_factors()
        for optimizer, factors, method in self._resets():
            check_resettable(optimizer, factors, method=method)
        merge = merge_(self._layers, keep=keep)
        index = self.restart_index + 1
        old = self._layers if self.config.reset in NEEDS_OVERLAPS else ()
        old_As = {f"{layer.name}.lora_B".lstrip("."): whole(layer.lora_A.detach()).clone() for layer in old}
        reinit_(self._layers, seed=self.seed, restart_index=index)
        gradient_init = self._watch.take_gradient_rows_(seen=seen)
        base_error = carry_base_error_(self._layers) if self.config.carry_base_error else None
        overlaps = {
            name: overlap(old_A, layer) for (name, old_A), layer in zip(old_As.items(), old, strict=True)
        }
        renewal = Renewal(config=self.config, seed=derived_seed(self.seed, index), overlaps=overlaps)
        resets = tuple(
            STATE_POLICIES[method](optimizer, factors, method, renewal)
            for optimizer, factors, method in self._resets()
        )
        self.restart_index, self._restarted_at = index, step
        return RestartReport(
            restart_index=index,
            step=step,
            merge=merge,
            resets=resets,
            gradient_init=gradient_init,
            base_error=base_error,
        )

    def _watch_next_step(self) -> None:
        self._watch.begin_step(
            self._step - self.calendar.start,
            next_restart_index=self.restart_index + 1,
            ends_cycle=self.calendar.restarts_at(self._step + 1),
        )

    def _resets(self) -> Iterator[tuple[Optimizer, list[Factor], ResetMethod]]:
        """Yield what a restart resets, and how."""
        for optimizer, factors in self._held:
            # A restart keeps a learned scaling's value and always forgets its gradients' history.
            scalings = [(name, p) for name, p in factors if name.endswith("lora_scaling")]
            matrices = [(name, p) for name, p in factors if not name.endswith("lora_scaling")]
            if matrices:
                yield optimizer, matrices, self.config.reset
            if scalings:
                yield optimizer, scalings, "zero"

    def state_dict(self) -> dict[str, Any]:
        """Return the restart counters as JSON-able values; factors and base are in the model's own state."""
        return {
            "step": self._step,
            "restart_index": self.restart_index,
            "restarted_at": self._restarted_at,
            "keep": self._keep,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over counters saved by `state_dict`, in mid-cycle or on a restart.

        Raises:
            CheckpointError: if the state is incomplete, or of a run with another calendar or seed; nothing
                has changed then.
        """
        wanted = {"step", "restart_index", "restarted_at", "keep", *self._identity()}
        if set(state) != wanted:
            raise CheckpointError(f"ReLoRA state must hold exactly {sorted(wanted)}, not {sorted(state)}")
        other = [f"{k} {state[k]!r} (here {v!r})" for k, v in self._identity().items() if state[k] != v]
        if other:
            raise CheckpointError(
                f"ReLoRA state is of another run: {', '.join(other)}; build ReLoRA with the seed, start and "
                "cycles it was saved with"
            )
        self._step, self._keep = state["step"], state["keep"]
        self.restart_index, self._restarted_at = state["restart_index"], state["restarted_at"]
        self._watch_next_step()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "start": self.calendar.start,
            "restart_every": self.calendar.restart_every,
            "restart_growth": self.calendar.restart_growth,
        }

    def _refuse_other_factors(self) -> None:
        made_for = {id(parameter) for _, factors in self._held for _, parameter in factors}
        present = {id(parameter) for _, parameter in self._factors()}
        strangers = [name for name, p in self._factors() if p.requires_grad and id(p) not in made_for]
        if strangers or not made_for <= present:
            raise ConfigError(
                "the model's factors are no longer those this ReLoRA and its optimizer hold "
                f"({', '.join(strangers[:3]) or 'it was folded'}); build both anew after fold, inject or "
                "fully_shard"
            )

    def _factors(self) -> list[Factor]:
        """Return all factors by the names at injection: they seed the masks of "random", and no wrapper
        changes them.
        """
        named = [
            (f"{layer.name}.{leaf}".lstrip("."), getattr(layer, leaf))
            for layer in self._layers
            if isinstance(layer, LoRALinear)
            for leaf in ("lora_A", "lora_B", "lora_scaling")
        ]
        return [(name, parameter) for name, parameter in named if parameter is not None]

    def _factors_by_optimizer(self, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, list[Factor]]]:
        factors = [(name, parameter) for name, parameter in self._factors() if parameter.requires_grad]
        ids = {o: {id(p) for group in o.param_groups for p in group["params"]} for o in optimizers}
        missing = [name for name, p in factors if not any(id(p) in held for held in ids.values())]
        if missing:
            raise ConfigError(
                f"the optimizer does not hold {len(missing)} of {len(factors)} factors (the first is "
                f"{missing[0]}): build it after inject(model, config), and after fully_shard, from the "
                "parameters that require gradients"
            )
        owned = [(o, [pair for pair in factors if id(pair[1]) in held]) for o, held in ids.items()]
        return [(optimizer, pairs) for optimizer, pairs in owned if pairs]

    def _factor_lr(self) -> float:
        """Return the learning rate of the first layer's lora_B."""
        lora_B: nn.Parameter = self._layers[0].lora_B
        for optimizer, _ in self._held:
            for group in optimizer.param_groups:
                if any(parameter is lora_B for parameter in group["params"]):
                    return float(group["lr"])
        raise AssertionError("every factor is held by an optimizer")
