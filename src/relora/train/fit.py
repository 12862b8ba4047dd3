"""`fit`: one call from a recipe to a trained model."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from relora.checkpoint.store import latest_valid
from relora.data.prepare import prepare
from relora.data.prepared import PreparedData
from relora.errors import ConfigError, NonFiniteError
from relora.log.stages import StageLines
from relora.train.config import Recipe
from relora.train.guard import Past, RollBack
from relora.train.parallel import Processes, processes
from relora.train.result import TrainResult
from relora.train.run_folder import OpenedRun, open_run, undone_if_refused
from relora.train.signals import Requests, saving_on_signal, stopping_on_signals
from relora.train.trainer import Trainer


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
    requests = Requests()
    with (
        processes(recipe.distributed.strategy) as here,
        ExitStack() as held,
        saving_on_signal(requests),
    ):
        share = recipe.train.micro_batch_size * here.world_size
        if recipe.train.batch_size % share:
            raise ConfigError(
                f"train.batch_size {recipe.train.batch_size} must be a multiple of train.micro_batch_size "
                f"times the {here.world_size} processes, {share}"
            )
        opened = here.from_main(lambda: open_run(recipe, held, overwrite=overwrite, fork=fork))
        if opened.summary is not None:
            return TrainResult(folder=opened.folder, summary=opened.summary, exit_code=0, was_finished=True)
        tell = StageLines() if here.is_main else None
        with undone_if_refused(opened, is_main=here.is_main):
            data = here.main_first(lambda: prepare(opened.recipe.data, progress=tell))
        with stopping_on_signals(requests):
            return _train(opened, data, here, requests)


def _train(opened: OpenedRun, data: PreparedData, here: Processes, requests: Requests) -> TrainResult:
    """Train to the end, going back to the last checkpoint as often as the recipe allows."""
    past: Past | None = None
    times_back = 0
    while True:
        try:
            return _built(opened, data, here, requests, past).run()
        except RollBack as back:
            past, why = back.past, back.why
        # Outside of the handler, whose exception would keep the model of before alive beside the new one.
        newest, _ = here.from_main(partial(latest_valid, opened.checkpoints))
        times_back = times_back + 1 if newest == opened.resume_from else 1
        limit = opened.recipe.train.nonfinite_limit
        if times_back > limit:
            raise NonFiniteError(
                f"{why} The run has gone back {limit} times to {newest or 'its beginning'} and met it again: "
                "lower the learning rate or lengthen the warm-up in a new run, or --fork it"
            )
        note = f"{why} Going back to {newest.name if newest else 'step 0'}, past the data since"
        opened = replace(opened, resume_from=newest, notes=(note,), is_new_fork=False)


def _built(
    opened: OpenedRun, data: PreparedData, here: Processes, requests: Requests, past: Past | None
) -> Trainer:
    with undone_if_refused(opened, is_main=here.is_main):
        return Trainer(opened, data, here, requests, past)
