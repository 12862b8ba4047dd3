"""What becomes of a run when a loss, a gradient or a restart is not finite.

The step itself has refused its update, and a restart its merge, before anything changed. Here it is written
down (nonfinite.jsonl: the step and the documents it met) and decided what follows: stop; pass over the step;
or go back to the last good checkpoint and past the data since. The decision depends on nothing but what all
ranks know alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relora.data.batches import TokenBatches
from relora.data.prepared import PreparedData
from relora.data.provenance import describe_sequences
from relora.errors import NonFiniteError
from relora.log.jsonl import JsonlSink
from relora.train.config import Recipe
from relora.train.parallel import Processes
from relora.train.run_folder import NONFINITE, OpenedRun
from relora.train.state import Progress
from relora.train.step import StepResult

_DESCRIBED_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a run that went back keeps of what it had been through."""

    next_batch: int
    """Which batch of the data comes next, counted as steps are."""
    num_events: int
    """Lines of nonfinite.jsonl."""


class RollBack(Exception):
    """The run goes back to its last good checkpoint; raised where it cannot go on."""

    def __init__(self, past: Past, why: str) -> None:
        super().__init__(why)
        self.past, self.why = past, why


class Guard:
    """Decides what follows something that is not finite."""

    def __init__(
        self,
        opened: OpenedRun,
        data: PreparedData,
        batches: TokenBatches,
        here: Processes,
        progress: Progress,
    ) -> None:
        self._recipe: Recipe = opened.recipe
        self._path = opened.folder / NONFINITE
        self._data, self._batches, self._here, self._progress = data, batches, here, progress
        if here.is_main and self._path.exists():  # what came after the checkpoint will be met again
            log = JsonlSink(self._path)
            log.keep_first(progress.nonfinite_events)
            log.close()

    def step_not_finite(self, step: int, result: StepResult) -> str:
        """Write down a step that was refused, and decide.

        Returns:
            What to say of it, where the step is passed over.

        Raises:
            NonFiniteError: where the run must stop.
            RollBack: where it goes back.
        """
        progress = self._progress
        progress.nonfinite_in_row += 1
        what = f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; no weight was changed"
        self._write(
            {
                "step": step,
                "what": "loss" if not math.isfinite(result.loss) else "gradient",
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                **self._documents(step, result),
            }
        )
        limit = self._recipe.train.nonfinite_limit
        if self._policy == "skip" and progress.nonfinite_in_row < limit:
            return f"{what}; passed over ({progress.nonfinite_in_row} in a row, {limit} would end the run)"
        in_row = f" {limit} steps in a row were not finite." if self._policy == "skip" else ""
        raise self._ending(step, f"{what}.{in_row}")

    def not_finite(self, step: int, error: NonFiniteError) -> NonFiniteError | RollBack:
        """Write down that a restart or a checkpoint was refused after `step`; return what to raise."""
        self._write({"step": step, "what": "weights", "refused": str(error)})
        return self._ending(step, f"step {step}: {error}", remedies=("rollback",))

    @property
    def _policy(self) -> str:
        return self._recipe.train.nonfinite

    def _ending(
        self, step: int, why: str, *, remedies: tuple[str, ...] = ("skip", "rollback")
    ) -> NonFiniteError | RollBack:
        progress = self._progress
        if self._policy == "rollback":
            next_batch = step + 1 + progress.passed_batches
            return RollBack(Past(next_batch=next_batch, num_events=progress.nonfinite_events), why)
        others = " or ".join(name for name in remedies if name != self._policy)
        return NonFiniteError(
            f"{why} Lower the learning rate or lengthen the warm-up in a new run; or give the same command "
            f"with --train.nonfinite {others}, which resumes the last checkpoint. See {self._path}"
        )

    def _write(self, event: Mapping[str, object]) -> None:
        self._progress.nonfinite_events += 1
        if not self._here.is_main:
            return
        log = JsonlSink(self._path)
        log.log({**event, "policy": self._policy})
        log.close()

    def _documents(self, step: int, result: StepResult) -> dict[str, object]:
        """Return the sequences of the micro batches whose loss is not finite, or of all if none is."""
        batch, batch_size = step + self._progress.passed_batches, self._recipe.train.batch_size
        rows = self._batches.rows(batch, batch_size=batch_size).tolist()
        size = self._recipe.train.micro_batch_size
        losses = self._all_losses(result.micro_losses)
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or list(range(len(losses)))
        suspects = [row for i in bad for row in rows[i * size : (i + 1) * size]]
        described: Sequence[dict[str, Any]] = ()
        if self._here.is_main:
            described = describe_sequences(
                self._data, suspects[:_DESCRIBED_SEQUENCES], seq_len=self._recipe.data.seq_len
            )
        return {
            "batch": batch,
            "micro_losses": losses,
            "sequences": suspects,
            "documents": list(described),
        }

    def _all_losses(self, micro_losses: Sequence[torch.Tensor]) -> list[float]:
        """Return the losses of all ranks' micro batches, in the order of the batch's rows."""
        here, count = self._here, len(micro_losses)
        losses = torch.zeros(here.world_size * count, dtype=torch.float64, device=here.device)
        losses[here.rank * count : (here.rank + 1) * count] = torch.stack(list(micro_losses)).double()
        summed: list[float] = here.sum(losses).tolist()
        return summed
