"""The same recipe and seed give the same numbers: twice here, and as they were recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

from golden import CURVE, TOLERANCE, made_with, record


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return record(tmp_path_factory.mktemp("golden"))


def test_the_same_recipe_and_seed_twice_give_the_same_bits(found: dict[str, Any], tmp_path: Path) -> None:
    assert record(tmp_path) == found


def test_the_curve_is_the_one_recorded(found: dict[str, Any]) -> None:
    golden = json.loads(CURVE.read_text())
    assert [line["step"] for line in golden["curve"]] == list(range(1, 101))
    assert golden["curve"][-1]["restart_index"] == 4
    if made_with() == golden["made_with"]:
        assert found["curve"] == golden["curve"] and found["final_norms"] == golden["final_norms"]
        return
    for mine, theirs in zip(found["curve"], golden["curve"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=TOLERANCE, abs=1e-9)
            assert mine[key] == wanted, (theirs["step"], key)
