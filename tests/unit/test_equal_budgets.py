"""Equal time and memory: full rank is at its own, and the documents say what is printed."""

import math
import re

import pytest

from experiment_scripts import EXPERIMENTS, experiment_script

DOCS = EXPERIMENTS.parent / "docs"


@pytest.fixture(scope="module")
def script():
    return experiment_script("equal_budgets")


def test_full_rank_needs_its_own_tokens_and_the_geometric_mean_for_the_mean_of_its_losses(script):
    short, long = {"loss": 3.0, "tokens": 2_000_000}, {"loss": 2.0, "tokens": 8_000_000}
    assert script.time_share(long, short, long) == pytest.approx(1.0)
    assert script.time_share(short, short, long) == pytest.approx(1.0)
    assert script.time_share({"loss": 2.5, "tokens": 8_000_000}, short, long) == pytest.approx(0.5)


def test_full_rank_in_its_own_bytes_has_its_own_loss(script):
    for study in ("main-python", "main-prose"):
        small, full = (script.final_cells(study, arm) for arm in ("control", "full"))
        assert sorted(small) == sorted(full) == [0, 1, 2]
        for seed, cell in small.items():
            own = script.FULL_BYTES * cell["parameters_total"]
            assert 0 <= script.held_bytes(cell) - own < 1000  # AdamW's step counts
            same = script.same_memory_loss(cell, small[seed], full[seed])
            assert same == pytest.approx(cell["loss"], rel=1e-5)
        half = dict(full[0], weight_bytes=0, optimizer_bytes=0)
        half["parameters_trainable"] = 4 * math.sqrt(
            small[0]["parameters_total"] * full[0]["parameters_total"]
        )
        assert script.same_memory_loss(half, small[0], full[0]) == pytest.approx(
            (small[0]["loss"] + full[0]["loss"]) / 2, rel=1e-5
        )


def test_the_documents_say_what_is_printed(script, capsys):
    script.main()
    printed = capsys.readouterr().out
    section = (DOCS / "method.md").read_text().partition("## At equal time and equal memory")[2]
    quoted = [line for line in section.partition("\n## ")[0].splitlines() if re.match(r"\| [a-zA-Z]", line)]
    assert len(quoted) > 8
    assert [line for line in quoted if line not in printed.splitlines()] == []
