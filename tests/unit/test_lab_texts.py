"""What a study notes of its texts, and when it refuses to go on."""

import json
import tomllib
from pathlib import Path

import pytest

from relora.errors import CheckpointError, ConfigError
from relora.lab.plan import predicted
from relora.lab.study import Cell, recipe_fields
from relora.lab.study_file import build_study
from relora.lab.texts import StudyTexts
from text_study import DATA, GRID, SMALLER
from tiny_run import write_text

STUDY = f"""
[study]
name = "texts"
steps = 20

[set]
{DATA}
schedule.warmup_steps = 2

[methods.full]
"""


def cells_of(folder: Path, more: str = "") -> list[Cell]:
    text = STUDY.replace("FOLDER", str(folder)) + more
    study = build_study(tomllib.loads(text), source=text, subject="study", beside=Path())
    return predicted(study, folder / "study" / "cells")


def results_of(folder: Path, cells: list[Cell]) -> dict:
    """Return what a study.json of these cells holds that tells of their texts."""
    data = [
        {"fingerprint": facts["fingerprint"], "source": facts["source"]}
        for facts in StudyTexts(folder / "study").facts(cells)
    ]
    return {"data": data, "cells": [{"recipe": recipe_fields(cell.recipe)} for cell in cells]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text and a study that has noted it, and has trained nothing yet."""
    write_text(tmp_path / "text")
    StudyTexts(tmp_path / "study").check(cells_of(tmp_path))
    return tmp_path


def change_text(folder: Path) -> None:
    (folder / "text" / "document-000.txt").write_text("another text " * 40)


def test_texts_are_noted_and_are_the_same_at_the_next_start(folder):
    note = folder / "study" / "data.json"
    before = note.read_bytes()
    texts = StudyTexts(folder / "study")
    texts.check(cells_of(folder))
    assert note.read_bytes() == before
    (facts,) = texts.facts(cells_of(folder))
    assert facts["section"]["vocab_size"] == 300 and len(facts["fingerprint"]) == 64


def test_text_that_changed_before_there_were_results_is_refused_and_nothing_is_changed(folder):
    before = {path: path.read_bytes() for path in (folder / "study").rglob("*")}
    change_text(folder)
    with pytest.raises(ConfigError, match=r"study holds cells .* another text .* --out another folder"):
        StudyTexts(folder / "study").check(cells_of(folder, SMALLER))
    assert {path: path.read_bytes() for path in (folder / "study").rglob("*")} == before


@pytest.mark.parametrize("has_note", [True, False])
def test_section_that_was_not_there_before_is_new_and_no_other_text(folder, has_note):
    results = results_of(folder, cells_of(folder))
    if not has_note:
        (folder / "study" / "data.json").unlink()
    StudyTexts(folder / "study", results).check(cells_of(folder, SMALLER))
    noted = json.loads((folder / "study" / "data.json").read_text())["texts"]
    assert [facts["section"]["vocab_size"] for facts in noted] == [300, 280]


def test_results_of_another_text_are_refused_where_nothing_was_noted(folder):
    results = results_of(folder, cells_of(folder))
    (folder / "study" / "data.json").unlink()
    change_text(folder)
    with pytest.raises(ConfigError, match="another text"):
        StudyTexts(folder / "study", results).check(cells_of(folder, SMALLER))
    assert not list((folder / "study").iterdir())


def test_section_that_left_the_study_is_still_known_when_it_comes_back(folder):
    StudyTexts(folder / "study").check(cells_of(folder, SMALLER))
    only_smaller = "set = { data.vocab_size = 280 }\n"
    StudyTexts(folder / "study").check(cells_of(folder, only_smaller))
    assert len(StudyTexts(folder / "study").facts(cells_of(folder, only_smaller))) == 1
    change_text(folder)
    with pytest.raises(ConfigError, match="another text"):
        StudyTexts(folder / "study").check(cells_of(folder))


@pytest.mark.parametrize("has_note", [True, False])
def test_first_grid_of_a_study_is_refused_in_the_name_of_the_tuning_fraction(folder, has_note):
    results = results_of(folder, cells_of(folder))
    if not has_note:
        (folder / "study" / "data.json").unlink()
    wanted = r"tuning\.fraction was 0, .* it is 0\.05 .* set fraction = 0 in "
    with pytest.raises(ConfigError, match=wanted) as caught:
        StudyTexts(folder / "study", results).check(cells_of(folder, GRID))
    assert "another text" not in str(caught.value)


def test_note_that_is_no_note_is_refused_in_words(folder):
    for content in ("", "[]", '{"texts": [3]}', '{"texts": [{"section": {}}]}'):
        (folder / "study" / "data.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"data\.json cannot be read as the texts of a study"):
            StudyTexts(folder / "study").check(cells_of(folder))
