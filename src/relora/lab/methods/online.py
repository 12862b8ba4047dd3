"""relora-online: merges and optimizer resets with a period each (paper section 4.4 and Table 5).

A merge draws new factors and keeps Adam's moments of the old ones; at the ends of the schedule's cycles,
where the learning rate drops, the moments are reset as the [relora] section says.
"""

from relora.lab.methods.counted import CountedRestarts
from relora.lab.methods.options import OnlineOptions
from relora.train.method_parts import (
    ResetReport,
    RestartReport,
    derived_seed,
    merge_,
    reinit_,
    reset_optimizer_state_,
)
from relora.train.training_method import refuse_dead_cycle


class Online(CountedRestarts):
    """Merge every merge_every steps, reset every relora.restart_every."""

    def after_step(self, step: int) -> RestartReport | None:
        """Merge, and reset too where a cycle of the schedule ends."""
        resets = step in self.restart_steps
        if not resets and not self._merges_at(step):
            return None
        seed = self.recipe.run.seed
        merge = merge_(self.layers)
        self.counters["merges"] += 1
        index = self.counters["merges"]
        reinit_(self.layers, seed=seed, restart_index=index)
        reports: tuple[ResetReport, ...] = ()
        if resets:
            reports = (self._reset(derived_seed(seed, index)),)
            self.counters["optimizer_resets"] += 1
        return refuse_dead_cycle(RestartReport(restart_index=index, step=step, merge=merge, resets=reports))

    def _merges_at(self, step: int) -> bool:
        options = self.recipe.options
        assert isinstance(options, OnlineOptions)
        done = step - self.start
        return (
            bool(self.layers)
            and done > 0
            and done % options.merge_every == 0
            and step < self.recipe.total_steps
        )

    def _reset(self, seed: int) -> ResetReport:
        relora = self.recipe.relora
        assert self.optimizer is not None
        return reset_optimizer_state_(
            self.optimizer,
            self.factors,
            method=relora.reset,
            ratio=relora.reset_ratio,
            mask=relora.reset_mask,
            seed=seed,
            reset_step_count=relora.reset_step_count,
        )
