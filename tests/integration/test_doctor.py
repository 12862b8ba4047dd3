"""`relora doctor`: healthy where all is well, and the right exit code where something is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from relora.cli.main import main
from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe


def examined(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", str(path), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def broken(result: dict[str, Any]) -> list[str]:
    return [each["said"] for each in result["findings"] if each["verdict"] == "broken"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_recipe(tiny_recipe(tmp_path), tmp_path / "tiny.toml")
    return tmp_path / "tiny.toml"


@pytest.mark.parametrize("method", ["full", "lora", "relora"])
def test_a_healthy_machine_is_told_so_and_nothing_is_left_behind(recipe, tmp_path, capsys, method):
    code, result = examined(recipe, capsys, "--run.method", method)
    assert code == 0 and result["is_healthy"] and broken(result) == []
    said = {each["check"] for each in result["findings"]}
    assert said == {"versions", "devices", "precision", "determinism", "run folder", "one step"}
    steps = " ".join(each["said"] for each in result["findings"] if each["check"] == "one step")
    assert ("low rank: loss" in steps) == (method != "full") and "it reads back" in steps
    assert ("a merge of 14 layers" in steps) == (method == "relora")
    assert not (tmp_path / "runs").exists()


def test_words_for_people_say_the_same(recipe, capsys):
    assert main(["doctor", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines) and len(lines) >= 8


def test_a_folder_that_cannot_be_written_is_broken_with_4(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    code, result = examined(recipe, capsys, "--run.out", str(tmp_path / "file" / "runs"))
    assert code == 4 and not result["is_healthy"]
    assert any("cannot be written" in said for said in broken(result))


def test_data_that_cannot_be_read_is_broken_with_3(recipe, tmp_path, capsys):
    code, result = examined(recipe, capsys, "--data.path", str(tmp_path / "nothing"))
    assert code == 3 and "does not exist" in broken(result)[0]


def test_a_model_that_cannot_be_had_is_broken_with_2(recipe, tmp_path, capsys):
    tokenizer = next((tmp_path / "cache").rglob("tokenizer"), None)
    assert tokenizer is None
    main(["prepare", str(recipe), "--json"])
    capsys.readouterr()
    tokenizer = next((tmp_path / "cache").rglob("tokenizer"))
    words = ("--model.init_from", str(tmp_path / "text"), "--data.tokenizer", str(tokenizer))
    code, result = examined(recipe, capsys, *words)
    assert code == 2 and "holds no config.json" in broken(result)[0]
