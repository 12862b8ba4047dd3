"""The training loop: from wherever a run is to its last step."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from relora.checkpoint.store import load_checkpoint, retire
from relora.data.batches import TokenBatches
from relora.data.prepared import PreparedData
from relora.method.restart_report import RestartReport
from relora.train.evaluate import evaluate
from relora.train.loss import TokenLoss
from relora.train.model import build_model
from relora.train.parallel import Processes
from relora.train.phase import Plan, refuse_dead_cycle
from relora.train.precision import resolve_precision
from relora.train.reporting import Reporter
from relora.train.run_folder import OpenedRun
from relora.train.saved import empty_model
from relora.train.setup import at_low_rank, build_state, save_model_files
from relora.train.signals import StopRequest
from relora.train.state import restore_state_, save_state
from relora.train.step import StepResult, train_step_
from relora.train.summary import summarise


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `fit` ended."""

    folder: Path
    summary: dict[str, Any]
    """As summary.json; empty if training was stopped before its last step."""
    exit_code: int
    """0, or 130 or 143 after SIGINT or SIGTERM."""
    was_finished: bool = False
    """Whether there was nothing left to train."""


class Trainer:
    """One run, from where it is to its end."""

    def __init__(self, opened: OpenedRun, data: PreparedData, here: Processes, request: StopRequest) -> None:
        self.opened, self.data, self.here, self.request = opened, data, here, request
        self.recipe = recipe = opened.recipe
        self.plan = Plan(recipe=recipe)
        checkpoint = load_checkpoint(opened.resume_from) if opened.resume_from else None
        self.precision, why = resolve_precision(recipe.train.precision, here.device)
        if checkpoint is not None and recipe.train.precision == "auto":
            self.precision, why = checkpoint.state["precision"], "as the run began"
        is_low_rank = checkpoint is not None and checkpoint.state["phase"] == "low_rank"
        # A run that goes on needs neither the checkpoint it was initialised from nor a network.
        model = empty_model(opened.folder) if checkpoint else build_model(recipe, data)
        self.state = build_state(model, self.plan, here, low_rank=is_low_rank)
        if checkpoint is not None:
            restore_state_(self.state, checkpoint, fingerprint=data.fingerprint)
        left_out = None if self.state.relora is None else self.state.relora.catch_up()
        self._wrap()
        self.batches = TokenBatches(data.train_tokens, seq_len=recipe.data.seq_len, seed=recipe.run.seed)
        self.reporter = Reporter(opened, self.plan, self.state, here)
        self.reporter.begin(data, f"{self.precision} on {here.device} ({why})")
        if self.loss.obstacle is not None:
            self.reporter.say(f"the loss is not taken in chunks: {self.loss.obstacle}")
        if left_out is not None:
            self._count_restart(left_out)
            self.reporter.step(left_out)

    def run(self) -> TrainResult:
        """Train to the last step, or until asked to stop; both leave a checkpoint."""
        begun, before_s = time.perf_counter(), self.state.progress.wall_s
        progress = self.state.progress
        with ExitStack() as stack:
            stack.callback(self.reporter.close)
            if self.opened.resume_from is None:
                self._begin()
            for step in range(progress.step + 1, self.recipe.total_steps + 1):
                if self.plan.switch_step == step - 1:
                    self._switch()
                restart = self._step(step)
                progress.wall_s = before_s + time.perf_counter() - begun
                self.reporter.step(restart)
                stopping = self.here.any(self.request.signal_number is not None)
                is_due = self._is_due(step, self.recipe.checkpoint.every)
                if is_due or stopping or step == self.plan.switch_step:
                    self._save()
                if stopping and step < self.recipe.total_steps:
                    return self._stopped()
            progress.wall_s = before_s + time.perf_counter() - begun
        return self._finish()

    def _begin(self) -> None:
        if self.here.is_main:
            save_model_files(self.opened.folder, self.state.model, self.data)
        if self.plan.switch_step == 0:
            self._save()  # the rank that a cold start learns is measured against these weights

    def _step(self, step: int) -> RestartReport | None:
        recipe, state = self.recipe, self.state
        state.optimizer.set_multiplier_(self.plan.multiplier(step))
        result = train_step_(
            self.wrapped,
            state.optimizer,
            self.batches.batch(step, batch_size=recipe.train.batch_size),
            self.here,
            step=step,
            seed=recipe.run.seed,
            micro_batch_size=recipe.train.micro_batch_size,
            precision=self.precision,
            clip_grad_norm=recipe.optim.clip_grad_norm,
        )
        restart = None if state.relora is None else state.relora.after_step(step)
        if restart is not None:
            self._count_restart(restart)
        state.progress.step = step
        state.progress.tokens += recipe.tokens_per_step
        self._record(step, result)
        return restart

    def _record(self, step: int, result: StepResult) -> None:
        """Count the step's loss, and measure and log where that is due."""
        progress = self.state.progress
        progress.loss_sum += float(self.here.sum(result.loss.double())) / self.here.world_size
        progress.loss_steps += 1
        is_evaluated = self._is_due(step, self.recipe.eval.every) or step == self.plan.switch_step
        if is_evaluated:
            self._evaluate(step)
        if is_evaluated or step == 1 or self._is_due(step, self.recipe.log.every):
            self.reporter.record(grad_norm=float(result.grad_norm), is_evaluated=is_evaluated)

    def _evaluate(self, step: int) -> None:
        progress = self.state.progress
        progress.evaluated = evaluate(
            self.loss,
            self.data,
            self.here,
            seq_len=self.recipe.data.seq_len,
            batch_size=self.recipe.train.micro_batch_size,
            sequences=self.recipe.eval.sequences,
            precision=self.precision,
        ).as_metrics()
        if step == self.plan.switch_step:
            progress.switch = {"step": step, **progress.evaluated}

    def _switch(self) -> None:
        report = at_low_rank(self.state, self.plan)
        self._wrap()
        self.reporter.switched(report)

    def _wrap(self) -> None:
        train = self.recipe.train
        self.loss = TokenLoss(cast(PreTrainedModel, self.state.model), chunk_tokens=train.loss_chunk_tokens)
        self.wrapped = self.here.wrap_for_training(self.loss, compile_it=train.compile)

    def _count_restart(self, restart: RestartReport) -> None:
        refuse_dead_cycle(restart)
        self.state.progress.restarts = restart.restart_index

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.recipe.total_steps or (every > 0 and step % every == 0)

    def _save(self) -> None:
        if self.here.is_main:
            root = self.opened.checkpoints
            save_state(root, self.state, precision=self.precision, fingerprint=self.data.fingerprint)
            retire(root, keep_last=self.recipe.checkpoint.keep_last, keep_steps={self.plan.switch_step or 0})
        self.here.barrier()

    def _stopped(self) -> TrainResult:
        self.reporter.say(
            f"stopped after step {self.state.progress.step}; the same command resumes {self.opened.folder}"
        )
        return TrainResult(folder=self.opened.folder, summary={}, exit_code=self.request.exit_code)

    def _finish(self) -> TrainResult:
        summary: dict[str, Any] = {}
        if self.here.is_main:
            summary = summarise(self.opened, self.state, self.plan, self.here)
        self.here.barrier()
        return TrainResult(folder=self.opened.folder, summary=summary, exit_code=0)
