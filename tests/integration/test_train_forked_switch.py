"""Forks and the switch: where it falls, what is known of it, and what of the run before goes along."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from relora.train.config import Recipe
from relora.train.export import export_run
from relora.train.fit import fit
from relora.train.trainer import Trainer
from tiny_run import tiny_recipe

PLATEAU = {"warm_start_until": "plateau", "warm_start_steps": 9}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose loss ends its warm start at step 8, and a copy that is there still."""
    home = tmp_path_factory.mktemp("home")
    finished = fit(plateau_recipe(home)).folder
    assert json.loads((finished / "summary.json").read_text())["switch"]["step"] == 8
    there = Path(shutil.copytree(finished, home / "there" / "plateau"))
    (there / "summary.json").unlink()
    for step in (9, 12):
        shutil.rmtree(there / "checkpoints" / f"step-{step:08d}")
    return home


def plateau_recipe(home: Path, **changes: Mapping[str, object]) -> Recipe:
    run = {"name": "plateau", **changes.pop("run", {})}
    relora = {**PLATEAU, **changes.pop("relora", {})}
    return tiny_recipe(home, run=run, relora=relora, optim={"lr": 1e-1}, **changes)


def values_of(path: Path, key: str) -> list[object]:
    return [json.loads(line).get(key) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "relora", "switch"),
    [
        ("later", {"warm_start_until": "steps", "warm_start_steps": 11}, 11),
        ("longest", {"warm_start_steps": 11}, 11),  # five windows of another rule have not passed
        ("same", {}, 8),
    ],
)
def test_fork_ends_the_warm_start_by_its_own_rule(
    home: Path, name: str, relora: dict[str, object], switch: int
) -> None:
    run = {"out": str(home / "there")}
    result = fit(plateau_recipe(home, run=run, relora=relora, train={"steps": 15}), fork=name)
    phases = values_of(result.folder / "metrics.jsonl", "phase")
    assert phases == ["warm_start"] * switch + ["low_rank"] * (15 - switch)
    assert result.summary["switch"]["step"] == switch and result.summary["ranks"] is not None
    assert ("steepness" in result.summary["switch"]) == (name == "same")


def test_fork_to_full_rank_has_no_switch(home: Path) -> None:
    run = {"out": str(home / "there"), "method": "full"}
    result = fit(plateau_recipe(home, run=run, train={"steps": 10}), fork="full")
    assert result.summary["switch"] is None and result.summary["steps"] == 10


def test_fork_keeps_the_switch_where_the_loss_has_put_it(home: Path) -> None:
    result = fit(plateau_recipe(home, train={"steps": 14}), fork="longer")
    assert (result.folder / "checkpoints" / "step-00000008").is_dir()
    assert result.summary["switch"]["step"] == 8 and result.summary["ranks"]["learned"] > 0


def test_switch_at_the_first_step_of_a_fork_is_measured(home: Path) -> None:
    """Full rank was not evaluated at step 6, where its fork switches."""
    full = {"run": {"name": "full", "method": "full"}, "eval": {"every": 5}}
    fit(tiny_recipe(home, train={"steps": 7}, **full))
    shutil.rmtree(home / "runs" / "full" / "checkpoints" / "step-00000007")
    at_6 = {"run": {"name": "full"}, "relora": {"warm_start_steps": 6}, "train": {"steps": 12}}
    result = fit(tiny_recipe(home, **at_6), fork="switched")
    switch, losses = result.summary["switch"], values_of(result.folder / "metrics.jsonl", "eval/loss")
    assert switch["step"] == 6 and losses[4] is not None and losses[5] is None
    assert 0 < switch["eval/loss"] < 6 and result.summary["ranks"] is not None


def test_restart_that_a_killed_fork_caught_up_is_told_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has a restart after step 12 only where it goes on, and the fork dies before its first save."""
    recipe = plateau_recipe(home, train={"steps": 15})

    class Death(BaseException):
        """The process ends here."""

    def dying(self: Trainer, step: int) -> tuple[bool, ...]:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        with pytest.raises(Death):
            fit(recipe, fork="killed")
    told = home / "runs" / "killed" / "restarts.jsonl"
    assert values_of(told, "step") == [10, 12]
    fit(recipe, fork="killed")
    assert values_of(told, "step") == [10, 12]


def test_card_counts_the_tokens_that_the_checkpoint_counted(home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(home / "runs" / "plateau", tmp_path / "plateau"))
    recipe = (run / "recipe.toml").read_text()
    # As in a fork of an earlier version, which could change its batch on the way.
    (run / "recipe.toml").write_text(recipe.replace("batch_size = 8", "batch_size = 16"))
    card = (export_run(run, tmp_path / "exported", step=6) / "README.md").read_text()
    assert f"| tokens | {6 * 8 * 16} |" in card
