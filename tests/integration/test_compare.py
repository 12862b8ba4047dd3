"""`relora compare` from its file to its table: killed twice on the way, with a run that diverges."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiment_scripts import experiment_script
from relora.checkpoint.store import load_checkpoint
from relora.cli.main import main
from relora.lab.cell_files import try_lock
from relora.lab.plan import predicted
from relora.lab.results import arm_results
from relora.lab.study_file import read_study
from relora.train.fit import fit
from relora.train.recipe_io import load_recipe, resolve

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke"
NUM_CELLS = 10
NUM_FINISHED = 5  # with one seed: two of a sweep, full, lora, relora; the other diverges


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "relora", "compare", "smoke", "--out", "study", "--cores", "2", *words]
    environment = {**os.environ, "HOME": str(folder), "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def read_until(process: subprocess.Popen[str], word: str, times: int) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if seen.count(word) == times:
            return seen
    raise AssertionError(f"ended before {word!r} was said {times} times:\n{seen}")


def times_of_summaries(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("study/cells/*/summary.json")}


class Killed:
    """A study that was stopped, then killed, then finished, and what was seen at each point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(SMOKE, folder / "smoke")
        file = folder / "smoke" / "study.toml"
        file.write_text(file.read_text().replace("seeds = [0, 1]", "seeds = [0]"))
        stopped = begin(folder)
        read_until(stopped, "started ", 2)
        stopped.send_signal(signal.SIGTERM)
        self.said_when_stopped = stopped.communicate()[0]
        self.code_when_stopped = stopped.returncode
        killed = begin(folder)
        read_until(killed, "] ", 2)
        killed.kill()
        killed.communicate()
        self.finished_when_killed = times_of_summaries(folder)
        last = begin(folder)
        self.output = last.communicate()[0]
        self.code = last.returncode
        self.results = json.loads((folder / "study" / "study.json").read_text())

    def cells(self, **wanted: object) -> list[dict]:
        return [c for c in self.results["cells"] if all(c[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("compare"))


def test_stopped_study_says_so_and_leaves_its_results_so_far(study):
    assert study.code_when_stopped == 143
    assert "stopping: each running cell saves first" in study.said_when_stopped


def test_killed_study_goes_on_and_never_runs_a_finished_cell_again(study):
    assert study.code == 0, study.output
    assert 2 <= len(study.finished_when_killed) < NUM_FINISHED
    assert study.finished_when_killed.items() <= times_of_summaries(study.folder).items()
    for name in study.finished_when_killed:
        assert f"started {name}" not in study.output
    assert len(study.cells(status="finished")) == NUM_FINISHED


def test_a_run_that_diverges_is_reported_and_the_others_go_on(study):
    diverged = study.cells(status="diverged")
    assert [(cell["arm"], cell["seed"]) for cell in diverged] == [("hot", 0)]
    assert all("no weight was changed" in cell["failure"] for cell in diverged)
    assert "diverged" in (study.folder / "study" / "table.md").read_text()


def test_winner_of_the_sweep_is_used_by_all_that_inherit_it(study):
    tuning = study.cells(stage="tuning")
    assert [cell["eval_split"] for cell in tuning] == ["tuning", "tuning"]
    best = min(tuning, key=lambda cell: cell["loss"])["swept"]["optim.lr"]
    for cell in study.cells(stage="final", status="finished"):
        assert cell["recipe"]["optim.lr"] == best and cell["eval_split"] == "heldout"
    for cell in study.cells(stage="final", arm="relora"):
        assert cell["recipe"]["optim.factor_lr"] == 2 * best


def test_shared_warm_start_gives_the_bits_of_training_it_again(study):
    shared = [cell for cell in study.cells(stage="final") if cell["warm_start_from"]]
    assert {cell["arm"] for cell in shared} == {"lora"} or {cell["arm"] for cell in shared} == {"relora"}
    folder = study.folder / "study" / "cells" / shared[0]["name"]
    recipe = load_recipe(folder.with_name(folder.name + ".toml"))
    changes = {
        "run": {"out": str(study.folder / "alone")},
        "data": {"cache_dir": str(study.folder / "cache")},
    }
    alone = fit(resolve(_layer(recipe), changes)).folder
    mine, theirs = (load_checkpoint(run / "checkpoints" / "step-00000012").tensors for run in (folder, alone))
    for part in (
        "model",
        "optimizer",
    ):  # Python's own generator, which nothing draws from, differs by process
        assert mine[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, theirs[part][key]) for key, value in mine[part].items())
    losses = [
        [(line["step"], line["train/loss"], line.get("eval/loss")) for line in _lines(run / "metrics.jsonl")]
        for run in (folder, alone)
    ]
    assert losses[0] == losses[1]


def test_table_and_page_are_recomputed_from_the_results_alone(study, monkeypatch, capsys):
    monkeypatch.chdir(study.folder)
    made = {name: (study.folder / "study" / name).read_bytes() for name in ("table.md", "report.html")}
    again = study.folder / "again"
    again.mkdir()
    shutil.copy(study.folder / "study" / "study.json", again)
    assert main(["compare", "smoke", "--tables-only", "--out", "again"]) == 0
    assert {name: (again / name).read_bytes() for name in made} == made
    results = json.loads((study.folder / "study" / "study.json").read_text())
    assert main(["compare", "smoke", "--tables-only", "--out", "study", "--json"]) == 0
    assert json.loads((study.folder / "study" / "study.json").read_text()) == results
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]["finished"] == NUM_FINISHED


