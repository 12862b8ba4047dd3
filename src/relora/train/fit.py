"""`fit`: one call from a recipe to a trained model."""

from contextlib import ExitStack

from relora.data.prepare import prepare
from relora.errors import ConfigError
from relora.log.stages import StageLines
from relora.train.config import Recipe
from relora.train.parallel import processes
from relora.train.reporting import read_summary
from relora.train.run_folder import open_run
from relora.train.signals import stop_on_signals
from relora.train.trainer import Trainer, TrainResult


def fit(recipe: Recipe, *, overwrite: bool = False, fork: str | None = None) -> TrainResult:
    """Train by a recipe, from step 0 or from the newest checkpoint of its folder.

    Args:
        recipe: The run.
        overwrite: Remove the run that is there first.
        fork: Name of a new run to begin from this one's newest checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: each with cause, place and remedy; what is on
            disk stays.
    """
    with processes(recipe.distributed.strategy) as here, ExitStack() as held:
        share = recipe.train.micro_batch_size * here.world_size
        if recipe.train.batch_size % share:
            raise ConfigError(
                f"train.batch_size {recipe.train.batch_size} must be a multiple of train.micro_batch_size "
                f"times the {here.world_size} processes, {share}"
            )
        opened = here.from_main(lambda: open_run(recipe, held, overwrite=overwrite, fork=fork))
        if (summary := read_summary(opened.folder)) is not None and opened.resume_from is not None:
            return TrainResult(folder=opened.folder, summary=summary, exit_code=0, was_finished=True)
        tell = StageLines() if here.is_main else None
        data = here.main_first(lambda: prepare(opened.recipe.data, progress=tell))
        with stop_on_signals() as request:
            return Trainer(opened, data, here, request).run()
