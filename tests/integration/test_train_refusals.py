"""What cannot work is refused before the first step, and a run that never began is in nobody's way."""

import subprocess
import sys
from pathlib import Path

import pytest

from relora.errors import ConfigError, DataError
from relora.train.fit import fit
from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe


def test_targets_that_match_nothing_are_refused_before_the_warm_start(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, relora={"targets": ["nothing*"]})
    with pytest.raises(ConfigError, match="leave no linear layer to wrap"):
        fit(recipe)
    assert not (recipe.run.folder / "checkpoints").exists()
    assert not (recipe.run.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("mistake", "error"),
    [({"data": {"vocab_size": 5000}}, DataError), ({"relora": {"targets": ["nothing*"]}}, ConfigError)],
)
def test_mended_recipe_begins_where_the_mistaken_one_never_did(
    tmp_path: Path, mistake: dict[str, dict[str, object]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        fit(tiny_recipe(tmp_path, **mistake))
    assert fit(tiny_recipe(tmp_path, train={"steps": 7})).summary["steps"] == 7


def test_logs_of_a_run_without_a_checkpoint_are_not_given_up_for_another_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.run.folder.mkdir(parents=True)
    with pytest.raises(DataError):
        fit(tiny_recipe(tmp_path, data={"vocab_size": 5000}))
    (recipe.run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"data\.vocab_size was 5000, is 300"):
        fit(recipe)
    assert (recipe.run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_missing_model_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    fit(tiny_recipe(tmp_path, train={"steps": 7}))
    origin = f"{tmp_path}/no/such/model"
    changes = {"model": {"init_from": origin}, "data": {"tokenizer": str(tmp_path / "runs/tiny/tokenizer")}}
    with pytest.raises(ConfigError, match="does not exist"):
        fit(tiny_recipe(tmp_path, run={"name": "next"}, **changes))


def test_small_run_is_not_said_to_have_no_parameters_or_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_recipe(tmp_path, run={"method": "full"}, train={"steps": 3}))
    shown = capsys.readouterr().err
    assert "full: 24.9 k parameters, 3 steps" in shown and "0.0 M" not in shown


def test_setting_without_effect_is_said_in_a_line_of_the_command(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, relora={"residual_every": 2}, train={"steps": 7})
    write_recipe(recipe, tmp_path / "tiny.toml")
    command = [sys.executable, "-m", "relora", "train", str(tmp_path / "tiny.toml")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "relora: warning: residual_every has no effect with residual='none'" in ran.stderr
    assert ".py:" not in ran.stderr


def test_lora_says_what_it_leaves_idle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"run": {"method": "lora"}, "relora": {"reset": "zero"}}
    fit(tiny_recipe(tmp_path, train={"steps": 7}, **changes))
    assert "without restarts these have no effect: relora.reset 'zero'" in capsys.readouterr().err
