"""The laboratory's methods in the trainer: each trains, resumes bit for bit, and does what its name says."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import relora.lab.methods  # noqa: F401
from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.cli.arguments import split_settings
from relora.errors import CheckpointError, ConfigError
from relora.train import fit as fit_module
from relora.train.evaluate import evaluate_path
from relora.train.fit import fit
from relora.train.recipe_io import load_recipe, recipe_toml, resolve
from relora.train.trainer import Trainer
from tiny_run import tiny_recipe

COLD = {"warm_start_steps": 0}
METHODS = {
    "full": {},
    "lora": {},
    "relora": {},
    "relora muon": {"optim": {"factor_optimizer": "muon", "rest_beta2": 0.9}},
    "relora muon transport": {
        "optim": {"factor_optimizer": "muon", "rest_lr_multiples": [0.5, 2.0, 1.0]},
        "relora": {
            "factors": "B",
            "reset": "transport",
            "residual": "muon",
            "residual_layers": 3,
            "scaling_rule": "learned",
        },
    },
    "lora muon": {"optim": {"factor_optimizer": "muon"}},
    "relora sign start": {"relora": {"warm_start_kind": "sign", "warm_start_scale": 0.5}},
    "lora column start": {"relora": {"warm_start_kind": "column"}, "optim": {"weight_decay": 0.1}},
    "relora muon start": {"relora": {"warm_start_kind": "muon", "warm_start_scale": 2.0}},
    "lora muon start": {
        "relora": {"warm_start_kind": "muon", "warm_start_scale": 2.0},
        "optim": {"weight_decay": 0.1},
    },
    "relora plateau": {
        "relora": {"warm_start_until": "plateau", "warm_start_steps": 9},
        "optim": {"lr": 1e-1},
    },
    "full-muon": {"method": {"adamw_lr": 2e-3}},
    "muon-in-place": {"method": {"adamw_lr": 2e-3}, "optim": {"weight_decay": 0.1}},
    "full-scale": {"method": {"adamw_lr": 5e-3}, "optim": {"lr": 2e-3}},
    "control": {},
    "galore": {"method": {"refresh_every": 3}},
    "galore cold randomised": {"method": {"refresh_every": 3, "projector": "randomised"}, "relora": COLD},
    "relora-online": {"method": {"merge_every": 2}, "relora": {"restart_every": 4}},
    "switchlora": {"method": {"interval": 4, "freeze_steps": 2}},
    "switchlora cold": {"method": {"interval": 4, "freeze_steps": 2}, "relora": COLD},
    "relora-as-published": {},
    "relora-as-published cold": {"relora": COLD},
}


ONE_PHASE = ("full", "full-muon", "muon-in-place", "full-scale", "control")
STOPS = [(name, 11) for name in METHODS]
STOPS += [(name, 5) for name in METHODS if name not in ONE_PHASE and "cold" not in name]
"""What dies after 11 steps goes on from the ninth, after 5 from the third, which lies before a switch."""


class Death(BaseException):
    """The process ends here."""


def tiny(tmp_path: Path, name: str, **more: dict):
    changes = {section: dict(fields) for section, fields in METHODS.get(name, {}).items()}
    for section, fields in more.items():
        changes[section] = {**changes.get(section, {}), **fields}
    run = {"method": name.split(" ", maxsplit=1)[0], **changes.pop("run", {})}
    return tiny_recipe(tmp_path, run=run, **changes)


def final(folder: Path) -> dict:
    return load_checkpoint(sorted((folder / "checkpoints").iterdir())[-1]).tensors


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def die_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    class Mortal(Trainer):
        def _step(self, number: int):
            if number == step:
                raise Death
            return super()._step(number)

    monkeypatch.setattr(fit_module, "Trainer", Mortal)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a tiny run once for all tests that look at it."""
    root = tmp_path_factory.mktemp("methods")
    done: dict[str, Path] = {}

    def finished(name: str) -> Path:
        if name not in done:
            done[name] = fit(tiny(root, name, run={"name": name.replace(" ", "-")})).folder
        return done[name]

    finished.root = root
    return finished


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(("name", "stop_at"), STOPS)
def test_resumed_run_equals_the_uninterrupted_one(train, tmp_path, monkeypatch, name, stop_at):
    whole = train(name)
    recipe = tiny(train.root, name, run={"name": whole.name, "out": str(tmp_path)})
    with monkeypatch.context() as patch:
        die_in_step(patch, stop_at)
        with pytest.raises(Death):
            fit(recipe)
    resumed = fit(recipe).folder
    mine, theirs = final(resumed), final(whole)
    assert mine.keys() == theirs.keys()
    for part in ("model", "optimizer", "rng"):
        assert mine[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][key]) for key, value in mine[part].items())
    for key in ("train/loss", "eval/loss", "lr", "phase"):
        left, right = (lines(folder / "metrics.jsonl") for folder in (resumed, whole))
        assert [line.get(key) for line in left] == [line.get(key) for line in right]
    assert summary_of(resumed)["method_facts"] == summary_of(whole)["method_facts"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_can_be_read_back(train, name):
    folder = train(name)
    losses = [line["train/loss"] for line in lines(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    measured = evaluate_path(folder)["eval/loss"]
    assert measured == pytest.approx(summary_of(folder)["eval/loss"], abs=1e-5)


def test_warm_starts_of_different_methods_are_the_same_bits(train):
    names = ("relora", "lora", "galore", "switchlora", "relora-as-published")
    starts = [load_checkpoint(train(name) / "checkpoints" / "step-00000004") for name in names]
    for part in ("model", "optimizer", "rng"):
        for other in starts[1:]:
            mine, theirs = starts[0].tensors[part], other.tensors[part]
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    states = [{k: v for k, v in start.state.items() if k not in ("progress", "recipe")} for start in starts]
    assert all(state == states[0] for state in states)


def test_control_has_the_trainable_count_of_relora(train):
    summary, relora = summary_of(train("control")), summary_of(train("relora"))
    assert summary["parameters_trainable"] == summary["parameters_total"]
    assert summary["parameters_total"] == pytest.approx(relora["parameters_trainable"], rel=0.02)
    assert summary["method_facts"]["wanted_parameters"] == relora["parameters_trainable"]


def test_online_merges_and_resets_by_periods_of_their_own(train):
    reports = lines(train("relora-online") / "restarts.jsonl")
    assert [report["step"] for report in reports] == [6, 8, 10]
    assert [bool(report["entries_zeroed"]) for report in reports] == [False, True, False]
    rates = [line["lr"] for line in lines(train("relora-online") / "metrics.jsonl")]
    assert [step for step, rate in enumerate(rates, start=1) if rate == 0] == [1, 5, 9]


def test_published_code_without_its_defects_is_relora_with_counts_reset(train, tmp_path):
    mended = tiny(train.root, "relora", relora={"reset_step_count": True}, run={"out": str(tmp_path)})
    none = tiny(
        train.root, "relora-as-published", method={"defects": []}, run={"out": str(tmp_path), "name": "none"}
    )
    mine, theirs = final(fit(none).folder), final(fit(mended).folder)
    for part in ("model", "optimizer"):
        assert all(torch.equal(value, theirs[part][key]) for key, value in mine[part].items())


@pytest.mark.parametrize(
    "defect",
    ["dead_first_cycle", "random_reset", "keep_step_count", "native_merge", "late_merge", "separate_masks"],
)
def test_each_defect_changes_the_run_and_is_seen_in_it(train, tmp_path, defect):
    reset = {"reset": "magnitude", "reset_ratio": 0.5}
    changes = {"relora": {**reset, "restart_every": 3}, "run": {"out": str(tmp_path)}}
    good = fit(tiny(train.root, "relora-as-published", method={"defects": []}, **changes)).folder
    changes["run"] = {"out": str(tmp_path), "name": defect}
    bad = fit(tiny(train.root, "relora-as-published", method={"defects": [defect]}, **changes)).folder
    assert summary_of(bad)["eval/loss"] != summary_of(good)["eval/loss"]
    first_bad, first_good = (lines(folder / "restarts.jsonl")[0] for folder in (bad, good))
    assert first_good["step"] == 7 and not first_good["unmoved_layers"]
    assert first_good["step_counts_reset"] == first_good["num_states"] / 2
    if defect == "dead_first_cycle":
        assert len(first_bad["unmoved_layers"]) == first_bad["num_layers"]
    elif defect == "random_reset":
        assert first_bad["entries_zeroed"] > 1.9 * first_good["entries_zeroed"]
    elif defect == "keep_step_count":
        assert first_bad["step_counts_reset"] == 0
    elif defect == "native_merge":
        assert first_bad["relative_merge_error"] > 100 * first_good["relative_merge_error"]
        weights = [v for k, v in final(bad)["model"].items() if k.endswith("q_proj.weight")]
        assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
    elif defect == "late_merge":
        assert first_bad["step"] == 8


def test_muon_holds_one_state_for_each_factor_and_its_restarts_say_so(train):
    by_adamw, by_muon = (lines(train(name) / "restarts.jsonl")[0] for name in ("relora", "relora muon"))
    assert by_muon["num_states"] * 2 == by_adamw["num_states"]
    assert by_muon["entries_zeroed"] * 2 == by_adamw["entries_zeroed"]
    carried = lines(train("relora muon transport") / "restarts.jsonl")[0]
    assert carried["entries_carried"] > 0
    keys = final(train("relora muon transport"))["optimizer"]
    assert {k.rpartition("/")[2] for k in keys if "lora_B" in k} == {"momentum_buffer"}
    assert {k.rpartition("/")[2] for k in keys if "scaling" in k} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", ["relora sign start", "lora column start"])
def test_a_warm_start_without_state_moves_the_targets_and_keeps_nothing_of_them(train, name):
    start = load_checkpoint(train(name) / "checkpoints" / "step-00000004").tensors
    usual = load_checkpoint(train("relora") / "checkpoints" / "step-00000004").tensors
    targets = {key for key in start["model"] if "_proj.weight" in key}
    assert start["model"].keys() == usual["model"].keys() and len(targets) == 14
    assert all(not torch.equal(start["model"][key], usual["model"][key]) for key in targets)
    stateful = {key.partition("/")[0] for key in start["optimizer"]}
    assert stateful.isdisjoint(targets) and "lm_head.weight" in stateful
    losses = [line["train/loss"] for line in lines(train(name) / "metrics.jsonl")]
    assert losses[3] < losses[0]


def test_a_warm_start_by_muon_is_muon_in_place_until_the_switch_which_frees_its_momenta(train, tmp_path):
    whole = train("relora muon start")
    recipe = tiny(train.root, "relora muon start")
    start = load_checkpoint(whole / "checkpoints" / "step-00000004")
    lr = recipe.optim.lr
    alone = tiny(
        train.root,
        "muon-in-place",
        run={"out": str(tmp_path)},
        optim={"lr": 2 * lr, "weight_decay": 0.0},  # there the rate's, here lr's whatever the scale
        method={"adamw_lr": lr},
        checkpoint={"every": 4, "keep_last": 9},
    )
    other = load_checkpoint(fit(alone).folder / "checkpoints" / "step-00000004")
    assert start.state["method"] == other.state["method"] == {"step": 4}
    for part in ("model", "optimizer"):
        mine, theirs = start.tensors[part], other.tensors[part]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    momenta = [key for key in start.tensors["optimizer"] if key.endswith("/momentum")]
    assert len(momenta) == 14
    assert all(start.tensors["optimizer"][key].dtype == torch.bfloat16 for key in momenta)
    kept = final(whole)["optimizer"]
    assert not [key for key in kept if key.endswith("/momentum")]
    assert {"lm_head.weight/exp_avg", "lm_head.weight/step"} <= kept.keys()
    assert kept["lm_head.weight/step"] == 12  # AdamW's memory of the rest goes on


@pytest.mark.parametrize("name", ["relora muon start", "relora muon transport", "muon-in-place", "relora"])
def test_every_line_says_what_moved_without_a_gradient_of_autograds(train, name):
    effects = {"low_rank": "complement", "warm_start": "in_place", "full": "in_place"}
    expected = {"relora muon start": {"warm_start"}, "relora muon transport": {"low_rank"}, "relora": set()}
    for line in lines(train(name) / "metrics.jsonl"):
        found = {key: value for key, value in line.items() if key.endswith("/moved_fraction")}
        if line["phase"] not in expected.get(name, {"full"}):
            assert not found
            continue
        effect = effects[line["phase"]]
        does_move = line["lr"] > 0  # the first step of a warm-up or a re-warm does not
        assert found == {f"{effect}/moved_fraction": pytest.approx(float(does_move), abs=0.05)}
        assert (line[f"{effect}/step_rms"] > 0) == does_move and line[f"{effect}/num_non_finite"] == 0


def test_a_step_in_place_that_moves_nothing_is_told(tmp_path, capsys):
    fit(tiny(tmp_path, "muon-in-place", optim={"lr": 1e-30, "weight_decay": 0.0}, train={"steps": 3}))
    assert "step 2 has moved no weight in place" in capsys.readouterr().err


def test_a_plateau_ends_the_warm_start_is_recorded_and_taken_alike_on_resume(train, tmp_path, monkeypatch):
    whole = train("relora plateau")
    switch = summary_of(whole)["switch"]
    assert switch["step"] == 8 and 0 <= switch["steepness"] < 0.5
    told = {line["step"]: line.get("warm_start/steepness") for line in lines(whole / "metrics.jsonl")}
    assert told == {**dict.fromkeys(range(1, 13)), 8: switch["steepness"]}
    assert [line["step"] for line in lines(whole / "restarts.jsonl")] == [10]
    # The checkpoint of the switch itself: the next step is the first at low rank.
    recipe = tiny(train.root, "relora plateau", run={"name": whole.name, "out": str(tmp_path)})
    with monkeypatch.context() as patch:
        die_in_step(patch, 9)
        with pytest.raises(Death):
            fit(recipe)
    mine, theirs = final(fit(recipe).folder), final(whole)
    for part in ("model", "optimizer", "rng"):
        assert all(torch.equal(value, theirs[part][key]) for key, value in mine[part].items())


def test_switched_vectors_are_counted(train):
    facts = summary_of(train("switchlora"))["method_facts"]
    assert 0 < facts["vectors_switched"] < 14 * 3 * 8


@pytest.mark.parametrize(
    ("method", "changes", "complaint"),
    [
        ("galor", {}, r'run\.method must be one of "full", .*"galore"'),
        ("full", {"method": {"refresh_every": 3}}, r"method\.refresh_every is not a known key"),
        ("galore", {"method": {"refresh_evry": 3}}, r"did you mean 'refresh_every'"),
        ("galore", {"method": {"refresh_every": 0, "scale": 0.0}}, r"has 2 problems"),
        ("switchlora", {"relora": {"factors": "B"}}, r'relora\.factors must be "both"'),
        ("relora-as-published", {"relora": {"reset_step_count": True}}, r"decided by the defect"),
        (
            "relora-online",
            {"relora": {"factors": "B", "residual": "sign", "init": "gradient", "reset": "transport"}},
            r"has 3 problems(?s:.*)residual must not be 'sign'(?s:.*)init must not(?s:.*)reset must not",
        ),
        ("switchlora", {"relora": {"base_weight_decay": 0.1}}, r"base_weight_decay must not be 0\.1"),
        ("relora-as-published", {"method": {"defects": ["late"]}}, r'one of "dead_first_cycle"'),
    ],
)
def test_wrong_settings_of_a_method_are_named(tmp_path, method, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        tiny_recipe(tmp_path, run={"method": method}, **changes)


def test_settings_of_a_method_are_read_from_the_command_line():
    words = ["--run.method", "relora-as-published", "--relora.rank", "3"]
    words += ["--method.defects", "late_merge", "native_merge"]
    others, overrides = split_settings([*words, "--method.refresh_every=7"])
    assert others == [] and overrides["method"].pop("refresh_every") == 7
    relora = {"factors": "both", "residual": "none", "reset": "zero", "warm_start_kind": "adamw"}
    recipe = load_recipe("quickstart", {**overrides, "relora": relora})
    assert recipe.options.defects == ("late_merge", "native_merge")
    assert resolve(tomllib.loads(recipe_toml(recipe))) == recipe


def test_another_method_on_top_of_a_recipe_leaves_the_first_ones_settings_behind(tmp_path):
    first = tomllib.loads(recipe_toml(tiny(tmp_path, "galore")))
    assert first["method"]["refresh_every"] == 3
    assert resolve(first, {"run": {"method": "lora"}}).run.method == "lora"
    assert resolve(first, {"run": {"method": "galore"}}).options.refresh_every == 3


def test_checkpoint_of_an_earlier_version_is_refused_in_words(train, tmp_path):
    whole = train("relora")
    recipe = tiny(train.root, "relora", run={"name": whole.name, "out": str(tmp_path)})
    fit(recipe)
    folder = recipe.run.folder
    (folder / "summary.json").unlink()
    last = load_checkpoint(folder / "checkpoints" / "step-00000012")
    state = {key: value for key, value in last.state.items() if key != "method"}
    shutil.rmtree(folder / "checkpoints")
    save_checkpoint(folder / "checkpoints", step=9, tensors=last.tensors, state=state, description={})
    with pytest.raises(CheckpointError, match="method is missing"):
        fit(recipe)
