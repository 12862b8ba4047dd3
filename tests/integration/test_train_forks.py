"""Forks: what may change, what may not, and that nothing is lost or left behind where one is refused."""

import shutil
from pathlib import Path

import pytest

from relora.errors import ConfigError
from relora.train.fit import fit
from tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of 12 steps: "tiny", switched after 4, and "full"."""
    home = tmp_path_factory.mktemp("home")
    fit(tiny_recipe(home))
    fit(tiny_recipe(home, run={"name": "full", "method": "full"}))
    return home


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.startswith(".")}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"train": {"steps": 11}}, "must be longer than the 12 steps it has behind it, not 11"),
        ({"train": {"steps": 12}}, "must be longer than the 12 steps"),
        ({"run": {"method": "full"}}, "holds factors, which decide run.method"),
        ({"run": {"method": "lora"}}, "holds factors, which decide run.method"),
        ({"run": {"seed": 3}}, "holds factors, which decide run.seed"),
        ({"relora": {"rank": 4, "alpha": 2.0}}, "holds factors, which decide relora.rank, relora.alpha"),
        ({"relora": {"factors": "B"}}, "holds factors, which decide relora.factors"),
        ({"relora": {"warm_start_steps": 6}}, "holds factors, which decide relora.warm_start_steps"),
        ({"relora": {"restart_every": 3}}, "holds factors, which decide relora.restart_every"),
        ({"model": {"hidden_size": 48}}, "leave out model.hidden_size"),
        (
            {"run": {"name": "full", "method": "relora"}, "relora": {"warm_start_steps": 4}},
            "relora.warm_start_steps must be at least the 12 steps that step-00000012 trained at full rank",
        ),
    ],
)
def test_fork_that_its_checkpoint_cannot_go_on_with_is_refused_and_leaves_nothing(
    home: Path, changes: dict[str, dict[str, object]], wanted: str
) -> None:
    before = files(home / "runs")
    with pytest.raises(ConfigError, match=wanted):
        fit(tiny_recipe(home, **{"train": {"steps": 16}, **changes}), fork="other")
    assert files(home / "runs") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_fork_of_the_run_s_own_name_is_refused_and_the_run_stays(home: Path, overwrite: bool) -> None:
    before = files(home / "runs")
    with pytest.raises(ConfigError, match="name of its own"):
        fit(tiny_recipe(home, train={"steps": 16}), fork="tiny", overwrite=overwrite)
    assert files(home / "runs") == before


def test_full_rank_run_can_switch_where_it_is_forked(home: Path) -> None:
    recipe = tiny_recipe(
        home,
        run={"name": "full", "method": "relora"},
        relora={"warm_start_steps": 12},
        train={"steps": 18},
    )
    summary = fit(recipe, fork="switched").summary
    assert (summary["method"], summary["steps"], summary["restarts"]) == ("relora", 18, 2)


def test_reset_and_dropout_may_change_with_factors_in_place(home: Path) -> None:
    recipe = tiny_recipe(home, relora={"reset": "zero", "dropout": 0.1}, train={"steps": 15})
    assert fit(recipe, fork="reset").summary["steps"] == 15


def test_the_same_fork_again_goes_on_where_it_stands(home: Path) -> None:
    recipe = tiny_recipe(home, train={"steps": 16})
    begun = fit(recipe, fork="again")
    newest = begun.folder / "checkpoints" / "step-00000016"
    shutil.rmtree(newest)  # as if it had been killed before its last save
    again = fit(recipe, fork="again")
    assert again.folder == begun.folder and newest.is_dir()
    assert again.summary["eval/loss"] == begun.summary["eval/loss"]
    with pytest.raises(ConfigError, match=r"train\.steps was 16, is 18"):
        fit(tiny_recipe(home, train={"steps": 18}), fork="again")
    with pytest.raises(ConfigError, match="exists"):  # a run, but no fork of this one
        fit(recipe, fork="full")
