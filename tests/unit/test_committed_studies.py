"""The committed results are of the committed studies, which would go on from them and run nothing again."""

import json
import re

import pytest

from experiment_scripts import EXPERIMENTS
from relora.lab.gather import earlier_outcomes
from relora.lab.plan import Planner, predicted
from relora.lab.study import recipe_fields
from relora.lab.study_file import read_study
from relora.lab.table import markdown
from relora.train.recipe_io import load_recipe

RESULTS = sorted(EXPERIMENTS.glob("*/results/study.json"))


def test_there_are_studies():
    assert len(RESULTS) > 10


@pytest.mark.parametrize("results", RESULTS, ids=[path.parents[1].name for path in RESULTS])
def test_every_cell_of_the_results_is_one_of_the_study_as_its_file_stands(results, tmp_path):
    """A default or the order of fields that changes makes every recipe another, to be run again."""
    content = json.loads(results.read_text())
    kept = earlier_outcomes(content)
    plan, _ = Planner(read_study(results.parents[1] / "study.toml"), tmp_path).plan_with(
        lambda cell: kept.get(cell.name)
    )
    names = {cell.name for cell in plan.cells}
    assert {row["name"] for row in content["cells"]} <= names
    not_run = names - kept.keys()
    assert not plan.waiting or not_run
    listed = (results.parent / "table.md").read_text()
    assert ("not there yet" in listed) == bool(not_run)
    assert markdown(content) == listed


def test_the_quickstart_is_what_its_study_chose():
    cells = json.loads((EXPERIMENTS / "warm-muon" / "results" / "study.json").read_text())["cells"]
    won = [cell["recipe"] for cell in cells if (cell["arm"], cell["stage"]) == ("beyond-muon", "final")]
    assert len(won) == 3
    shipped = json.loads(json.dumps(recipe_fields(load_recipe("quickstart"))))
    of_the_study = ("run.name", "run.seed", "run.out", "eval.", "checkpoint.", "log.", "train.precision")
    for recipe in won:
        otherwise = {name for name in recipe if recipe[name] != shipped[name]}
        assert {name for name in otherwise if not name.startswith(of_the_study)} == {"data.tuning_fraction"}


@pytest.mark.parametrize("index", [0, 1], ids=["whole", "like another"])
def test_the_examples_of_the_docs_are_studies(tmp_path, index):
    markdown = (EXPERIMENTS.parent / "docs" / "laboratory.md").read_text()
    example = re.findall(r"^```toml\n(\[study\].*?)^```$", markdown, re.MULTILINE | re.DOTALL)[index]
    for beside in ("base.toml", "main-python"):
        (tmp_path / beside).symlink_to(EXPERIMENTS / beside)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.toml").write_text(example)
    assert predicted(read_study(tmp_path / "mine" / "study.toml"), tmp_path)
