"""One process in a run at a time, and what a process that died in opening one leaves behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import relora
from relora.errors import CheckpointError, ConfigError
from relora.train.config import Recipe
from relora.train.run_folder import open_run
from tiny_run import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path)


def opened(recipe: Recipe, **options: object):
    with ExitStack() as held:
        return open_run(recipe, held, **options)


HOLDER = """
import os, signal, sys
from pathlib import Path
from relora.checkpoint.lock import folder_lock
with folder_lock(Path(sys.argv[1]), doing="training"):
    child = os.fork() if sys.argv[2] == "with child" else None
    if not child:  # alone, or the child itself, which has run its hooks by now
        print(0 if child is None else os.getpid(), flush=True)
    signal.pause()
"""


@contextmanager
def holder(folder: Path, kind: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that holds the folder's lock; yield it, and the id of its child."""
    environment = {**os.environ, "PYTHONPATH": str(Path(relora.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(folder), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_second_process_is_refused_and_told_of_the_first_until_that_is_dead(recipe, options):
    folder = opened(recipe).folder
    with holder(folder) as (process, _):
        with pytest.raises(CheckpointError, match=rf"'process {process.pid} on .*' is training there"):
            opened(recipe, **options)
        assert (folder / "recipe.toml").is_file()
        process.kill()
        process.wait()
        # Its name is still there, and locks nothing.
        assert f"process {process.pid} on" in (folder / ".lock").read_text()
        assert opened(recipe, **options).folder == folder


def test_a_child_that_outlives_a_killed_parent_does_not_hold_its_lock(recipe):
    folder = opened(recipe).folder
    with holder(folder, "with child") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        assert opened(recipe).folder == folder


def test_the_lock_is_let_go_when_a_run_is_refused(recipe):
    opened(recipe)
    (recipe.run.folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="another recipe"):
        opened(replace(recipe, run=replace(recipe.run, seed=5)))
    opened(recipe)


def test_a_process_that_died_before_the_recipe_was_written_leaves_a_folder_that_can_be_used(recipe):
    recipe.run.folder.mkdir(parents=True)
    (recipe.run.folder / ".lock").write_text("process 1 on elsewhere")
    (recipe.run.folder / ".recipe.toml.part").write_text("[run")
    assert opened(recipe).resume_from is None


def test_an_unfinished_fork_can_be_forked_again_and_is_no_strangers_folder(recipe):
    folder = opened(recipe).folder
    unfinished = folder.with_name("later")
    unfinished.mkdir()
    (unfinished / "forked_from.json").write_text("{}")
    (unfinished / "model").mkdir()
    with pytest.raises(CheckpointError, match="has no valid checkpoint"):
        opened(recipe, fork="later")
    assert opened(replace(recipe, run=replace(recipe.run, name="later"))).resume_from is None
    assert not (unfinished / "model").exists()


def test_a_fork_without_its_checkpoint_does_not_begin_at_step_0(recipe):
    folder = opened(recipe).folder
    (folder / "forked_from.json").write_text('{"run": "runs/first", "checkpoint": "step-00000009"}')
    with pytest.raises(CheckpointError, match=r"was forked .*runs/first.*it is missing.*--overwrite"):
        opened(recipe)
    assert opened(recipe, overwrite=True).resume_from is None


def test_overwriting_killed_at_any_point_leaves_a_run_that_can_be_overwritten(recipe, tmp_path, monkeypatch):
    folder = opened(recipe).folder
    for name in ("metrics.jsonl", "summary.json", "aaa", "zzz"):
        (folder / name).write_text("{}")
    real, left = Path.unlink, [2]

    def dying(path: Path, missing_ok: bool = False) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        opened(recipe, overwrite=True)
    monkeypatch.setattr(Path, "unlink", real)
    assert (folder / "recipe.toml").is_file()
    opened(recipe, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {".lock", "recipe.toml"}
