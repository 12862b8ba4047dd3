"""A run's folder that has lost its checkpoints: nothing in it is overwritten without --overwrite."""

import shutil
from pathlib import Path

import pytest

from relora.errors import CheckpointError
from relora.train.config import Recipe
from relora.train.fit import fit
from tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 7 steps."""
    home = tmp_path_factory.mktemp("home")
    fit(recipe_in(home))
    return home


def recipe_in(home: Path, out: str = "runs") -> Recipe:
    return tiny_recipe(home, run={"out": str(home / out)}, train={"steps": 7})


def copied(home: Path, out: str) -> Path:
    return Path(shutil.copytree(home / "runs" / "tiny", home / out / "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a run's files hold, but for its recipe, whose run.out may change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "recipe.toml"}


@pytest.mark.parametrize("forked", [False, True])
def test_finished_run_without_checkpoints_stays_finished(home: Path, forked: bool) -> None:
    """As a user leaves it who frees the disk, or the laboratory its cells, some of which began as forks."""
    run = copied(home, f"freed-{forked}")
    shutil.rmtree(run / "checkpoints")
    if forked:
        (run / "forked_from.json").write_text('{"run": "runs/first", "checkpoint": "step-00000004"}')
    before = contents(run)
    result = fit(recipe_in(home, run.parent.name))
    assert result.was_finished and result.summary["steps"] == 7
    assert contents(run) == before


def test_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_unasked(home: Path) -> None:
    run = copied(home, "damaged")
    for weights in run.glob("checkpoints/step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    for _ in range(2):  # as finished as it says it is, and as one that was on its way
        before = contents(run)
        with pytest.raises(CheckpointError, match=r"none of them valid: step-00000007: .*--overwrite"):
            fit(recipe_in(home, run.parent.name))
        assert contents(run) == before
        (run / "summary.json").unlink(missing_ok=True)
    assert fit(recipe_in(home, run.parent.name), overwrite=True).summary["steps"] == 7


@pytest.mark.parametrize("summary", ['{"method": "rel', '{"steps": 5}'])
def test_logs_beside_a_summary_that_says_nothing_are_kept(home: Path, summary: str) -> None:
    run = copied(home, f"unclear-{len(summary)}")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").write_text(summary)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint, and a summary\.json .*--overwrite"):
        fit(recipe_in(home, run.parent.name))
    assert contents(run) == before
