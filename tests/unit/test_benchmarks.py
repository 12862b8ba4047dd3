"""The benchmarks run, and their results say what they should; no time is asserted."""

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.method.flops import layer_flops

FOLDER = Path(__file__).parents[2] / "benchmarks"
POSITIVE = ("_s", "_bytes", "flops", "speed", "median_s", "mb_per_s", "flop_limit", "tokens_per_s")

Quick = Callable[..., dict[str, Any]]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quick:
    """Run a benchmark in this process with --quick, and return what it wrote."""
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, *words: str) -> dict[str, Any]:
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", str(path), *words])
        import_module(name).main()
        result: dict[str, Any] = json.loads(path.read_bytes())
        assert (result["benchmark"], result["is_quick"], result["is_complete"]) == (name, True, True)
        check_numbers(result)
        return result

    return run


def check_numbers(result: dict[str, Any]) -> None:
    """Every number is finite, and those of quantities that cannot be 0 are above it."""
    for key, value in numbers(result):
        assert math.isfinite(value), key
        assert value > 0 or not key.endswith(POSITIVE), key


def numbers(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def test_steps_compares_every_method_that_is_installed(quick: Quick) -> None:
    result = quick("steps")
    steps = import_module("steps")
    (cell,) = result["cells"]
    assert {*cell["methods"], *result["absent"]} == set(steps.TIMED)
    assert set(result["absent"]) <= {"PEFT LoRA", "GaLore"}
    assert 0 < cell["wrapped_share_of_flops"] < 1
    for row in cell["methods"].values():
        assert {"median_s", "flops", "first_step_s", "over full"} <= set(row)
    assert [found["least"] for found in result["bars"]] == [1.0, 1.0]


def test_a_method_that_is_not_installed_is_named_as_absent(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = import_module("training").METHODS
    monkeypatch.setitem(methods, "GaLore", replace(methods["GaLore"], packages=("not_there",)))
    result = quick("steps", "--methods", "one-sided", "GaLore")
    assert result["absent"] == {"GaLore": "not_there not installed"}
    assert list(result["cells"][0]["methods"]) == ["full", "one-sided"]


def test_peft_and_relora_are_compared_on_the_same_number_of_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(FOLDER)
    training = import_module("training")
    plain = training.llama(64, 2)
    counts = set()
    for name in ("PEFT LoRA", "effective, factors only"):
        model = copy.deepcopy(plain)
        optimizer = training.METHODS[name].prepare(model, 8)
        counts.add(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
    assert len(counts) == 1


def test_the_flops_counted_in_a_step_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    training = import_module("training")
    plain, batch = training.llama(64, 2), training.token_batch(512)
    counted = {}
    for name in ("full", "effective"):
        model = copy.deepcopy(plain)
        optimizer = training.METHODS[name].prepare(model, 8)
        counted[name] = training.Stepper(model, optimizer, batch, precision="fp32").flops()
    saved = sum(
        6 * batch.numel() * m * n
        - layer_flops("effective", batch.numel(), out_features=m, in_features=n, rank=8, one_sided=False)
        for m, n in (weight.shape for weight in training.wrapped_matrices(plain))
    )
    assert counted["full"] - counted["effective"] == saved


def test_bars_stand_where_the_project_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    steps = import_module("steps")
    against = {"speed": 1.25, "speed_quartiles": [1.2, 1.3], "flop_limit": 1.3, "share_of_limit": 0.96}
    cell = {"hidden_size": 1024, "divisor": 16, "rank": 64, "precision": "bf16", "tokens": 2048}
    cell["methods"] = {name: {"over full": against} for name in ("effective", "one-sided", "auto")}
    found = {bar["what"].rpartition(": ")[2]: (bar["least"], bar["is_met"]) for bar in steps.bars([cell])}
    assert found == {
        "effective over full": (1.15, True),
        "one-sided over full": (1.20, True),
        "auto not slower than full": (1.0, True),
        "one-sided not slower than full": (1.0, True),
    }


def test_restart_counts_seconds_and_bytes(quick: Quick) -> None:
    result = quick("restart")
    restart = import_module("restart")
    assert set(result["results"]) == set(result["exponents"]) == set(restart.RESTARTED)
    assert all(len(rows) == 2 for rows in result["results"].values())


@pytest.mark.parametrize("method", ["auto, bf16 base", "one-sided, int8 base"])
def test_a_restart_needs_less_memory_than_a_layer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    row = import_module("restart").measure(320, method, tokens=256, rounds=1)
    assert 0 < row["peak_over_layer"] < 1


def test_data_speed_compares_with_the_library_alone(quick: Quick) -> None:
    result = quick("data_speed")
    assert set(result["whole"]["ways"]) == {"prepare", "tokenizers alone", "open prepared"}
    assert len(result["parts"]) == 2


def test_checkpoint_speed_compares_with_plain_files(quick: Quick) -> None:
    result = quick("checkpoint_speed")
    for row in result["sizes"].values():
        assert {"save", "copy", "load", "read", "checkpoint_bytes"} == set(row)


def test_startup_waits_for_the_first_step(quick: Quick) -> None:
    result = quick("startup")
    assert set(result["first_step_s"]) == {"quickstart, cold", "quickstart, warm"}
    assert [bar["most"] for bar in result["bars"]] == [0.5]


def test_overhead_accounts_for_the_whole_step(quick: Quick) -> None:
    row = quick("overhead")["cases"]["tiny"]
    assert set(row["shares"]) == {"forward", "backward", "optimizer", "clip", "method"}
    assert all(0 < share < 1 for share in row["shares"].values())
    assert 0 < row["overhead"] < row["overhead_with_clipping"] < 1
    assert sum(row["shares"].values()) + row["overhead_mean"] == pytest.approx(1)


def test_step_profile_finds_the_products_of_the_wrapped_layers(quick: Quick) -> None:
    (cell,) = quick("step_profile")["cells"]
    gflops = {name: row["gflops"] for name, row in cell["methods"].items()}
    # Forward and input gradient remain of three products a layer; rank-wide ones come in the third's place.
    assert gflops["effective"]["wide products"] == pytest.approx(gflops["full"]["wide products"] * 2 / 3)
    assert gflops["full"]["narrow products"] == 0
    assert 0 < gflops["one-sided"]["narrow products"] < gflops["effective"]["narrow products"]
    assert gflops["effective"]["other products"] == pytest.approx(gflops["full"]["other products"])
    bounds = [cell["methods"][name]["bound"] for name in ("full", "effective", "one-sided")]
    assert bounds[0] == 1 and bounds[1] < bounds[2]


@pytest.mark.parametrize("name", ["low_rank_linear", "kept_activations", "save_stall", "plan_accuracy"])
def test_other_benchmarks_run(name: str, quick: Quick) -> None:
    quick(name)


def test_gpu_says_what_it_needs_and_what_it_would_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    gpu = import_module("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--recipes", "llama-130m", "--curves", "120"])
    assert gpu.main() == 0
    planned = capsys.readouterr().out.splitlines()
    assert len(planned) == 2 * len(gpu.TRAINED) + 1
    assert "llama-130m, one-sided, compiled" in planned


def test_what_gpu_does_to_a_model_works_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    gpu = import_module("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "PAPER_VOCAB_SIZE", 300)
    row = gpu.Row(recipe="quickstart", method="one-sided", is_compiled=False, rounds=1, sequences=(1, 2))
    found = gpu.measure(row)
    assert [size["sequences"] for size in found["sizes"]] == [1, 2]
    assert found["restarts"]["num_new_graphs"] == 0
    check_numbers({key: found[key] for key in ("sizes", "parameters", "trainable")})


def test_run_keeps_a_result_of_the_same_code_and_tables_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    run = import_module("run")
    result = {
        "is_complete": True,
        "is_quick": False,
        "environment": {"commit": "abc", "has_changes": False},
        "bars": [{"what": "restart over a cycle", "value": 0.004, "most": 0.01, "is_met": True}],
    }
    (tmp_path / "restart.json").write_text(json.dumps(result))
    monkeypatch.setattr(run, "is_unchanged", lambda commit: commit == "abc")
    monkeypatch.setattr(sys, "argv", ["run", "restart", "startup", "--dry-run", "--out", str(tmp_path)])
    assert run.main() == 0
    shown = capsys.readouterr()
    assert "restart: measured already" in shown.err and "startup: 12 min" in shown.err
    assert "restart over a cycle" in shown.out and "<= 0.01" in shown.out
    assert run.result_of(tmp_path / "restart.json", is_quick=True) is None
    monkeypatch.setattr(run, "is_unchanged", lambda commit: False)
    assert run.result_of(tmp_path / "restart.json", is_quick=False) is None


def test_every_benchmark_of_the_suite_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    readme = (FOLDER / "README.md").read_text()
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert {benchmark.words[0] for benchmark in import_module("run").BENCHMARKS.values()} <= scripts
    assert [name for name in sorted(scripts) if f"`{name}`" not in readme] == []
