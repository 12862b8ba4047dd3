"""Where a run's summary speaks, and where it must not."""

from pathlib import Path

import pytest

from relora.errors import ConfigError
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


def test_one_checkpoint_has_no_other_step_to_export(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step-00000006 is one checkpoint: leave the step out"):
        export_run(home / "runs" / "tiny" / "checkpoints" / "step-00000006", tmp_path / "no", step=8)
    assert not (tmp_path / "no").exists()


def test_damaged_checkpoint_of_the_switch_costs_the_ranks_and_not_the_summary(tmp_path: Path) -> None:
    run = fit(tiny_recipe(tmp_path)).folder
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"the rank of what was learned is not in the summary: .*00000004"):
        summary = fit(tiny_recipe(tmp_path)).summary
    assert summary["ranks"] is None and summary["steps"] == 12 and summary["precision"] == "fp32"


def test_damaged_summary_is_written_anew_from_the_last_checkpoint(home: Path, tmp_path: Path) -> None:
    run = home / "runs" / "tiny"
    (run / "summary.json").write_text('{"method": "rel')
    assert not inspect_run(run)["is_finished"]
    export_run(run, tmp_path / "exported")
    assert fit(tiny_recipe(home)).summary["steps"] == 12
    assert inspect_run(run)["is_finished"]