def test_page_holds_its_plots_and_loads_nothing(study):
    page = (study.folder / "study" / "report.html").read_text()
    assert page.count("<svg") == 5 and "default-src 'none'" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    plots = sorted(path.name for path in (study.folder / "study" / "plots").iterdir())
    losses = ["loss-memory.svg", "loss-time.svg", "loss-tokens.svg"]
    assert plots == ["gap-tokens.svg", *losses, "sweep-optim-lr.svg"]
    for name in plots:  # files for any reader of SVG: no variables of the page's, and something to stand on
        drawn = (study.folder / "study" / "plots" / name).read_text()
        assert "var(" not in drawn and drawn.index("</desc><rect") < drawn.index("<g>")
    assert "var(" in page


def test_the_gaps_to_full_rank_end_where_the_table_says(study):
    results = json.loads((study.folder / "study" / "study.json").read_text())
    drawn = (study.folder / "study" / "plots" / "gap-tokens.svg").read_text()
    differences = {line.arm: line.differences.get("full") for line in arm_results(results)}
    found = {arm: difference.mean for arm, difference in differences.items() if difference is not None}
    assert len(found) > 1
    for arm, gap in found.items():
        assert f"{arm} ends {gap:+.4f}" in drawn


def test_results_hold_what_the_table_needs_to_be_checked(study):
    for cell in study.cells(status="finished"):
        for key in ("parameters_trainable", "weight_bytes", "optimizer_bytes", "peak_memory_bytes", "wall_s"):
            assert cell[key] > 0
        assert cell["eval_curve"][-1][0] == cell["tokens"] and cell["eval_curve"][-1][2] == round(
            cell["loss"], 5
        )
        assert cell["versions"]["torch"] == torch.__version__
    assert study.results["data"][0]["counts"]["tuning_tokens"] > 0


def test_a_cell_trained_again_from_the_studys_file_is_held_against_its_results(study, tmp_path):
    folder = tmp_path / "smoke"
    shutil.copytree(study.folder / "smoke", folder)
    (folder / "results").mkdir()
    for row in study.results["cells"]:
        if curve := row.get("train_curve"):
            curve[0][1] += 0.5  # of which the rest is told apart by rounding alone
    (folder / "results" / "study.json").write_text(json.dumps(study.results))
    found = experiment_script("rerun").compared(folder, 5)
    assert found["steps"] > 1
    assert found["largest_difference"] == pytest.approx(0.5, abs=1e-4)


