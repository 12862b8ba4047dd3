"""What becomes of a step's figures: loss and tokens counted, the model measured, a line logged where due."""

from relora.data.prepared import PreparedData
from relora.method.restart_report import RestartReport
from relora.train.evaluate import evaluate
from relora.train.guard import Guard
from relora.train.loss import TokenLoss
from relora.train.parallel import Processes
from relora.train.phase import Plan
from relora.train.plateau import take_loss_
from relora.train.precision import Resolved
from relora.train.reporting import Reporter
from relora.train.state import RunState
from relora.train.step import StepResult


class Accounts:
    """Keeps a run's progress as its steps go by."""

    def __init__(
        self,
        *,
        plan: Plan,
        state: RunState,
        data: PreparedData,
        here: Processes,
        guard: Guard,
        reporter: Reporter,
        precision: Resolved,
    ) -> None:
        self._plan, self._recipe, self._state, self._progress = plan, plan.recipe, state, state.progress
        self._data, self._here, self._guard, self._reporter = data, here, guard, reporter
        self._precision: Resolved = precision
        self._steepness: float | None = None

    def count(self, step: int, result: StepResult) -> None:
        """Add the step's loss to those that are waiting to be logged, unless the step was refused.

        Raises:
            NonFiniteError, RollBack: if it was, and the run cannot pass over it.
        """
        progress = self._progress
        if not result.is_applied:
            said = self._guard.step_not_finite(step, result)
            lost = self._state.method.step_refused(step)
            self._reporter.say(f"{said}; {lost}" if lost else said)
            return
        progress.nonfinite_in_row = 0
        progress.loss_sum += result.loss
        progress.loss_steps += 1
        if self._plan.watches_loss(step):
            self._watch_plateau(step, result.loss)
        self._reporter.effect(self._state.watch.loss(step, result.loss))

    def count_restart(self, restart: RestartReport) -> None:
        """Note a restart, from which on the losses say whether it hurt."""
        self._progress.restarts = restart.restart_index
        self._reporter.effect(self._state.watch.restarted(restart.step))

    def finished(self, step: int, result: StepResult, loss: TokenLoss) -> None:
        """Close a step: measure and log where that is due."""
        progress, recipe = self._progress, self._recipe
        progress.step = step
        progress.tokens += recipe.tokens_per_step
        is_evaluated = recipe.is_due(step, recipe.eval.every) or step == self._plan.switch_step
        if is_evaluated:
            self.evaluate(step, loss)
        if is_evaluated or step == 1 or recipe.is_due(step, recipe.log.every):
            self._reporter.record(grad_norm=result.grad_norm, is_evaluated=is_evaluated)

    def evaluate(self, step: int, loss: TokenLoss) -> None:
        """Measure the model, and keep what it was at the switch."""
        recipe, progress = self._recipe, self._progress
        progress.evaluated = evaluate(
            loss,
            self._data,
            self._here,
            seq_len=recipe.data.seq_len,
            batch_size=recipe.train.micro_batch_size,
            sequences=recipe.eval.sequences,
            split=recipe.eval.split,
            precision=self._precision,
        ).as_metrics()
        if step == self._plan.switch_step:
            ended = {} if self._steepness is None else {"steepness": self._steepness}
            progress.switch = {"step": step, **progress.evaluated, **ended}

    def _watch_plateau(self, step: int, loss: float) -> None:
        """End the warm start with this step, if its losses say so; every rank has the same."""
        progress, longest = self._progress, self._recipe.switch_step or 0
        means, pending = progress.warm_start_means, progress.warm_start_pending
        found = take_loss_(means, pending, loss, longest=longest)
        if found is not None:
            self._plan.ended_at, self._steepness = step, found
            self._reporter.say(f"the warm start ends at step {step} of {longest}: steepness {found:.2f}")
