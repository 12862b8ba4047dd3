"""What a run tells: metrics and restarts as files, progress on the screen, a report at the end.

Only the main process of a run speaks; on the others every call does nothing.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.data.prepare import PreparedData
from relora.log.console import Console
from relora.log.jsonl import JsonlSink, read_jsonl, record_step
from relora.log.screen import last_screen
from relora.log.sinks import Sink, make_sinks
from relora.log.units import count
from relora.method.restart_report import RestartReport
from relora.train.parallel import Processes
from relora.train.phase import Plan, num_parameters
from relora.train.run_folder import METRICS, RESTARTS, OpenedRun
from relora.train.state import RunState
from relora.train.watch import RestartEffect

_PLACES = {"in_place": "in place", "complement": "on the complement"}
"""What `TrainingMethod.step_effects` names, in words."""


def show_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Show the last screen of a finished run on standard error."""
    last_screen(summary, folder)


class Reporter:
    """Logs of a run that is training."""

    def __init__(self, opened: OpenedRun, plan: Plan, state: RunState, here: Processes) -> None:
        self._opened, self._plan, self._state = opened, plan, state
        self._sinks: list[Sink] = []
        self._restarts: JsonlSink | None = None
        self._console: Console | None = None
        self._seen_tokens, self._seen_s = state.progress.tokens, time.perf_counter()
        if not here.is_main:
            return
        step = state.progress.step
        self._console = Console(
            total_steps=opened.recipe.total_steps,
            start_step=step,
            switch_step=plan.switch_step or None,
            restart_steps=plan.restart_steps,
        )
        for note in opened.notes:
            self._console.say(note)
        log = opened.recipe.log
        self._sinks = make_sinks(log, opened.folder, opened.recipe.run.name, resume_after=step)
        self._restarts = JsonlSink(opened.folder / RESTARTS)
        self._restarts.truncate_after(step)
        self._note_lost_lines()

    def begin(self, data: PreparedData, precision: str) -> None:
        """Say what will be trained, and when the restarts fall."""
        recipe, model = self._opened.recipe, self._state.model
        self.say(
            f"{recipe.run.method}: {count(num_parameters(model))} parameters, {recipe.total_steps} "
            f"steps of {recipe.tokens_per_step} tokens, {precision}"
        )
        if idle := recipe.idle_settings:
            listed = ", ".join(f"relora.{name} {getattr(recipe.relora, name)!r}" for name in idle)
            self.say(f"without restarts these have no effect: {listed}")
        self.say(
            f"data: {count(len(data.train_tokens))} training and {count(len(data.heldout_tokens))} "
            f"held-out tokens, {data.bytes_per_token:.2f} bytes each"
        )
        for step in self._plan.skipped_restarts:
            self.say(f"no restart after step {step}: the run would end before its re-warm does")
        for step in self._plan.restart_steps[-1:]:
            self.say(f"{len(self._plan.restart_steps)} restarts, the last after step {step}")
        if recipe.spec.restarts and not self._plan.restart_steps:
            self.say("no restarts: the low-rank phase is one cycle, which trains as LoRA does")

    def say(self, text: str) -> None:
        """Write a line that stays on the screen."""
        if self._console is not None:
            self._console.say(text)

    def step(self, restart: RestartReport | None) -> None:
        """Move on by a step, and keep what its restart did."""
        if self._console is None or self._restarts is None:
            return
        self._console.advance(self._state.progress.step)
        if restart is not None:
            self._restarts.log(restart.as_dict())
            self._console.restart(restart.as_dict())

    def caught_up(self, restart: RestartReport) -> None:
        """As `step`, for a restart that was left out, and that a killed process may have told of."""
        if self._restarts is not None:
            self._restarts.truncate_after(restart.step - 1)
        self.step(restart)

    def record(self, *, grad_norm: float, is_evaluated: bool) -> None:
        """Log the steps since the last record, and begin the next one."""
        progress = self._state.progress
        now = time.perf_counter()
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            # Not a number where none of the steps since the last line was finite.
            "train/loss": progress.loss_sum / progress.loss_steps if progress.loss_steps else math.nan,
            "lr": self._state.optimizer.lr,
            "grad_norm": grad_norm,
            "tokens_per_s": (progress.tokens - self._seen_tokens) / (now - self._seen_s),
            "restart_index": progress.restarts,
            "phase": self._state.phase,
            **(progress.evaluated if is_evaluated else {}),
            **self._effects(),
            **self._ending(progress.step),
        }
        progress.loss_sum, progress.loss_steps = 0.0, 0
        progress.logged_step = progress.step
        self._seen_tokens, self._seen_s = progress.tokens, time.perf_counter()
        for sink in self._sinks:
            sink.log(record)
        if self._console is not None:
            self._console.log(record)

    def _effects(self) -> dict[str, float]:
        """Return what a step did without a gradient of autograd's; say so where it is not as it should be."""
        metrics: dict[str, float] = {}
        if self._console is None:
            return metrics
        for name, report in self._state.method.step_effects().items():
            measured = report.as_metrics()
            metrics |= {f"{name}/{key}": value for key, value in measured.items()}
            if not measured["moved_fraction"] and self._state.optimizer.lr:
                self.say(f"step {report.step} has moved no weight {_PLACES[name]}")
            if bad := measured["num_non_finite"]:
                self.say(f"step {report.step}: {bad:.0f} entries of gradients, not finite, move nothing")
        return metrics

    def _ending(self, step: int) -> dict[str, float]:
        """Return what ended a warm start before its time, where that was in this step."""
        switch = self._state.progress.switch or {}
        is_now = switch.get("step") == step and "steepness" in switch
        return {"warm_start/steepness": switch["steepness"]} if is_now else {}

    def effect(self, effect: RestartEffect | None) -> None:
        """Add to a restart's line what became of the loss, and say so where it hurt."""
        if effect is None or self._restarts is None:
            return
        self._restarts.amend(effect.step, effect.as_dict())
        if effect.hurt:
            self.say(
                f"the restart after step {effect.step} hurt: loss {effect.loss_before:.4f} before it, "
                f"{effect.loss_after:.4f} after its re-warm"
            )

    def sync(self) -> None:
        """Force what was logged to the disk."""
        for sink in (*self._sinks, self._restarts):
            if isinstance(sink, JsonlSink):
                sink.sync()

    def switched(self, report: str) -> None:
        """Say that the model trains at low rank from here."""
        if self._console is None:
            return
        perplexity = (self._state.progress.switch or {}).get("eval/perplexity")
        self._console.switch(self._state.progress.step, heldout_perplexity=perplexity)
        self._console.say(report)

    def _note_lost_lines(self) -> None:
        """Say so where metrics.jsonl is shorter than the checkpoint knows it: it was moved or cut."""
        logged = self._state.progress.logged_step
        steps = [record_step(record) for record in read_jsonl(self._opened.folder / METRICS).records]
        if logged and steps[-1:] != [logged]:
            self.say(f"{METRICS} has lost lines: its last is not of step {logged}, which was logged")

    def close(self) -> None:
        """Close every file and the display; more than once does no harm."""
        if self._console is not None:
            self._console.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        if self._restarts is not None:
            self._restarts.close()
            self._restarts = None
