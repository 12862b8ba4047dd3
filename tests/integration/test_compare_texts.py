"""`relora compare` where the study or its text changes between two starts."""

import json
from pathlib import Path

from experiment_scripts import EXPERIMENTS
from relora.cli.main import main
from text_study import DATA, GRID, SMALLER
from tiny_run import write_text

STUDY = f"""
[study]
name = "texts"
base = "base.toml"
steps = 2

[set]
{DATA.replace("FOLDER/", "")}
schedule.warmup_steps = 1
train.batch_size = 2
train.micro_batch_size = 2
eval.sequences = 4

[methods.full]
"""
BASE = """
[model]
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 2
"""


def test_only_a_new_text_is_trained_on_and_another_text_or_split_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))
    Path("base.toml").write_text(BASE)

    def compare(study: str) -> int:
        Path("study.toml").write_text(study)
        return main(["compare", "study.toml", "--out", "out", "--cores", "2"])

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}

    assert compare(STUDY) == 0
    (first,) = Path("out").glob("cells/*/summary.json")
    trained = first.stat().st_mtime_ns
    assert compare(STUDY + SMALLER) == 0
    assert first.stat().st_mtime_ns == trained
    results = json.loads(Path("out/study.json").read_text())
    assert [facts["section"]["vocab_size"] for facts in results["data"]] == [300, 280]
    assert [cell["status"] for cell in results["cells"]] == ["finished"] * 2

    before = files()
    assert compare(STUDY + GRID) == 2
    assert "tuning.fraction was 0" in capsys.readouterr().err
    assert files() == before

    Path("out/study.json").unlink()  # as if it had been killed before it wrote any
    before = files()
    Path("text/document-000.txt").write_text("another text " * 40)
    assert compare(STUDY) == 2
    assert "another text" in capsys.readouterr().err
    assert files() == before


def test_a_committed_study_is_trained_on_text_of_ones_own_by_a_file_of_a_few_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("novels"))
    Path("mine").mkdir()
    Path("mine/study.toml").write_text(
        f"""
[study]
like = "{EXPERIMENTS / "smoke"}"
seeds = [7]

[set]
data.source = "text"
data.path = "novels"
"""
    )
    assert main(["compare", "mine", "--out", "out", "--cores", "2", "--arms", "full", "relora"]) == 0
    results = json.loads(Path("out/study.json").read_text())
    assert {facts["source"] for facts in results["data"]} == {"text"}
    rows = {cell["arm"]: cell for cell in results["cells"] if (cell["stage"], cell["seed"]) == ("final", 7)}
    assert rows["full"]["status"] == rows["relora"]["status"] == "finished"
    table = Path("out/table.md").read_text()
    gap = rows["relora"]["loss"] - rows["full"]["loss"]
    assert f"{gap:+.4f} (n = 1)" in table
