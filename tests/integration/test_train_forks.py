"""Forks: what may change, what may not, and that nothing is lost or left behind where one is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import relora.lab.methods  # noqa: F401 - makes them known
from relora.errors import CheckpointError, ConfigError, DataError
from relora.train.fit import fit
from relora.train.forking import fork_violations
from relora.train.methods import MethodOptions
from relora.train.recipe_io import changed_fields
from relora.train.run_folder import settings
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
        ({"optim": {"factor_optimizer": "muon"}}, "holds factors, which decide optim.factor_optimizer"),
        ({"model": {"hidden_size": 48}}, "leave out model.hidden_size"),
        ({"train": {"steps": 16, "batch_size": 4}}, r"read some twice .*leave out train\.batch_size"),
        ({"data": {"seq_len": 8}}, r"read some twice .*leave out data\.seq_len"),
        ({"data": {"heldout_fraction": 0.3}}, r"same text; leave out data\.heldout_fraction"),
        ({"data": {"vocab_size": 310}}, r"same text; leave out data\.vocab_size"),
        ({"optim": {"rest_lr_multiples": [2.0, 1.0, 1.0]}}, r"leave out optim\.rest_lr_multiples"),
        (
            {"run": {"name": "full", "method": "full"}, "optim": {"rest_beta2": 0.9}},
            r"holds the optimizer's groups.*leave out optim\.rest_beta2",
        ),
        (
            {"run": {"name": "full", "method": "full-muon"}},
            r"at full rank step-00000012 was trained by adamw.*those of full-muon; leave out run\.method",
        ),
        (
            {
                "run": {"name": "full", "method": "relora"},
                "relora": {"warm_start_kind": "sign", "warm_start_steps": 12},
            },
            r"those of steps without state; leave out run\.method, relora\.warm_start_kind",
        ),
        (
            {
                "run": {"name": "full", "method": "relora"},
                "relora": {"warm_start_kind": "muon", "warm_start_steps": 12},
            },
            r"those of Muon in place; leave out run\.method, relora\.warm_start_kind",
        ),
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


@pytest.mark.parametrize(
    ("change", "error", "wanted"),
    [
        ({"path": "no/such/text"}, DataError, "no/such/text"),
        ({"max_documents": 100}, CheckpointError, "data of this run has changed since step 12"),
    ],
)
def test_fork_that_is_refused_where_its_text_is_opened_leaves_nothing_and_the_mended_one_begins(
    home: Path, change: dict[str, object], error: type[Exception], wanted: str
) -> None:
    before = files(home / "runs")
    name = next(iter(change))
    with pytest.raises(error, match=wanted):
        fit(tiny_recipe(home, train={"steps": 14}, data=change), fork=name)
    assert files(home / "runs") == before and not (home / "runs" / name).exists()
    assert fit(tiny_recipe(home, train={"steps": 14}), fork=name).summary["steps"] == 14


@pytest.mark.parametrize(
    ("run", "old", "new", "is_free"),
    [
        ("full", {"rest_lr_multiples": [2.0, 2.0, 1.0]}, {"rest_lr_multiples": [3.0, 3.0, 0.5]}, True),
        ("full", {"rest_lr_multiples": [2.0, 2.0, 1.0]}, {"rest_lr_multiples": [1.0, 1.0, 1.0]}, False),
        ("tiny", {"rest_lr_multiples": [2.0, 2.0, 1.0]}, {"rest_lr_multiples": [1.0, 1.0, 1.0]}, True),
        ("tiny", {"rest_beta2": 0.9}, {"rest_beta2": None}, True),
        ("full", {"rest_beta2": 0.9}, {"rest_beta2": 0.99}, True),
        ("full", {"factor_optimizer": "muon"}, {"factor_optimizer": "adamw"}, True),
    ],
)
def test_multiples_may_change_where_they_leave_the_groups_as_they_are(
    home: Path, run: str, old: dict[str, object], new: dict[str, object], is_free: bool
) -> None:
    changes = {"run": {"name": run, "method": "full" if run == "full" else "relora"}, "train": {"steps": 16}}
    before, wanted = (tiny_recipe(home, optim=optim, **changes) for optim in (old, new))
    checkpoint = home / "runs" / run / "checkpoints" / "step-00000012"
    assert (fork_violations(before, wanted, checkpoint) == []) == is_free


def test_settings_of_a_method_count_and_stay_once_it_is_at_work(home: Path) -> None:
    before, wanted = (
        tiny_recipe(home, run={"method": "galore"}, method={"refresh_every": every}, train={"steps": 16})
        for every in (3, 5)
    )
    assert settings(before)["method.refresh_every"] == 3
    root = home / "runs" / "tiny" / "checkpoints"
    (violation,) = fork_violations(before, wanted, root / "step-00000012")
    assert "decide method.refresh_every" in violation
    assert fork_violations(before, wanted, root / "step-00000003") == []
    by_hand = replace(before, method=MethodOptions())  # in force are the defaults
    assert changed_fields(before, by_hand) == {"method.refresh_every": (3, 200)}


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


def test_muon_in_place_can_switch_where_it_is_forked_but_not_to_other_matrices(home: Path) -> None:
    muon = {"run": {"name": "muon", "method": "muon-in-place"}, "train": {"steps": 8}}
    fit(tiny_recipe(home, **muon, optim={"lr": 4e-3}, method={"adamw_lr": 2e-3}))
    relora = {"warm_start_steps": 9, "warm_start_kind": "muon", "warm_start_scale": 2.0}
    wanted = {"run": {"name": "muon", "method": "relora"}, "relora": relora, "optim": {"lr": 2e-3}}
    longer = {"train": {"steps": 14}, "schedule": {"rewarmup_steps": 0}}
    other = {**wanted, "relora": {**relora, "targets": ("q_proj", "up_proj")}}
    with pytest.raises(ConfigError, match=r"which matrices step in place stays .*leave out relora\.targets"):
        fit(tiny_recipe(home, **other, **longer), fork="switched-muon")
    summary = fit(tiny_recipe(home, **wanted, **longer), fork="switched-muon").summary
    assert summary["switch"]["step"] == 9 and summary["restarts"] >= 1


def test_reset_dropout_and_multiples_may_change_with_factors_in_place(home: Path) -> None:
    recipe = tiny_recipe(
        home,
        relora={"reset": "zero", "dropout": 0.1},
        optim={"rest_lr_multiples": [2.0, 2.0, 0.5]},
        train={"steps": 15},
    )
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
