"""A run from text to an exported model: what it writes, and that stopping it changes nothing."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora import ReLoRAConfig, inject
from relora.checkpoint.lock import folder_lock
from relora.checkpoint.store import load_checkpoint
from relora.cli.main import main
from relora.errors import CheckpointError, ConfigError, NonFiniteError
from relora.train.evaluate import evaluate_path
from relora.train.export import export_run
from relora.train.fit import fit
from relora.train.generate import generate_from
from relora.train.inspect import inspect_run
from relora.train.saved import load_saved
from tiny_run import tiny_recipe


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(sorted((folder / "checkpoints").iterdir())[-1])
    return {**checkpoint.tensors["model"], **checkpoint.tensors["optimizer"]}


def assert_same_run(folder: Path, other: Path) -> None:
    mine, theirs = final_tensors(folder), final_tensors(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    deterministic = ("step", "tokens", "train/loss", "lr", "grad_norm", "eval/loss", "restart_index", "phase")
    for left, right in zip(records(folder / "metrics.jsonl"), records(other / "metrics.jsonl"), strict=True):
        assert [left.get(key) for key in deterministic] == [right.get(key) for key in deterministic]
    assert records(folder / "restarts.jsonl") == records(other / "restarts.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(tmp_path_factory.mktemp("finished"))
    result = fit(recipe)
    assert result.exit_code == 0
    return result.folder


def test_run_folder_holds_what_the_contract_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"recipe.toml", "metrics.jsonl", "restarts.jsonl", "checkpoints", "summary.json"} <= names
    assert (finished / "checkpoints" / "step-00000012").is_dir()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 16 and summary["restarts"] == 3
    assert summary["parameters_trainable"] < summary["parameters_total"]
    assert summary["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert math.exp(summary["eval/loss"]) == pytest.approx(summary["eval/perplexity"])
    assert summary["eval/perplexity"] < 300 and summary["switch"]["step"] == 4


def test_phases_restarts_and_learning_rate_follow_the_calendar(finished: Path) -> None:
    lines = records(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["phase"] for line in lines] == ["warm_start"] * 4 + ["low_rank"] * 8
    assert [report["step"] for report in records(finished / "restarts.jsonl")] == [6, 8, 10]
    zero = [line["step"] for line in lines if line["lr"] == 0]
    assert zero == [1, 5, 7, 9, 11]  # the update after the start, the switch, and every restart


def test_each_restart_says_what_became_of_the_loss(finished: Path) -> None:
    losses = [line["train/loss"] for line in records(finished / "metrics.jsonl")]
    for report in records(finished / "restarts.jsonl"):
        step = report["step"]  # the cycle has 2 steps, the first of which is the re-warm
        assert report["loss_before"] == losses[step - 1] and report["loss_after"] == losses[step + 1]
        assert report["hurt"] is None


def test_learned_rank_passes_the_rank_of_one_cycle(finished: Path) -> None:
    ranks = json.loads((finished / "summary.json").read_text())["ranks"]
    assert ranks["one_cycle"] == 3
    assert ranks["learned"] == 12  # four cycles of rank 3


def test_loss_falls(finished: Path) -> None:
    losses = [line["train/loss"] for line in records(finished / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("stop_at", [3, 4, 5, 6, 7, 9, 11])
def test_resumed_run_equals_the_uninterrupted_one(finished: Path, tmp_path: Path, stop_at: int) -> None:
    """A run that dies after `stop_at` steps leaves its newest checkpoint, at 3, 4, 6 or 9, to go on from."""
    recipe = tiny_recipe(finished.parent.parent, run={"out": str(tmp_path)})
    with pytest.raises(_Death):
        _fit_until(recipe, stop_at)
    result = fit(recipe)
    assert result.exit_code == 0
    assert_same_run(result.folder, finished)


def test_cold_run_that_dies_at_once_begins_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, relora={"warm_start_steps": 0}, train={"steps": 5})
    with pytest.raises(_Death):
        _fit_until(recipe, 1)
    assert fit(recipe).summary["steps"] == 5


def test_finished_run_is_left_as_it_is(finished: Path) -> None:
    before = final_tensors(finished)
    result = fit(tiny_recipe(finished.parent.parent))
    assert result.was_finished and result.summary["steps"] == 12
    assert all(torch.equal(value, before[name]) for name, value in final_tensors(finished).items())


def test_another_recipe_is_refused_and_named(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.005, is 0\.001.*--fork"):
        fit(tiny_recipe(finished.parent.parent, optim={"lr": 1e-3}))


def test_evaluation_and_logging_may_change_on_resume(finished: Path) -> None:
    assert fit(tiny_recipe(finished.parent.parent, eval={"every": 3}, log={"every": 2})).was_finished


def test_fork_goes_on_with_a_changed_recipe(finished: Path) -> None:
    recipe = tiny_recipe(finished.parent.parent, train={"steps": 14}, optim={"lr": 1e-3})
    result = fit(recipe, fork="longer")
    lines = records(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[-1]["lr"] < 2e-4 and result.summary["restarts"] == 4


def test_export_loads_in_stock_transformers_with_the_same_logits(finished: Path, tmp_path: Path) -> None:
    out = export_run(finished, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = torch.tensor([tokenizer("def value index for while")["input_ids"]])
    saved = load_saved(finished).model
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, saved(tokens).logits, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_evaluated_run_and_its_export_agree_with_the_summary(finished: Path, tmp_path: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    of_run = evaluate_path(finished)
    assert of_run["eval/loss"] == pytest.approx(summary["eval/loss"], abs=1e-5)
    data = vars(load_saved(finished).recipe.data) | {"tokenizer": str(finished / "tokenizer")}
    out = export_run(finished, tmp_path / "exported")
    of_export = evaluate_path(out, data=data | {"tokenizer": str(out)}, sequences=8)
    assert of_export["eval/loss"] == pytest.approx(summary["eval/loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("data", "field"),
    [({"heldout_fraction": 0.5}, "heldout_fraction"), ({"document": "line"}, "document")],
)
def test_training_text_is_not_measured_as_held_out(finished: Path, data: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{field} must be the run's own, .* training text"):
        evaluate_path(finished, data=data)
    assert evaluate_path(finished, data={"heldout_fraction": 0.1}, sequences=2)["tokens_measured"] > 0


def test_a_run_is_measured_on_text_of_another_source(finished: Path) -> None:
    result = evaluate_path(finished, data={"source": "python-stdlib", "max_documents": 40}, sequences=4)
    assert result["tokens_measured"] == 60


def test_memory_that_runs_out_at_the_switch_is_said_in_words(tmp_path: Path, monkeypatch) -> None:
    def no_room(state: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr("relora.train.trainer.at_low_rank", no_room)
    with pytest.raises(ConfigError, match=r"the switch to low rank: the memory .* 2\.00 GiB failed"):
        fit(tiny_recipe(tmp_path))


def test_generation_is_a_function_of_its_seed(finished: Path) -> None:
    texts = [generate_from(finished, prompt="def", max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert texts[0].startswith("def") and texts[0] == texts[1] != texts[2]


def test_inspection_tells_the_state_of_every_checkpoint(tmp_path: Path, capsys) -> None:
    folder = fit(tiny_recipe(tmp_path, run={"method": "lora"}, train={"steps": 7})).folder
    assert main(["inspect", str(folder), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["newest_valid_checkpoint"] == "step-00000007" and result["num_damaged"] == 0
    assert set(result["checkpoints"].values()) == {"valid"} and result["in_use_by"] is None

    flipped = folder / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(bytes(data))
    cut = folder / "checkpoints" / "step-00000007" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / "checkpoints" / ".step-00000009.0123456789abcdef.tmp").mkdir()
    sizes = inspect_run(folder)
    assert sizes["num_damaged"] == 1 and sizes["newest_valid_checkpoint"] == "step-00000006"
    assert "--verify" in sizes["checkpoints"]["step-00000006"]
    assert main(["inspect", str(folder), "--verify"]) == 4
    assert "optimizer.safetensors should have sha256" in capsys.readouterr().out
    verified = inspect_run(folder, verify=True)
    assert verified["num_damaged"] == 2 and verified["newest_valid_checkpoint"] == "step-00000004"
    assert verified["unfinished_saves"] == [".step-00000009.0123456789abcdef.tmp"]
    with folder_lock(folder, doing="training"):
        assert f"process {os.getpid()} on" in inspect_run(folder)["in_use_by"]


def test_a_damaged_end_is_trained_again(tmp_path: Path, capsys) -> None:
    recipe = tiny_recipe(tmp_path, run={"method": "lora"}, train={"steps": 7})
    folder = fit(recipe).folder
    before = final_tensors(folder)
    weights = folder / "checkpoints" / "step-00000007" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = fit(recipe)
    said = capsys.readouterr().err
    assert "step-00000007: model.safetensors should have" in said and "from step-00000006" in said
    assert not result.was_finished and result.summary["steps"] == 7
    assert all(torch.equal(value, before[name]) for name, value in final_tensors(folder).items())


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 7})
    other = fit(tiny_recipe(tmp_path, run={"name": "other"}, train={"steps": 7}, optim={"lr": 1e-3})).folder
    with pytest.raises(_Death):
        _fit_until(recipe, 3)
    shutil.copytree(
        other / "checkpoints" / "step-00000006", recipe.run.folder / "checkpoints" / "step-00000006"
    )
    with pytest.raises(CheckpointError, match=r"other settings: optim\.lr 0\.001 \(here 0\.005\)"):
        fit(recipe)


def test_lines_that_metrics_lost_are_missed(tmp_path: Path, capsys) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 7})
    with pytest.raises(_Death):
        _fit_until(recipe, 6)
    log = recipe.run.folder / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    fit(recipe)
    assert "metrics.jsonl has lost lines: its last is not of step 6" in capsys.readouterr().err


def test_the_manifest_says_what_the_checkpoint_is_of(finished: Path) -> None:
    manifests = [
        json.loads((path / "manifest.json").read_text())
        for path in sorted((finished / "checkpoints").iterdir())
        if path.name.startswith("step-")
    ]
    assert [manifest["step"] for manifest in manifests] == [3, 4, 6, 9, 12]
    assert [manifest["restart_index"] for manifest in manifests] == [0, 0, 1, 2, 3]
    assert [manifest["phase"] for manifest in manifests] == ["warm_start"] * 2 + ["low_rank"] * 3
    assert len({manifest["recipe_sha256"] for manifest in manifests}) == 1
    for manifest in manifests:
        assert len(manifest["recipe_sha256"]) == len(manifest["data_fingerprint"]) == 64
        assert manifest["versions"]["torch"] == torch.__version__ and manifest["format_version"] == 1
        assert set(manifest["files"]) == {
            "state.json",
            "model.safetensors",
            "optimizer.safetensors",
            "rng.safetensors",
        }


@pytest.mark.parametrize("method", ["full", "lora", "relora"])
def test_every_method_trains_cold_or_warm(tmp_path: Path, method: str) -> None:
    recipe = tiny_recipe(tmp_path, run={"method": method}, relora={"warm_start_steps": 0, "factors": "B"})
    result = fit(recipe)
    assert result.summary["restarts"] == (5 if method == "relora" else 0)
    phases = {line["phase"] for line in records(result.folder / "metrics.jsonl")}
    assert phases == {"full" if method == "full" else "low_rank"}


def test_run_starts_from_a_hugging_face_folder(finished: Path, tmp_path: Path) -> None:
    out = export_run(finished, tmp_path / "exported")
    recipe = tiny_recipe(
        finished.parent.parent,
        run={"out": str(tmp_path / "runs")},
        model={"init_from": str(out)},
        data={"tokenizer": str(out)},
        relora={"warm_start_steps": 0},
        train={"steps": 4},
    )
    first = records(fit(recipe).folder / "metrics.jsonl")[0]
    summary = json.loads((finished / "summary.json").read_text())
    assert first["train/loss"] == pytest.approx(summary["eval/loss"], abs=0.5)


def test_folder_saved_with_its_factors_is_refused(finished: Path, tmp_path: Path) -> None:
    model = load_saved(finished).model
    inject(model, ReLoRAConfig(rank=3))
    model.save_pretrained(tmp_path / "unfolded")
    with pytest.raises(ConfigError, match="holds low-rank factors"):
        load_saved(tmp_path / "unfolded")


def test_non_finite_loss_stops_the_run_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, optim={"lr": 1e30, "clip_grad_norm": 0.0}, schedule={"warmup_steps": 3})
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        fit(recipe)


def test_changed_data_is_refused_on_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(_Death):
        _fit_until(recipe, 7)
    (tmp_path / "text" / "document-999.txt").write_text("another document that changes the data\n" * 9)
    with pytest.raises(CheckpointError, match="data of this run has changed"):
        fit(recipe)


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.run.folder.mkdir(parents=True)
    (recipe.run.folder / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not a run"):
            fit(recipe, overwrite=overwrite)
    assert (recipe.run.folder / "thesis.tex").read_text() == "precious"


def test_a_run_of_one_cycle_says_that_nothing_restarts(tmp_path: Path, capfd) -> None:
    fit(tiny_recipe(tmp_path, train={"steps": 6}))
    assert "no restarts: the low-rank phase is one cycle, which trains as LoRA does" in capfd.readouterr().err


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"steps": 6})
    fit(recipe)
    changed = replace(recipe, optim=replace(recipe.optim, lr=1e-3))
    assert fit(changed, overwrite=True).summary["steps"] == 6


class _Death(BaseException):
    """The process ends here; nothing after the last checkpoint is known any more."""


def _fit_until(recipe: object, last_step: int) -> None:
    from relora.train.trainer import Trainer

    class Mortal(Trainer):
        def _step(self, step: int):
            if step > last_step:
                raise _Death
            return super()._step(step)

    import relora.train.fit as module

    module.Trainer = Mortal
    try:
        fit(recipe)
    finally:
        module.Trainer = Trainer
