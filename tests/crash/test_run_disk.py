"""Disks that refuse, for real: exit code 4, words, and the checkpoint before as it was."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from killing import Trial, Victims

from relora.checkpoint.store import latest_valid, load_checkpoint
from relora.train.recipe_io import load_recipe, write_recipe

NOBODY = 65534

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and rlimits are not there")


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    victims = Victims()
    folder = Path(tempfile.mkdtemp(prefix="relora-disk-"))
    folder.chmod(0o755)  # another user must be able to come here
    yield Trial(victims, folder)
    victims.close()
    shutil.rmtree(folder)


def stopped_at_7(trial: Trial, name: str) -> Path:
    """Leave a run that was stopped after step 7; return its recipe file."""
    recipe = trial.file(name)
    answer = trial.victims.train(recipe, at_functions=[["agree", "return", 7, "SIGTERM"]])
    assert answer["code"] == 143
    return recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def assert_refused(trial: Trial, name: str, answer: dict, words: str) -> None:
    """Check the exit code and the words, and that the run can go on from step 7, its newest checkpoint."""
    assert answer["code"] == 4, answer["log"]
    said = [line for line in answer["log"].splitlines() if line.startswith("relora: ")][-1]
    assert words in said and "Traceback" not in answer["log"]
    newest, problems = latest_valid(trial.run_folder(name) / "checkpoints")
    assert newest is not None and problems == []
    # One that took too long may have come to its end while the process went to its own.
    assert newest.name in ("step-00000007", "step-00000009" if "not taken" in words else "")
    assert load_checkpoint(newest.with_name("step-00000007")).step == 7


def test_a_file_that_the_disk_does_not_take(trial: Trial) -> None:
    recipe = stopped_at_7(trial, "limited")
    before = contents(trial.run_folder("limited") / "checkpoints")
    sizes = {len(data) for name, data in before.items() if "00000007/" in name}
    for limit in (max(sizes) - 1, max(sizes) // 2):
        answer = trial.victims.train(recipe, watched=False, file_limit=limit)
        assert_refused(trial, "limited", answer, "the file would be larger than this disk")
        assert contents(trial.run_folder("limited") / "checkpoints") == before
    assert trial.victims.train(recipe, watched=False)["code"] == 0
    assert trial.differences("limited") == []


@pytest.mark.parametrize("part", ["", "checkpoints"])
def test_a_folder_that_may_not_be_written(trial: Trial, part: str) -> None:
    name = f"denied-{part}"
    recipe = stopped_at_7(trial, name)
    run = trial.run_folder(name)
    user = NOBODY if os.geteuid() == 0 else None  # for root, permissions refuse nothing
    for path in (run, *run.rglob("*")):
        if user is not None:
            os.chown(path, user, user)
    denied = run / part
    denied.chmod(0o555)
    for file in denied.glob(".lock"):
        file.chmod(0o444)
    answer = trial.victims.train(recipe, watched=False, user=user)
    denied.chmod(0o755)
    for file in denied.glob(".lock"):
        file.chmod(0o644)
    assert_refused(trial, name, answer, "ermission denied")
    assert str(run) in answer["log"]
    assert trial.victims.train(recipe, watched=False)["code"] == 0
    assert trial.differences(name) == []


def test_a_disk_that_takes_too_long(trial: Trial) -> None:
    recipe = stopped_at_7(trial, "slow")
    answer = trial.victims.train(recipe, watched=False, words=["--checkpoint.timeout_s", "0.0001"])
    assert_refused(trial, "slow", answer, "the disk has not taken it within 0.0001 s")
    assert trial.victims.train(recipe, watched=False)["code"] == 0
    assert trial.differences("slow") == []


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_and_one_that_has_become_read_only(trial: Trial) -> None:
    disk = trial.folder / "disk"
    size = sum(len(data) for data in contents(trial.whole / "checkpoints" / "step-00000012").values())
    recipe = trial.file("full", every=1, keep_last=99)
    on_disk = load_recipe(recipe)
    write_recipe(replace(on_disk, run=replace(on_disk.run, out=disk)), recipe)
    with small_disk(disk, kilobytes=size * 5 // 1024):
        answer = trial.victims.train(recipe, watched=False)
        assert answer["code"] == 4, answer["log"]
        assert "the disk is full: free space" in answer["log"] or "No space left" in answer["log"]
        newest, problems = latest_valid(disk / "full" / "checkpoints")
        assert newest is not None and problems == []
        before = contents(disk / "full" / "checkpoints")

        subprocess.run(["mount", "-o", f"remount,ro,size={size * 30 // 1024}k", disk], check=True)
        answer = trial.victims.train(recipe, watched=False)
        assert answer["code"] == 4 and "the file system is read-only" in answer["log"], answer["log"]
        assert contents(disk / "full" / "checkpoints") == before

        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert trial.victims.train(recipe, watched=False)["code"] == 0
        shutil.copytree(disk / "full", trial.run_folder("full"))
    assert trial.differences("full") == []
