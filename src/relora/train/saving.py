"""When and how a run's checkpoints are written: a copy where training stands, the disk in the background."""

from contextlib import suppress
from functools import partial

from relora.checkpoint.background import BackgroundWriter, copied
from relora.checkpoint.store import retire, save_checkpoint
from relora.errors import CheckpointError
from relora.train.parallel import Processes
from relora.train.phase import Plan
from relora.train.precision import Resolved
from relora.train.reporting import Reporter
from relora.train.run_folder import OpenedRun, settings
from relora.train.state import RunState, checkpoint_content


class Saver:
    """Writes checkpoints of a run, one at a time; on other processes than the main one it only checks."""

    def __init__(
        self, opened: OpenedRun, plan: Plan, here: Processes, reporter: Reporter, *, precision: Resolved
    ) -> None:
        self._opened, self._plan, self._here, self._reporter = opened, plan, here, reporter
        self._precision: Resolved = precision
        self._writer = BackgroundWriter(timeout_s=opened.recipe.checkpoint.timeout_s, notice=reporter.say)

    def save(self, state: RunState, *, fingerprint: str, wait: bool = False) -> None:
        """Save the step that was just finished.

        Args:
            state: The run, at a step boundary.
            fingerprint: Of the prepared data.
            wait: Whether to return only when the checkpoint is on the disk and verified.

        Raises:
            NonFiniteError: if no run could go on from this state; nothing is written, on every process.
            CheckpointError: if this or an earlier checkpoint cannot be written.
        """
        state.check_finite()
        if not self._here.is_main:
            return
        self._writer.wait()
        # What is logged of the steps up to here must not be younger than the checkpoint that counts on it.
        self._reporter.sync()
        content = checkpoint_content(
            state,
            precision=self._precision,
            fingerprint=fingerprint,
            recipe=settings(self._opened.recipe),
        )
        content["tensors"] = {name: copied(group) for name, group in content["tensors"].items()}
        what = f"the checkpoint of step {state.progress.step} in {self._opened.checkpoints}"
        self._writer.submit(what, partial(self._write, content))
        if wait or not self._opened.recipe.checkpoint.background:
            self._writer.wait()

    def check(self) -> None:
        """Raise what a save in the background met; never waits."""
        self._writer.check()

    def finish(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            CheckpointError: if it is not.
        """
        self._writer.wait()

    def abandon(self) -> None:
        """Wait as `finish` does, where another error is on its way already."""
        with suppress(CheckpointError):
            self._writer.wait()

    def _write(self, content: dict[str, object]) -> None:
        """Write, verify, and only then retire what is older; runs on the writer's thread."""
        config = self._opened.recipe.checkpoint
        root = self._opened.checkpoints
        saved = save_checkpoint(root, **content)  # type: ignore[arg-type]
        retire(
            root,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_steps={self._plan.switch_step or 0},
            verified=saved,
        )
