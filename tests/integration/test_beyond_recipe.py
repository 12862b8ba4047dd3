"""The shipped recipe `beyond`: cold from the first step, and the same run at full rank by one word."""

import json
from pathlib import Path

import pytest

from relora.train.fit import fit
from relora.train.recipe_io import load_recipe
from tiny_run import write_text

# As shipped but for its size: the text, the model and the length of a test.
SMALL = {
    "model": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1},
    "data": {"source": "text", "vocab_size": 300, "seq_len": 16, "heldout_fraction": 0.2},
    "relora": {"restart_every": 4},
    "schedule": {"warmup_steps": 2},
    "train": {"steps": 10, "batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
    "eval": {"every": 0, "sequences": 8},
    "log": {"every": 1},
}


@pytest.mark.parametrize("method", ["relora", "full"])
def test_it_trains_a_few_steps_and_by_full_too(tmp_path: Path, method: str) -> None:
    text = write_text(tmp_path / "text")
    places = {"data": {"path": str(text), "cache_dir": str(tmp_path / "cache")}}
    run = {"run": {"method": method, "out": str(tmp_path / "runs")}}
    recipe = load_recipe("beyond", {**SMALL, **run, "data": {**SMALL["data"], **places["data"]}})
    folder = fit(recipe).folder
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in metrics} == {"low_rank" if method == "relora" else "full"}
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.1
    assert max(line["lr"] for line in metrics) == pytest.approx(2e-3 if method == "relora" else 4e-3)
    summary = json.loads((folder / "summary.json").read_text())
    restarts = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    assert [restart["step"] for restart in restarts] == ([4, 8] if method == "relora" else [])
    assert all(restart["num_states"] == 0 and not restart["unmoved_layers"] for restart in restarts)
    if method == "relora":
        assert summary["parameters_trainable"] < summary["parameters_total"]
        # lora_B (rank 32) and the rest by AdamW, and 2 bytes for each weight of the base.
        factors, base = 32 * (5 * 48 + 2 * 64), 4 * 48 * 48 + 3 * 48 * 64
        assert summary["optimizer_bytes"] - 8 * summary["parameters_trainable"] - 2 * base in range(0, 500)
        # Weights, frozen lora_A among them, and rotary frequencies.
        lora_A = 32 * (6 * 48 + 64)
        assert summary["parameters_total"] > base + factors + lora_A
        assert summary["weight_bytes"] - 4 * summary["parameters_total"] in range(0, 500)
