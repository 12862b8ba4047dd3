"""The training loop: from wherever a run is to its last step."""

import time
from contextlib import ExitStack
from typing import Any, cast

from transformers import PreTrainedModel

from relora.data.batches import TokenBatches
from relora.data.prepared import PreparedData
from relora.errors import NonFiniteError
from relora.train.accounts import Accounts
from relora.train.guard import Guard, Past
from relora.train.loss import TokenLoss
from relora.train.memory import memory_errors
from relora.train.parallel import Processes
from relora.train.phase import Plan
from relora.train.reporting import Reporter
from relora.train.result import TrainResult
from relora.train.run_folder import OpenedRun
from relora.train.saving import Saver
from relora.train.setup import at_low_rank, save_model_files, state_to_begin_with
from relora.train.signals import Requests, stop_signal
from relora.train.step import train_step_
from relora.train.summary import peak_memory_bytes, summarise


class Trainer:
    """One run, from where it is to its end; `past` is what it has been through if it went back."""

    def __init__(
        self, opened: OpenedRun, data: PreparedData, here: Processes, requests: Requests, past: Past | None
    ) -> None:
        self.opened, self.data, self.here, self.requests = opened, data, here, requests
        self.recipe = recipe = opened.recipe
        self.plan = Plan(recipe=recipe)
        with memory_errors(recipe, None, "the model"):
            self.state, self.precision, why = state_to_begin_with(opened, self.plan, data, here, past)
        left_out = self.state.method.catch_up()
        self.batches = TokenBatches(data.train_tokens, seq_len=recipe.data.seq_len, seed=recipe.run.seed)
        self.guard = Guard(opened, data, self.batches, here, self.state.progress)
        self.reporter = Reporter(opened, self.plan, self.state, here)
        self.reporter.begin(data, f"{self.precision} on {here.device} ({why})")
        if self.plan.switch_step != self.state.progress.step:  # else the switch is next, and wraps
            with memory_errors(recipe, self.state, "the model"):
                self._wrap()
            self._say_obstacle()
        self.accounts = Accounts(
            plan=self.plan,
            state=self.state,
            data=data,
            here=here,
            guard=self.guard,
            reporter=self.reporter,
            precision=self.precision,
        )
        self.saver = Saver(opened, self.plan, here, self.reporter, precision=self.precision)
        if left_out is not None:
            self.accounts.count_restart(left_out)
            self.reporter.caught_up(left_out)

    def run(self) -> TrainResult:
        """Train to the last step, or until asked to stop; both leave a checkpoint.

        Raises:
            RollBack: if the run goes back to its last checkpoint.
        """
        begun, before_s = time.perf_counter(), self.state.progress.wall_s
        progress, plan = self.state.progress, self.plan
        with ExitStack() as stack:
            stack.callback(self.reporter.close)
            stack.callback(self.saver.abandon)
            if self.opened.resume_from is None:
                self._begin()
            for step in range(progress.step + 1, self.recipe.total_steps + 1):
                if plan.switch_step == step - 1:
                    with memory_errors(self.recipe, self.state, "the switch to low rank"):
                        self._switch()
                with memory_errors(self.recipe, self.state, f"step {step}"):
                    flags = self._step(step)
                progress.wall_s = before_s + time.perf_counter() - begun
                self.saver.check()
                stop = stop_signal(flags)
                save_due = self.recipe.is_due(step, self.recipe.checkpoint.every)
                if save_due or step == plan.switch_step or stop is not None or flags[-1]:
                    self._save(wait=stop is not None)
                if stop is not None and step < self.recipe.total_steps:
                    return self._stopped(stop)
            self.reporter.effect(self.state.watch.conclude())
            self.saver.finish()
            progress.wall_s = before_s + time.perf_counter() - begun
        return self._finish()

    def _begin(self) -> None:
        if self.here.is_main:
            save_model_files(self.opened.folder, self.state.model, self.data)
        if self.plan.switch_step == 0:
            self._save()  # the rank that a cold start learns is measured against these weights

    def _step(self, step: int) -> tuple[bool, ...]:
        """Take a step, restart and measure where that is due; return what the ranks were asked for."""
        recipe, state, progress = self.recipe, self.state, self.state.progress
        state.optimizer.set_multiplier_(self.plan.multiplier(step))
        result = train_step_(
            self.wrapped,
            state.optimizer,
            self.batches.batch(step + progress.passed_batches, batch_size=recipe.train.batch_size),
            self.here,
            step=step,
            seed=recipe.run.seed,
            micro_batch_size=recipe.train.micro_batch_size,
            precision=self.precision,
            clip_grad_norm=recipe.optim.clip_grad_norm,
            after_backward=state.method.after_backward,
            flags=self.requests.take() if self.here.world_size > 1 else (),
        )
        self.accounts.count(step, result)
        try:
            restart = state.method.after_step(step)
        except NonFiniteError as error:
            raise self.guard.not_finite(step, error) from error
        if restart is not None:
            self.accounts.count_restart(restart)
        self.accounts.finished(step, result, self.loss)
        self.reporter.step(restart)
        # Alone, what came in during the step counts too; among others, what all of them know.
        return result.flags if self.here.world_size > 1 else self.requests.take()

    def _switch(self) -> None:
        if self.plan.switch_step and self.state.progress.switch is None:
            self._wrap()  # a fork that switches where it begins, which nobody measured as the switch
            self.accounts.evaluate(self.plan.switch_step, self.loss)
        report = at_low_rank(self.state)
        self._wrap()
        self.reporter.switched(report)
        if self.plan.switch_step == 0:
            self._say_obstacle()

    def _wrap(self) -> None:
        train = self.recipe.train
        self.loss = TokenLoss(cast(PreTrainedModel, self.state.model), chunk_tokens=train.loss_chunk_tokens)
        self.wrapped = self.here.wrap_for_training(self.loss, compile_it=train.compile)

    def _say_obstacle(self) -> None:
        if self.loss.obstacle is not None:
            self.reporter.say(f"the loss is not taken in chunks: {self.loss.obstacle}")

    def _save(self, *, wait: bool = False) -> None:
        progress = self.state.progress
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes(self.here.device))
        try:
            self.saver.save(self.state, fingerprint=self.data.fingerprint, wait=wait)
        except NonFiniteError as error:
            raise self.guard.not_finite(progress.step, error) from error

    def _stopped(self, number: int) -> TrainResult:
        self.reporter.say(
            f"stopped after step {self.state.progress.step}; the same command resumes {self.opened.folder}"
        )
        return TrainResult(folder=self.opened.folder, summary={}, exit_code=128 + number)

    def _finish(self) -> TrainResult:
        summary: dict[str, Any] = {}
        if self.here.is_main:
            summary = summarise(self.opened, self.state, self.plan, self.here, precision=self.precision)
        self.here.barrier()
        return TrainResult(folder=self.opened.folder, summary=summary, exit_code=0)
