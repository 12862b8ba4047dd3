"""The table in docs/memory.md is what its script gives, and the script agrees with the planner's trace."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from relora.lab.planner.footprint import footprint
from relora.lab.planner.plan import with_settings

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_table"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_what_the_script_gives(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.with_table(page, script.table())


@pytest.mark.parametrize(("factors", "store"), [("both", "int8"), ("B", "bf16")])
def test_the_script_agrees_with_the_trace(script: ModuleType, factors: str, store: str) -> None:
    sizes = {"preset": None, "hidden_size": 160, "intermediate_size": 200}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = script.recipe_of("paper-60m", factors)
    recipe = with_settings(recipe, {f"model.{name}": value for name, value in {**sizes, **depth}.items()})
    recipe = with_settings(recipe, {"data.seq_len": 9, "train.micro_batch_size": 1})
    mine = script.held(recipe, store)
    stored = with_settings(recipe, {"relora.base_dtype": store, "relora.master": "host"})
    traced = footprint(stored, low_rank=True, precision="bf16", device="cuda")
    # A few bytes more: rotary frequencies, and a step count for each tensor that trains.
    assert traced.weights_bytes == pytest.approx(mine.weights, abs=512)
    assert traced.factors_bytes == mine.factors and traced.host_bytes == mine.host
    assert traced.gradients_bytes == mine.gradients
    assert traced.optimizer_bytes == pytest.approx(mine.states, abs=512)
