"""A real process that runs out of real memory says what was needed and what would lower it."""

import sys
from pathlib import Path

import pytest
from killing import Victims

from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by rlimit on Linux alone")
def test_running_out_of_memory_is_said_with_amounts_and_remedies(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, data={"seq_len": 128}, train={"steps": 6, "batch_size": 4096, "micro_batch_size": 4096}
    )
    write_recipe(recipe, tmp_path / "large.toml")
    victims = Victims()
    answer = victims.train(tmp_path / "large.toml", watched=False, memory=600 * 2**20)
    victims.close()
    assert answer["code"] == 2, answer["log"]
    said = answer["log"].rpartition("relora: ")[2]
    assert said.startswith("step 1: the memory of this device is not enough (an allocation of ")
    assert "weights take" in said and "optimizer states" in said
    assert "lower train.micro_batch_size (now 4096; the batch stays the same)" in said
    assert "train.gradient_checkpointing" in said and "data.seq_len (now 128)" in said
    assert "Traceback" not in answer["log"]
