"""The [checkpoint] section: its checks, and that it costs the command line nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import relora
from relora.checkpoint.config import CheckpointConfig


def test_the_defaults_can_be_used():
    assert CheckpointConfig().violations() == []
    assert CheckpointConfig(every=0, keep_last=1).violations() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"every": -1}, ["every must be at least 0, not -1"]),
        ({"every": 2.5}, ["every must be a whole number, not 2.5"]),
        ({"keep_last": True}, ["keep_last must be a whole number, not True"]),
        (
            {"every": -1, "keep_last": 0},
            ["every must be at least 0, not -1", "keep_last must be at least 1, not 0"],
        ),
    ],
)
def test_everything_wrong_is_listed(changes, expected):
    assert CheckpointConfig(**changes).violations() == expected


def test_reading_the_section_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'safetensors'}"
    code = f"import sys, relora.checkpoint.config; print(sorted({heavy} & set(sys.modules)))"
    source = str(Path(relora.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"
