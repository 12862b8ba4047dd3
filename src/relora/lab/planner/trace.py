"""What a run does to memory, on a shadow of its model: start, a step, an evaluation, a restart.

Nothing here knows how large anything is. The real `inject` puts the factors in, the real training step, the
loss, the optimizer, the observers of `residual` and a restart run on fake tensors under `LiveBytes`, so
figures follow the code. Each stretch of time that could hold the peak has a name, its moment: where it passes
layers, (stage, place), with the first two layers at places 0 and 1 and the last two at -2 and -1. Memory
grows or falls evenly over the layers between, so no peak is there.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from relora.lab.planner.live import CAST, LiveBytes
from relora.lab.planner.shadow import as_fake_, as_if_real
from relora.train.config import Recipe
from relora.train.groups import PhaseName
from relora.train.in_place_optimizer import InPlaceOptimizer
from relora.train.joint import parts_of
from relora.train.loss import TokenLoss
from relora.train.method_parts import GradientObserver, LoRALinear
from relora.train.methods import load_method
from relora.train.parallel import Processes
from relora.train.phase import (
    Optimizer,
    Plan,
    inject_factors,
    momenta,
    num_in_place,
    num_parameters,
    state_bytes,
)
from relora.train.precision import Resolved, autocast
from relora.train.setup import enable_checkpointing_
from relora.train.step import train_step_
from relora.train.training_method import Restarting, TrainingMethod

WEIGHTS, RESIDUAL, HOST, LORA, STATES = "weights", "residual", "host", "factors", "optimizer"
FORWARD, LOSS, BACKWARD, GRADIENTS = "activations", "loss", "backward", "gradients"
UPDATE, RESTART, OTHER = "update", "restart", "other"
_FLOPS = "flops"
_FACTORS = ("lora_A", "lora_B", "lora_scaling")
_HERE = Processes(rank=0, world_size=1, device=torch.device("cpu"))

Moment = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything counted of one shadow."""

    counts: Counter[str]
    """Parameters, FLOPs, and bytes that are not of a moment."""
    moments: dict[Moment, Counter[str]]
    """The most held in each moment, in bytes by kind."""
    restart_extra: Counter[str]
    """What a restart needs beside what is held between steps; that of one layer, however many there are."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a trace depends on beside the recipe and the model."""

    low_rank: bool
    precision: Resolved
    holds_gradients: bool
    """Whether gradients are there in the forward pass already: in all micro steps but a step's first, and
    under DDP always, whose buckets they live in."""
    accumulates: bool
    """Whether a step has several micro batches, so that votes and sums of the first are held in the forward
    passes of the others."""
    has_host: bool
    """Whether the host's memory is another than the device's."""
    chunk_tokens: int
    """Tokens whose logits exist at one time; 0 for all."""