def test_dry_run_lists_cells_and_tokens_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(SMOKE), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["num_cells"] == NUM_CELLS and list(tmp_path.iterdir()) == []
    whole, warm = 12 * 8 * 16, 4 * 8 * 16
    # Two sweeps of half the length, eight final runs, two of which get their warm start from another.
    assert listed["tokens"] == 2 * whole // 2 + 8 * whole - 2 * warm


def test_arms_that_are_named_train_alone_and_the_results_stay_those_of_all(study, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(study.folder, folder)
    file = folder / "smoke" / "study.toml"
    text = file.read_text().replace("seeds = [0]", "seeds = [0, 1]")
    file.write_text(
        text + '\n[methods.elsewhere]\nmethod = "full"\nset = { data.source = "text", data.path = "no" }\n'
    )
    before = set(times_of_summaries(folder))
    process = begin(folder, "--arms", "full")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (new,) = set(times_of_summaries(folder)) - before
    assert new.startswith("full-final-s1")
    counted = [tuple(map(int, pair)) for pair in re.findall(r"\[(\d+)/(\d+)\]", output)]
    assert counted and all(done <= total for done, total in counted) and len(set(counted[-1])) == 1
    results = json.loads((folder / "study" / "study.json").read_text())
    finished = [cell for cell in results["cells"] if cell["status"] == "finished"]
    assert len(finished) == len(study.cells(status="finished")) + 1


def test_arms_are_refused_where_they_would_do_nothing(tmp_path, capsys):
    for words in (["--arms"], ["--arms", "full", "--tables-only"], ["--arms", "ful"]):
        assert main(["compare", str(SMOKE), "--out", str(tmp_path / "out"), *words]) == 2
    assert "did you mean 'full'" in capsys.readouterr().err


def test_what_is_no_study_is_refused_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "nowhere"]) == 2
    (tmp_path / "study.toml").write_text("[study]\nsteps = 3\n[methods.galor]\n")
    assert main(["compare", "."]) == 2
    assert main(["compare", str(SMOKE), "--cores", "1", "--threads-per-cell", "2"]) == 2
    assert main(["compare", str(SMOKE), "--tables-only"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_lock_is_held_until_every_copy_of_it_is_closed(tmp_path):
    lock = try_lock(tmp_path / "cell.lock")
    holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(lock,))
    os.close(lock)
    assert try_lock(tmp_path / "cell.lock") is None
    holder.communicate()
    again = try_lock(tmp_path / "cell.lock")
    assert again is not None
    os.close(again)


def test_smoke_study_has_the_cells_these_tests_count_on():
    assert len(predicted(read_study(SMOKE / "study.toml"), Path("cells"))) == NUM_CELLS


def _layer(recipe: object) -> dict:
    return {
        name: {k: v for k, v in vars(part).items() if v is not None} for name, part in vars(recipe).items()
    }


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_study_goes_on_from_its_results_alone_and_refuses_those_of_another_text(study, monkeypatch, capsys):
    monkeypatch.chdir(study.folder)
    results = json.loads((study.folder / "study" / "study.json").read_text())
    moved = study.folder / "moved"
    moved.mkdir()
    (moved / "study.json").write_text(json.dumps(results))
    assert main(["compare", "smoke", "--out", "moved"]) == 0
    assert not list(moved.glob("cells/*/summary.json"))  # nothing was trained
    again = json.loads((moved / "study.json").read_text())
    assert [cell | {"earlier": True} for cell in results["cells"]] == again["cells"]
    assert "kept from earlier starts" in (moved / "table.md").read_text()
    results["data"][0]["fingerprint"] = "0" * 64
    (moved / "study.json").write_text(json.dumps(results))
    before = (moved / "study.json").read_bytes()
    assert main(["compare", "smoke", "--out", "moved"]) == 2
    assert "another text" in capsys.readouterr().err
    assert (moved / "study.json").read_bytes() == before
