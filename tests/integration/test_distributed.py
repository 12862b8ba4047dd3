"""Two processes under torchrun train what one process with accumulation trains."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relora.checkpoint.lock import folder_lock
from relora.train.config import Recipe
from relora.train.fit import fit
from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe


def train_under_torchrun(recipe: Recipe, path: Path, *, processes: int) -> subprocess.CompletedProcess[str]:
    write_recipe(recipe, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    if 0 < torch.cuda.device_count() < processes:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # NCCL gives each rank a GPU of its own
    return subprocess.run(
        [*command, "-m", "relora", "train", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("relora", [{}, {"warm_start_kind": "muon"}])
def test_two_ranks_equal_one_with_accumulation(tmp_path: Path, relora: dict[str, str]) -> None:
    recipe = tiny_recipe(tmp_path, relora=relora)
    alone = fit(recipe).folder
    both = replace(recipe, run=replace(recipe.run, name="both"))
    done = train_under_torchrun(both, tmp_path / "both.toml", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = both.run.folder
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    for left, right in zip(
        *((path / "metrics.jsonl").read_text().splitlines() for path in (alone, folder)), strict=True
    ):
        one, two = json.loads(left), json.loads(right)
        assert one.keys() == two.keys()
        for key in {"train/loss", "grad_norm", "eval/loss"} & one.keys():
            # Muon's momenta are rounded at random, on each rank by itself.
            assert two[key] == pytest.approx(one[key], rel=1e-3 if relora else 1e-4)
    restarts = [
        [json.loads(line)["step"] for line in (path / "restarts.jsonl").read_text().splitlines()]
        for path in (alone, folder)
    ]
    assert restarts[0] == restarts[1] == [6, 8, 10]


def test_a_run_that_is_in_use_is_refused_by_every_rank_in_words(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe.run.folder.mkdir(parents=True)
    with folder_lock(recipe.run.folder, doing="training"):
        done = train_under_torchrun(recipe, tmp_path / "both.toml", processes=2)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"[rank {rank}] relora: cannot write in {recipe.run.folder}" in done.stderr


def test_mistake_that_one_process_finds_is_said_by_all_without_a_traceback(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data={"vocab_size": 5000})
    done = train_under_torchrun(recipe, tmp_path / "mistake.toml", processes=2)
    for rank in (0, 1):
        assert f"[rank {rank}] relora: the training text supports a vocabulary of" in done.stderr
        assert f"[rank{rank}]: Traceback" not in done.stderr
    assert "failed (exitcode: 3)" in done.stderr
