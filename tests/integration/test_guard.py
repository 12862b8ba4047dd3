"""A step that is not finite, met for real: a token has an embedding so large that its gradient overflows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed import train_under_torchrun
from test_train import assert_same_run, records
from transformers import AutoTokenizer

from relora.checkpoint.store import load_checkpoint
from relora.cli.main import main
from relora.data.batches import TokenBatches
from relora.data.prepare import prepare
from relora.errors import NonFiniteError
from relora.train.config import Recipe
from relora.train.fit import fit
from relora.train.model import build_model
from relora.train.recipe_io import write_recipe
from relora.train.state import SavedState
from relora.train.trainer import Trainer
from relora.train.training_method import Restarting
from tiny_run import tiny_recipe, write_text


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, int]:
    """Return a run that starts from a model with one bad token, and the only step that meets it."""
    folder = tmp_path_factory.mktemp("poisoned")
    write_text(folder / "text")
    document = folder / "text" / "document-017.txt"
    document.write_text(document.read_text().replace("value", "val~e", 1))
    plain = tiny_recipe(folder)
    data = prepare(plain.data)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    (token,) = tokenizer.encode("~", add_special_tokens=False)
    (place,) = np.flatnonzero(data.train_tokens == token)
    sequence, step = int(place) // plain.data.seq_len, 8
    # A seed whose order has that sequence between the checkpoints of steps 6 and 9.
    seed = next(
        seed
        for seed in range(10_000)
        if sequence
        in TokenBatches(data.train_tokens, seq_len=plain.data.seq_len, seed=seed).rows(step, batch_size=8)
    )
    model = build_model(plain, data)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = 3e38
    model.save_pretrained(folder / "model")
    for file in data.tokenizer_folder.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    origin = str(folder / "model")
    changes = {
        "run": {"seed": seed},
        "model": {"init_from": origin},
        "data": {"tokenizer": origin},
        "train": {"steps": 14},
    }
    return tiny_recipe(folder, **changes), step


def named(recipe: Recipe, name: str, **train: object) -> Recipe:
    return replace(recipe, run=replace(recipe.run, name=name), train=replace(recipe.train, **train))


def tensors_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    loaded = load_checkpoint(folder / "checkpoints" / f"step-{step:08d}").tensors
    return {**loaded["model"], **loaded["optimizer"]}


def test_stop_ends_the_run_in_words_with_exit_5_and_resumes_under_another_policy(poisoned, tmp_path, capsys):
    recipe, step = poisoned
    recipe = named(recipe, "stop")
    write_recipe(recipe, tmp_path / "stop.toml")
    assert main(["train", str(tmp_path / "stop.toml")]) == 5
    said = capsys.readouterr().err
    assert f"step {step}: loss" in said and "no weight was changed" in said
    assert "--train.nonfinite skip or rollback" in said
    assert not (recipe.run.folder / "checkpoints" / f"step-{step:08d}").exists()
    assert main(["train", str(tmp_path / "stop.toml")]) == 5  # it is met again, and written down once
    assert len(records(recipe.run.folder / "nonfinite.jsonl")) == 1
    assert main(["train", str(tmp_path / "stop.toml"), "--train.nonfinite", "skip"]) == 0
    assert len(records(recipe.run.folder / "nonfinite.jsonl")) == 1


def test_skip_changes_no_bit_and_names_the_documents(poisoned):
    recipe, step = poisoned
    recipe = replace(
        named(recipe, "skip", nonfinite="skip"), checkpoint=replace(recipe.checkpoint, every=1, keep_last=99)
    )
    result = fit(recipe)
    assert result.exit_code == 0 and result.summary["steps"] == 14
    lines = records(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[step - 1]["train/loss"] is None and "non_finite" in lines[step - 1]
    before, after = tensors_at(result.folder, step - 1), tensors_at(result.folder, step)
    restarted = step in (6, 8, 10, 12)
    assert all(
        torch.equal(after[name], before[name]) for name in before if not (restarted and "layers" in name)
    )
    (event,) = records(result.folder / "nonfinite.jsonl")
    assert event["step"] == step and event["batch"] == step and event["policy"] == "skip"
    assert event["grad_norm"] is None and len(event["micro_losses"]) == 2
    data = prepare(recipe.data)
    for described in event["documents"]:
        start, end = described["tokens"]
        assert end - start == 16 and described["sequence"] in event["sequences"]
        number = described["documents"][0]["number"]
        assert number == int(np.count_nonzero(data.train_tokens[:start] == data.eos_token_id))
        text = described["documents"][0]["begins"]
        # A document of the test's text begins with its number on a line of its own.
        assert text.split("\n")[0].isdigit()


def test_a_step_passed_over_says_that_it_cost_the_complements_momentum(poisoned, tmp_path, capsys):
    recipe, step = poisoned
    relora = replace(recipe.relora, factors="B", residual="muon", warm_start_steps=2)
    write_recipe(replace(named(recipe, "momentum"), relora=relora), tmp_path / "momentum.toml")
    assert main(["train", str(tmp_path / "momentum.toml"), "--train.nonfinite", "skip"]) == 0
    captured = capsys.readouterr()
    (said,) = [line for line in (captured.out + captured.err).splitlines() if f"step {step}: loss" in line]
    assert said.endswith("; the complement's momentum begins anew")


def test_a_fork_keeps_what_was_not_finite(poisoned):
    recipe, step = poisoned
    source = fit(named(recipe, "kept", nonfinite="skip"))
    forked = fit(named(recipe, "kept", nonfinite="skip", steps=16), fork="kept-longer")
    (event,) = records(forked.folder / "nonfinite.jsonl")
    assert event["step"] == step and [event] == records(source.folder / "nonfinite.jsonl")


def test_skip_ends_the_run_after_a_row_of_them(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        optim={"lr": 1e30, "clip_grad_norm": 0.0},
        schedule={"warmup_steps": 3},
        train={"nonfinite": "skip", "nonfinite_limit": 2},
        checkpoint={"every": 0},
    )
    with pytest.raises(NonFiniteError, match=r"2 steps in a row were not finite.*rollback"):
        fit(recipe)
    steps = [event["step"] for event in records(recipe.run.folder / "nonfinite.jsonl")]
    assert len(steps) == 2 and steps[1] == steps[0] + 1


def test_ranks_decide_alike_though_only_one_met_it(poisoned, tmp_path):
    recipe, step = poisoned
    recipe = named(recipe, "skip-both", nonfinite="skip")
    train_under_torchrun(recipe, tmp_path / "both.toml", processes=2)
    (event,) = records(recipe.run.folder / "nonfinite.jsonl")
    assert event["step"] == step and len(event["micro_losses"]) == 2
    losses = [line["train/loss"] for line in records(recipe.run.folder / "metrics.jsonl")]
    assert [index for index, loss in enumerate(losses, start=1) if loss is None] == [step]


def test_rollback_goes_on_past_the_data_and_resumes_bit_for_bit(poisoned, monkeypatch):
    recipe, step = poisoned
    whole = fit(named(recipe, "back", nonfinite="rollback"))
    assert whole.exit_code == 0
    lines = records(whole.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 15))
    (event,) = records(whole.folder / "nonfinite.jsonl")
    assert event["step"] == step
    last = load_checkpoint(whole.folder / "checkpoints" / "step-00000014")
    assert SavedState.of(last).progress.passed_batches == 2  # steps 7 and 8, since the checkpoint of step 6
    # Killed anywhere on the way, before or after it went back, the run ends the same.
    for at in (step - 1, 10, 13):
        again = named(recipe, f"back-{at}", nonfinite="rollback")
        die_after(again, at, monkeypatch)
        assert_same_run(fit(again).folder, whole.folder)
        assert records(again.run.folder / "nonfinite.jsonl") == [event]


def test_rollback_that_meets_it_again_ends_the_run(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        optim={"lr": 1e30, "clip_grad_norm": 0.0},
        schedule={"warmup_steps": 3},
        train={"nonfinite": "rollback", "nonfinite_limit": 2},
        checkpoint={"every": 1},
    )
    with pytest.raises(NonFiniteError, match=r"has gone back 2 times to .* and met it again"):
        fit(recipe)
    root = recipe.run.folder / "checkpoints"
    for path in root.glob("step-*"):  # what could not be gone on from was never saved
        assert all(t.isfinite().all() for t in load_checkpoint(path).tensors["model"].values())


def test_a_restart_that_is_not_finite_is_refused_and_the_checkpoint_before_it_is_intact(
    tmp_path, monkeypatch
):
    recipe = tiny_recipe(tmp_path)
    spoil_factors_before_restart(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"step 6: merge refused, no weight was changed.*rollback"):
        fit(recipe)
    assert [p.name for p in sorted((recipe.run.folder / "checkpoints").glob("step-*"))][-1] == "step-00000004"
    assert records(recipe.run.folder / "restarts.jsonl") == []
    (event,) = records(recipe.run.folder / "nonfinite.jsonl")
    assert event["what"] == "weights" and "merge refused" in event["refused"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        optim={"lr": 1e38, "clip_grad_norm": 0.0},
        schedule={"warmup_steps": 2},
        checkpoint={"every": 1, "keep_last": 9},
    )
    with pytest.raises(NonFiniteError):
        fit(recipe)
    for path in (recipe.run.folder / "checkpoints").glob("step-*"):
        assert all(t.isfinite().all() for t in load_checkpoint(path).tensors["model"].values())


class _Death(BaseException):
    """The process ends here."""


def die_after(recipe: Recipe, last_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until steps have been taken up to `last_step`, and die."""
    real = Trainer._step

    def mortal(self: Trainer, step: int):
        if step > last_step:
            raise _Death
        return real(self, step)

    monkeypatch.setattr(Trainer, "_step", mortal)
    with pytest.raises(_Death):
        fit(recipe)
    monkeypatch.setattr(Trainer, "_step", real)


def spoil_factors_before_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage a factor in memory, as a failing chip would, after the update of step 6."""
    real = Restarting.after_step

    def spoiling(self: Restarting, step: int):
        if step == 6:
            assert self.restarter is not None
            factor = next(p for n, p in self.restarter.model.named_parameters() if n.endswith("lora_B"))
            with torch.no_grad():
                factor[0, 0] = float("inf")
        return real(self, step)

    monkeypatch.setattr(Restarting, "after_step", spoiling)
