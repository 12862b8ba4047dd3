"""Cells of the committed studies that are trained again: which, and what is held against what."""

import json

import pytest

from experiment_scripts import EXPERIMENTS, experiment_script
from relora.lab.gather import earlier_outcomes, thinned
from relora.lab.plan import Planner
from relora.lab.study_file import read_study


@pytest.fixture(scope="module")
def rerun():
    return experiment_script("rerun")


def test_means_are_those_of_a_curve_that_was_thinned(rerun):
    logged = {step: 1 / step for step in range(1, 301)}
    curve = thinned([[step, loss] for step, loss in logged.items()], most=120)
    again = rerun.as_recorded(logged, [int(step) for step, _ in curve])
    assert again == pytest.approx({int(step): loss for step, loss in curve}, abs=1e-4)
    short = dict(list(logged.items())[:50])
    assert rerun.as_recorded(short, list(short)) == short


def test_the_cell_that_restarts_first_is_chosen_and_has_losses_of_its_first_steps(rerun, tmp_path):
    study = EXPERIMENTS / "warm-muon"
    content = json.loads((study / "results" / "study.json").read_text())
    kept = earlier_outcomes(content)
    plan, _ = Planner(read_study(study / "study.toml"), tmp_path).plan_with(lambda cell: kept.get(cell.name))
    cell = rerun.chosen(content, plan.cells)
    assert (cell.arm, rerun.first_restart(cell)) == ("beyond", 50)
    assert [rerun.how_far(cell, step) for step in (49, 50, 99)] == [
        "low rank, 0 restarts",
        "low rank, 1 restart",
        "low rank, 1 restart",
    ]
    assert list(rerun.recorded(content, cell, 30)) == [1, 10, 20, 30]
    warm = next(cell for cell in plan.cells if cell.arm == "relora-B" and cell.stage == "final")
    assert rerun.how_far(warm, 120) == "full rank"
