"""`residual`: a step on the part of the gradient that the factors cannot see (H6, FRUGAL, Fira).

With factors "B" a cycle moves W within the rows of lora_A only. Of G = g^T x, the base's gradient, they leave

    G_perp = G - (G A^T) A,    A = lora_A, orthonormal rows

and an observed step moves the base by it, at the size of the factors' own step:

    W <- W - residual_scale * lr_eff * D,    lr_eff = lr * scaling * sqrt(rank) * rms(A)

lr is that of lora_B's group at that step; with scaling "matched" lr_eff is kappa * lr. D has RMS 1 at most:

- "sign": the sign of a vote. Each micro batch on each rank votes sign(G_perp) entry by entry; D is the sign
  of the sum (signSGD with majority vote, Bernstein et al. 2018). Not its mean: the mean shrinks as
  votes cancel, and a step's size must not depend on how a batch is cut. A tie moves nothing. Votes are int8:
  1 byte a weight.
- "column": G_perp summed over micro batches and ranks, each column scaled to RMS 1 over its outputs (SCALE
  normalises likewise, but a linear layer's gradient along the other side).
  The sum is kept in bf16: 2 bytes a weight.
- "muon": the running mean of G_perp, its part outside lora_A's rows orthogonalised
  (`residuals.MuonMomentum`), and of that the part outside again. 2 bytes a weight, from step to step; no
  gradient beside it, since each pass goes into it at once. A step that is not taken therefore costs it.

`residual_layers` takes a few layers a step. A round shuffles all layers by (seed, round) and deals them out,
so that each has its turn once a round; turns are a pure function of the step. The step is not made larger for
the turns that a layer waits: that would be residual_scale times their number, so residual_scale says it.

Costs of an observed step: 2 * out * in FLOPs a token for G, half of the base's forward and backward again,
as full rank pays; 4 * out * in * rank a micro batch for the projection, of which lora_B's gradient s G A^T
comes as well (on the effective path), so that it costs no token anything, and nothing at all where lora_A
selects inputs; with "muon" twice as much again once a step, and the iterations; x kept for the backward, as
at full rank; the votes or sums, from a layer's backward to `after_step`; under torch.distributed an
all-reduce of them (1 or 2 bytes a weight). G is made a block of rows at a time, never whole.

Entries that are not finite cast no vote. A row of G with one such entry has no finite G_perp at all, except
where lora_A selects inputs: there an entry of G stands for itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from relora.errors import ConfigError
from relora.method.complement_report import ComplementReport
from relora.method.config import ReLoRAConfig
from relora.method.factor_init import FACTOR_INITS
from relora.method.forward import Rows
from relora.method.gradient_observer import GradientObserver, move_together_
from relora.method.linear import LoRALinear
from relora.method.residuals import RESIDUALS, Residual
from relora.method.seeds import derived_generator, derived_seed
from relora.method.shards import whole


class LayerObserver(GradientObserver):
    """What one layer's backward passes of one step leave of G_perp."""

    forms_product = True

    def __init__(self, layer: LoRALinear, residual: Residual, *, seed: int = 0) -> None:
        super().__init__(layer, residual, seed=seed)
        self.layer = layer
        self._rows: Rows | None = None

    def observe(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Add one backward pass, seen by the rows that lora_A has now."""
        self._see_rows()
        return super().observe(x, gradient)

    def _see_rows(self) -> None:
        lora_A = whole(self.layer.lora_A.detach())
        if lora_A.dtype != torch.float64:
            lora_A = lora_A.float()  # FSDP2 may have it in bf16 in a backward pass
        self._rows = Rows(lora_A, lora_A.argmax(1) if self.layer.selects_inputs else None)

    def _split(self, block: Tensor) -> tuple[Tensor, Tensor]:
        assert self._rows is not None
        block = block.to(self._rows.lora_A.dtype)
        product = self._rows.of(block)
        return self._rows.beside(block, product), product

    def _begin_move(self) -> None:
        """See the rows that lora_A has now: a momentum also holds what the rows of cycles before left out,
        and of that orthogonalising would make a trace as large as the rest.
        """
        if self._residual.keeps_momentum:
            self._see_rows()

    def _end_look(self) -> None:
        self._rows = None  # of a sharded layer they are a whole lora_A

    def _outside(self, momentum: Tensor) -> Tensor:
        assert self._rows is not None
        wide = momentum.to(self._rows.lora_A.dtype)
        return self._rows.beside(wide, self._rows.of(wide))

    @property
    def flops(self) -> int:
        """What looking has cost so far: G, and its projection out of rows of lora_A that select no input."""
        return super().flops + self._projection * self.num_passes

    @property
    def _flops_of_a_step(self) -> int:
        return super()._flops_of_a_step + (2 * self._projection if self._residual.keeps_momentum else 0)

    @property
    def _projection(self) -> int:
        """FLOPs of taking from a matrix what it has in the rows of lora_A."""
        if self.layer.selects_inputs:
            return 0
        return 4 * self.layer.out_features * self.layer.in_features * self.layer.config.rank


class Complement:
    """The complement's steps of a run, one observed step at a time.

    Args:
        layers: All layers.
        config: With a `residual` other than "none".
        seed: Root of the order in which layers take their turn.
    """

    def __init__(self, layers: Sequence[LoRALinear], config: ReLoRAConfig, *, seed: int) -> None:
        self._layers = layers
        self._config = config
        self._seed = seed
        self._observers: list[LayerObserver] = []
        self._num_unseen = self._num_forgotten = 0

    def observers(self, steps_done: int) -> list[LayerObserver]:
        """Return the observers of the step that follows, none where it is not the k-th; what was held of an
        earlier step is dropped.
        """
        index, left_over = divmod(steps_done + 1, self._config.residual_every)
        residual = RESIDUALS[self._config.residual]
        layers = [] if left_over else self._in_turn(index - 1)
        self._close()
        self._observers = [
            LayerObserver(
                layer, residual, seed=derived_seed(self._seed, steps_done, layer.name, "complement")
            )
            for layer in layers
        ]
        return self._observers

    def _close(self) -> None:
        for observer in self._observers:
            observer.close()
        self._observers = []

    @property
    def _num_turns(self) -> int:
        return -(-len(self._layers) // (self._config.residual_layers or len(self._layers)))

    def _in_turn(self, index: int) -> list[LoRALinear]:
        """Return the layers of an observed step, counted from 0, in the order of the model."""
        if self._num_turns == 1:
            return list(self._layers)
        lap, turn = divmod(index, self._num_turns)
        generator = derived_generator(self._seed, lap, "complement order")
        order = torch.randperm(len(self._layers), generator=generator, device="cpu").tolist()
        return [self._layers[position] for position in sorted(order[turn :: self._num_turns])]

    def drop(self, *, was_seen: bool) -> None:
        """Forget what was observed of the step; nothing moves by it, and momenta that it has gone into begin
        anew.

        Args:
            was_seen: Whether the step had its backward passes, on some rank; if not, this rank's tell.
        """
        if was_seen or any(observer.num_passes for observer in self._observers):
            self._num_forgotten += sum(observer.forget_() for observer in self._observers)
        self._close()

    def refuse_unseen(self, step: int) -> None:
        """Refuse an observed step of which nothing was seen. Where layers take turns, those of some turns may
        be experts that nothing was routed to; so many turns in a row hold every layer.

        Raises:
            ConfigError: saying why that may be.
        """
        if not self._observers:
            return
        is_seen = any(observer.num_passes for observer in self._observers)
        self._num_unseen = 0 if is_seen else self._num_unseen + 1
        if self._num_unseen >= 2 * self._num_turns - 1:
            raise ConfigError(
                f"step {step}: residual={self._config.residual!r} saw no backward pass through any of "
                f"{len(self._layers)} layers. Was the forward pass made before ReLoRA was built or before "
                "after_step of the step before, or is the model compiled?"
            )

    @torch.no_grad()
    def apply_(self, step: int, lrs: Mapping[int, float | Tensor]) -> ComplementReport | None:
        """Move every base by what was observed; every rank calls it.

        Args:
            step: The step just taken.
            lrs: The learning rate in force, by the id of each lora_B.

        Returns:
            What moved; None if the step was not observed.
        """
        if not self._observers:
            return None
        layers = [observer.layer for observer in self._observers]
        sizes = [self._size(layer, lrs[id(layer.lora_B)]) for layer in layers]
        report = move_together_(self._observers, sizes, step=step, residual=self._config.residual)
        report = replace(report, num_forgotten=self._num_forgotten)
        self._num_forgotten = 0
        return report

    def _size(self, layer: LoRALinear, lr: float | Tensor) -> float | Tensor:
        rms = FACTOR_INITS[self._config.factor_init].rms(layer.in_features)
        scaling = layer.scaling.detach().abs() if isinstance(layer.scaling, Tensor) else layer.scaling
        return lr * scaling * math.sqrt(self._config.rank) * rms * self._config.residual_scale
