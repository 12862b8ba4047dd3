"""Where metrics go: metrics.jsonl always; TensorBoard and Weights & Biases where asked for.

A sink takes the same record as every other. On resume the steps after the checkpoint must not be
told twice: metrics.jsonl drops those lines, TensorBoard is told to purge them, and Weights & Biases,
which cannot take a line back, keeps the first telling and is not sent the second (the same by bits
where the run is deterministic).
"""

import importlib
import tomllib
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

from relora.errors import ConfigError
from relora.log.config import LogConfig
from relora.log.files import replacing
from relora.log.jsonl import JsonlSink, record_step

__all__ = ["JsonlSink", "Sink", "TensorBoardSink", "WandbSink", "make_sinks"]

METRICS_FILE = "metrics.jsonl"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Sink(Protocol):
    """Takes the metrics of a run, one record a logged step."""

    def log(self, record: Mapping[str, object]) -> None:
        """Take one record: "step", and values by name."""

    def close(self) -> None:
        """Bring everything to rest; nothing is logged afterwards."""


def make_sinks(
    config: LogConfig, folder: Path, run_name: str, *, resume_after: int | None = None
) -> list[Sink]:
    """Open the sinks a recipe names, metrics.jsonl first and always.

    Args:
        config: What to open.
        folder: The run folder, which exists.
        run_name: What Weights & Biases shows.
        resume_after: The step of the checkpoint a run resumes from (0 where it begins anew): what was
            told of later steps is taken back where the sink can. None takes nothing back.

    Raises:
        ConfigError: if a sink needs an extra that is not installed, or names none we have.
        CheckpointError: if metrics.jsonl cannot be written.
    """
    problems = config.violations()
    if problems:
        raise ConfigError.from_violations("log", problems)
    modules = {name: _optional(name) for name in config.sinks if name in _MODULES}
    with ExitStack() as opened:  # closes those that opened, should a later one refuse
        metrics = opened.enter_context(closing(JsonlSink(folder / METRICS_FILE)))
        if resume_after is not None:
            metrics.truncate_after(resume_after)
        sinks: list[Sink] = [metrics]
        if "tensorboard" in modules:
            board = TensorBoardSink(modules["tensorboard"], folder, resume_after=resume_after)
            sinks.append(opened.enter_context(closing(board)))
        if "wandb" in modules:
            sinks.append(WandbSink(modules["wandb"], folder, run_name, resume=bool(resume_after)))
        opened.pop_all()
    return sinks


class TensorBoardSink:
    """Write every number of a record as a scalar at its step, into FOLDER/tensorboard."""

    def __init__(self, module: Any, folder: Path, *, resume_after: int | None) -> None:
        purge_step = None if resume_after is None else resume_after + 1
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)

    def log(self, record: Mapping[str, object]) -> None:
        """Write the record's numbers but the step, which is their position."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, global_step=record_step(record))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Send records to a Weights & Biases run that a resumed training goes on with.

    The run's id is kept in FOLDER/wandb_run_id; its config is the resolved recipe.
    """

    def __init__(self, module: Any, folder: Path, run_name: str, *, resume: bool) -> None:
        self._run = module.init(
            id=_wandb_id(folder / "wandb_run_id", resume=resume),
            name=run_name,
            dir=str(folder),
            resume="allow",
            config=_recipe(folder / "recipe.toml"),
        )
        self._last_sent = self._run.step - 1

    def log(self, record: Mapping[str, object]) -> None:
        """Send the record's numbers, unless the run has its step already."""
        step = record_step(record)
        if step is None or step > self._last_sent:
            self._run.log(_numbers(record), step=step)

    def close(self) -> None:
        """Wait until everything is sent, and end this sitting of the run."""
        self._run.finish()


def _optional(extra: str) -> Any:
    try:
        return importlib.import_module(_MODULES[extra])
    except ImportError as error:
        raise ConfigError(
            f"log.sinks names {extra!r}, which is not installed ({error}): "
            f'pip install "relora[{extra}]", or take it out of log.sinks'
        ) from error


def _numbers(record: Mapping[str, object]) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _wandb_id(path: Path, *, resume: bool) -> str:
    if resume and path.is_file():
        return path.read_text(encoding="ascii").strip()
    run_id = uuid.uuid4().hex[:12]
    with replacing(path) as file:
        file.write(run_id.encode())
    return run_id


def _recipe(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
