"""Where a run's summary speaks, and where it must not."""

from pathlib import Path

import pytest

from relora.train.export import export_run
from relora.train.fit import fit
from relora.train.inspect import inspect_run
from tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    fit(tiny_recipe(home))
    return home


def test_card_of_an_earlier_checkpoint_does_not_claim_the_figures_of_the_end(
    home: Path, tmp_path: Path
) -> None:
    card = (export_run(home / "runs" / "tiny", tmp_path / "early", step=6) / "README.md").read_text()
    assert "| steps | 6 |" in card and "| tokens | 768 |" in card
    assert "held-out" not in card.partition("## Recipe")[0]
    card = (export_run(home / "runs" / "tiny", tmp_path / "last") / "README.md").read_text()
    assert "| steps | 12 |" in card and "held-out perplexity" in card


def test_damaged_summary_is_written_anew_from_the_last_checkpoint(home: Path, tmp_path: Path) -> None:
    run = home / "runs" / "tiny"
    (run / "summary.json").write_text('{"method": "rel')
    assert not inspect_run(run)["is_finished"]
    export_run(run, tmp_path / "exported")
    assert fit(tiny_recipe(home)).summary["steps"] == 12
    assert inspect_run(run)["is_finished"]