def chunk_tokens_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Return how many tokens a model's loss takes at a time, as the trainer finds out.

    Args:
        model: On the meta device; it is changed. Its depth makes no difference.
        wanted: As train.loss_chunk_tokens, for the device that is planned for.
    """
    with FakeTensorMode(), as_if_real(), LiveBytes():
        as_fake_(cast(nn.Module, model))
        return TokenLoss(model, chunk_tokens=wanted).chunk_tokens


def trace(
    recipe: Recipe,
    model: PreTrainedModel,
    layers: nn.ModuleList,
    given: Circumstances,
    *,
    restart_extra: Counter[str] | None = None,
) -> Trace:
    """Run on the fake tensors that a model on the meta device is given here.

    Args:
        recipe: The run, of the phase in question alone.
        model: Of the run, or a shadow of it; it is changed.
        layers: Its decoder's layers.
        given: The rest.
        restart_extra: Of a trace of the same layers, which saves tracing it again.
    """
    # One phase, with its first step one of those that are observed.
    warm_start_steps = 0 if given.low_rank else recipe.relora.warm_start_steps
    section = replace(recipe.relora, residual_every=1, warm_start_steps=warm_start_steps)
    recipe = replace(recipe, relora=section)
    with FakeTensorMode(), as_if_real(), LiveBytes() as live:
        return _Run(recipe, model, layers, given, live).trace(restart_extra)


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        given: Circumstances,
        live: LiveBytes,
    ) -> None:
        self.recipe, self.model, self.given, self.live = recipe, cast(nn.Module, model), given, live
        self.layers, self.stage = layers, ""
        if recipe.train.gradient_checkpointing:
            enable_checkpointing_(model)
        self._begin("start")
        live.label = WEIGHTS
        as_fake_(self.model)
        self.method: TrainingMethod = load_method(recipe.run.method)(Plan(recipe=recipe))
        if given.low_rank:
            inject_factors(self.model, recipe)
        self._sort_weights()
        live.label = OTHER
        self.loss = TokenLoss(model, chunk_tokens=0)
        self.loss.chunk_tokens = given.chunk_tokens
        live.begin()
        phase: PhaseName = "low_rank" if given.low_rank else "warm_start"  # which is "full" without a switch
        self.optimizer: Optimizer = self.method.build_optimizer(self.model, phase)

    def trace(self, restart_extra: Counter[str] | None) -> Trace:
        live, rows, data = self.live, self.recipe.train.micro_batch_size, self.recipe.data
        self._make_states()
        if self.given.holds_gradients:
            self._hold_gradients()
        live.label = OTHER
        if self.given.low_rank:
            self.method.attach(self.model, self.optimizer.adamw)
        if self.given.accumulates:
            self._hold_what_passes_leave()
        resting = Counter(live.bytes)
        batch = torch.zeros(rows, data.seq_len, dtype=torch.int64)
        with self._watched() as seen:
            live.restart_peak()
            self._step(batch)
            update_flops, loss_bytes = live.flops - seen[_FLOPS], live.label_peaks[LOSS]
            if not self.given.holds_gradients:  # else the forward pass of a step holds what it does and more
                self._evaluate(batch)
        rest = Counter(live.bytes)
        if restart_extra is None:
            restart_extra = self._restart(rest)
        factors = [p for name, p in self.model.named_parameters() if name.endswith(_FACTORS)]
        codes = [
            part for layer in self._wrapped() if layer.weight_scale is not None for part in layer.base_parts
        ]
        kept = sum(resting[kind] for kind in (WEIGHTS, RESIDUAL, LORA)) + self._host_bytes
        states = state_bytes(self.optimizer.adamw, self.model)
        counts = Counter(
            total=num_parameters(self.model),
            trainable=num_parameters(self.model, trainable=True) + num_in_place(self.optimizer.adamw),
            in_factors=sum(p.numel() for p in factors),
            flops=seen[_FLOPS],
            update_flops=update_flops,
            loss=loss_bytes,
            host=self._host_bytes,
            checkpoint=kept - sum(code.nbytes for code in codes) + states,
            states=states,
            observed=seen[BACKWARD],
            activations=seen[FORWARD],
            casts=seen[CAST],
            weights=resting[WEIGHTS],
            residual=resting[RESIDUAL],
            factors=resting[LORA],
            gradients=live.bytes[GRADIENTS],
        )
        moments = cast(dict[Moment, Counter[str]], dict(live.peaks))
        if self.given.has_host:
            del moments["start", 0]  # the switch of a cold start is made on the host; one later frees more
        if restart_extra:
            moments["restart", 0] = rest + restart_extra
        return Trace(counts=counts, moments=moments, restart_extra=restart_extra)

    def _begin(self, stage: str, layer: int | None = None) -> None:
        """Enter a stage, or a layer in it; the layers between the first and last two have no moment."""
        self.stage, num = stage, len(self.layers)
        if layer is None:
            self.live.begin((stage, 0))
            return
        places = {layer} & {0, 1} | {layer - num} & {-2, -1}
        self.live.begin(*((f"{stage}, layers", place) for place in places))

    def _wrapped(self) -> list[LoRALinear]:
        return [module for module in self.model.modules() if isinstance(module, LoRALinear)]

    def _sort_weights(self) -> None:
        """Tell apart what `inject` has left."""
        live, self._host_bytes = self.live, 0
        for name, parameter in self.model.named_parameters():
            live.relabel(parameter, LORA if name.endswith(_FACTORS) else WEIGHTS)
            live.count([parameter], WEIGHTS, are_parameters=True)
        for name, buffer in self.model.named_buffers():
            live.relabel(buffer, RESIDUAL if "residual" in name else WEIGHTS)
        for momentum in momenta(self.model).values():
            live.relabel(momentum, STATES)
        for host in (layer.host_residual for layer in self._wrapped()):
            if host is not None:
                self._host_bytes += host.nbytes
                live.relabel(host, HOST)
                if self.given.has_host:
                    live.forget(host)

    def _trained(self) -> list[Tensor]:
        """Return what autograd has gradients of."""
        groups = self.optimizer.adamw.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def _make_states(self) -> None:
        """Let the optimizer make its states, as its first step does."""
        for parameter in self._trained():
            parameter.grad = torch.empty_like(parameter)
        self.live.label = STATES
        for part in parts_of(self.optimizer.adamw):
            if not isinstance(part, InPlaceOptimizer):
                cast(Any, part).step()
            elif part.keeps_momentum:
                part.hold_()
        self.optimizer.adamw.zero_grad(set_to_none=True)

    def _hold_gradients(self) -> None:
        self.live.label = GRADIENTS
        for parameter in self._trained():
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.adamw.zero_grad = _keep_gradients  # type: ignore[method-assign]

    def _hold_what_passes_leave(self) -> None:
        """Make what observers add up a step's micro batches in, as all of them but the first find it."""
        self.live.label = BACKWARD
        for part in parts_of(self.optimizer.adamw):
            if isinstance(part, InPlaceOptimizer):
                part.hold_()
        for layer in self._wrapped():
            for observer in layer.observers:
                if isinstance(observer, GradientObserver):
                    _ = observer.held

    @contextmanager
    def _watched(self) -> Iterator[Counter[str]]:
        """Tell `live` what is under way, and yield what the forward and the backward pass leave behind."""
        live, seen = self.live, Counter[str]()

        def at_start(*_: object) -> None:
            live.label = FORWARD
            self._begin("forward" if self.stage != "evaluation" else "evaluation")

        def at_hidden_states(*_: object) -> None:
            if self.stage == "forward":
                seen.update({kind: live.bytes[kind] for kind in (FORWARD, CAST)})
                self._begin("loss")
            live.label = LOSS

        def at_loss(*_: object) -> None:
            if self.stage == "loss":
                live.label = BACKWARD
                self._begin("backward")

        def at_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            live.relabel(parameter.grad, GRADIENTS)

        def at_update(*_: object) -> None:
            seen.update({BACKWARD: live.bytes[BACKWARD], _FLOPS: live.flops})
            live.label = UPDATE
            self._begin("update")

        self.loss.register_forward_pre_hook(at_start)
        self.loss.body.register_forward_hook(at_hidden_states)
        self.loss.register_forward_hook(at_loss)
        self.optimizer.adamw.register_step_pre_hook(at_update)
        for parameter in self._trained():
            parameter.register_post_accumulate_grad_hook(at_gradient)
        for index, layer in enumerate(self.layers):
            self._watch_layer(index, layer)
        live.label = OTHER
        self._begin("forward")
        yield seen

    def _watch_layer(self, index: int, layer: nn.Module) -> None:
        def at_input(*_: object) -> None:
            self._begin(self.stage, index)  # of the forward pass, or of the backward that recomputes it

        def at_output(module: nn.Module, args: object, output: Any) -> None:
            del module, args
            hidden: Tensor = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._begin("backward", index))

        layer.register_forward_pre_hook(at_input)
        layer.register_forward_hook(at_output)

    def _step(self, batch: Tensor) -> None:
        """Take the trainer's own step, of one micro batch, and the complement's where there is one."""
        recipe = self.recipe
        train_step_(
            self.loss,
            self.optimizer,
            batch,
            _HERE,
            step=1,
            seed=recipe.run.seed,
            micro_batch_size=len(batch),
            precision=self.given.precision,
            clip_grad_norm=recipe.optim.clip_grad_norm,
        )
        self.live.label = UPDATE
        if self.given.low_rank and recipe.relora.residual != "none" and recipe.relora.restart_every > 1:
            self.method.after_step(1)
        for layer in self._wrapped():
            layer.observers = ()

    def _evaluate(self, batch: Tensor) -> None:
        """Measure held-out loss, with the step's gradients still there."""
        self._begin("evaluation")
        self.loss.eval()
        with torch.no_grad(), autocast(self.given.precision, _HERE.device):
            self.loss(batch)

    def _restart(self, rest: Counter[str]) -> Counter[str]:
        """Restart the largest layer alone: a restart takes one layer after the other."""
        every = self.recipe.relora.restart_every
        layers = self._wrapped()
        if not layers or every > self.recipe.total_steps or not isinstance(self.method, Restarting):
            return Counter()
        self.live.label = RESTART
        largest = max(layers, key=lambda layer: layer.out_features * layer.in_features)
        self.method.attach(largest, self.optimizer.adamw)
        self.method.load_state_dict({**(self.method.state_dict() or {}), "step": every - 1})
        self.method.step_refused(every)  # nothing was observed of it
        self.live.restart_peak()
        self.live.begin()
        self.method.after_step(every)
        return self.live.at_peak - rest


def _keep_gradients(set_to_none: bool = True) -> None:
    del set_to_none
