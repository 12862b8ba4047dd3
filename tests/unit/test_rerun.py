"""Cells of the committed studies that are trained again: which, and what is held against what."""

import json

import pytest

from experiment_scripts import EXPERIMENTS, experiment_script
from relora.lab.gather import thinned


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


def test_a_study_has_losses_of_its_first_steps_on_record(rerun):
    found = sorted(EXPERIMENTS.glob("*/results/study.json"))
    assert len(found) > 10
    for path in found:
        rows = [row for row in json.loads(path.read_text())["cells"] if row["stage"] == "final"]
        assert any(row["train_curve"][0][0] == row["tokens"] / row["steps"] for row in rows), path
