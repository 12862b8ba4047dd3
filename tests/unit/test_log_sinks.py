"""Sinks: strict JSON lines that survive a kill, and optional sinks that name their extra."""

import json
import math
import os
import stat
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.errors import CheckpointError, ConfigError
from relora.log.config import LogConfig
from relora.log.jsonl import JsonlSink, read_jsonl, strict_json
from relora.log.sinks import make_sinks


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def strict(line: str) -> dict[str, object]:
    loaded = json.loads(line, parse_constant=refuse)
    assert isinstance(loaded, dict)
    return loaded


def filled(path: Path, steps: list[int]) -> JsonlSink:
    sink = JsonlSink(path)
    for step in steps:
        sink.log({"step": step, "train/loss": 1 / step})
    return sink


def steps_of(path: Path) -> list[object]:
    return [record["step"] for record in read_jsonl(path).records]


def test_record_is_in_the_file_before_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"step": 1, "train/loss": 2.5, "phase": "full"})
    assert path.read_text() == '{"step": 1, "train/loss": 2.5, "phase": "full"}\n'
    sink.close()
    sink.close()


def test_records_of_a_killed_process_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys; from pathlib import Path; from relora.log.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(1, 51): sink.log({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    assert steps_of(path) == list(range(1, 51))


def test_non_finite_numbers_are_null_and_named() -> None:
    record = {"step": 3, "a": math.nan, "layers": [{"x": math.inf}, {"x": 1.0, "y": -math.inf}]}
    assert strict(strict_json(record)) == {
        "step": 3,
        "a": None,
        "layers": [{"x": None}, {"x": 1.0, "y": None}],
        "non_finite": {"a": "NaN", "layers.0.x": "Infinity", "layers.1.y": "-Infinity"},
    }


def test_numpy_numbers_are_written_as_numbers() -> None:
    assert strict(strict_json({"a": np.float32(0.5), "b": np.int64(7), "c": (1, 2)})) == {
        "a": 0.5,
        "b": 7,
        "c": [1, 2],
    }


def test_value_without_a_json_form_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"'layers\.1\.norm' holds a ndarray"):
        strict_json({"layers": [1, {"norm": np.zeros(3)}]})


finite_or_not = st.floats(width=64)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite_or_not | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_every_record_is_one_line_of_strict_json(record: dict[str, object]) -> None:
    line = strict_json(record)
    assert "\n" not in line
    assert line.isascii()
    strict(line)


def test_truncation_drops_later_steps_and_logging_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = filled(path, [10, 20, 30, 40])
    report = sink.truncate_after(20)
    sink.log({"step": 30})
    sink.close()
    assert (report.num_kept, report.num_later, report.num_damaged) == (2, 2, 0)
    assert steps_of(path) == [10, 20, 30]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 37))
def test_last_line_torn_anywhere_is_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, [10, 20]).close()
    whole = path.read_bytes()
    line = b'{"step": 30, "train/loss": 3.2, "x": 1}\n'
    path.write_bytes(whole + line[:cut])
    sink = JsonlSink(path)
    report = sink.truncate_after(1000)
    sink.close()
    assert report.num_damaged == 1
    assert path.read_bytes() == whole


def test_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with closing(JsonlSink(path)) as sink:
        sink.truncate_after(2)
        sink.log({"step": 3})
    assert steps_of(path) == [1, 2, 3]
    assert read_jsonl(path).damaged == ()


def test_appending_after_a_torn_line_keeps_the_new_record_readable(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "tr')
    with closing(JsonlSink(path)) as sink:
        sink.log({"step": 3})
    lines = read_jsonl(path)
    assert [record["step"] for record in lines.records] == [1, 3]
    assert lines.damaged == (2,)


def test_damaged_line_between_kept_records_stays_and_a_damaged_tail_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n{"step": 9}\n{}\n\x00\x00\n')
    with closing(JsonlSink(path)) as sink:
        report = sink.truncate_after(2)
    assert path.read_bytes() == b'{"step": 1}\n\xff\xfe\n{"step": 2}\n'
    assert (report.num_kept, report.num_later, report.num_damaged) == (3, 1, 2)


def test_truncation_to_step_0_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(filled(path, [1, 2])) as sink:
        sink.truncate_after(0)
    assert path.read_bytes() == b""


def test_the_first_records_are_kept_and_the_rest_dropped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\ntorn\n{"n": 2}\n{"n": 3}\n')
    with closing(JsonlSink(path)) as sink:
        sink.keep_first(2)
        sink.log({"n": 9})
        assert [record["n"] for record in read_jsonl(path).records] == [1, 2, 9]
        sink.keep_first(0)
        assert read_jsonl(path).records == ()


def test_a_record_is_amended_in_place_and_no_other_byte_changes(tmp_path: Path) -> None:
    path = tmp_path / "restarts.jsonl"
    path.write_bytes(b'{"step":  6, "a": 1e2}\nnot json\n{"step": 8}\n')
    with closing(JsonlSink(path)) as sink:
        sink.amend(8, {"hurt": True})
        sink.amend(7, {"hurt": True})
        sink.log({"step": 9})
        sink.sync()
    assert path.read_bytes() == b'{"step":  6, "a": 1e2}\nnot json\n{"step": 8, "hurt": true}\n{"step": 9}\n'


def test_truncation_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = filled(path, [1, 2, 3])
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: No space left on device"):
        sink.truncate_after(1)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    with closing(sink):
        sink.log({"step": 4})
    assert steps_of(path) == [1, 2, 3, 4]


def test_rewritten_file_keeps_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "other").write_text("")
    before = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    with closing(filled(path, [1])) as sink:
        sink.truncate_after(1)
    assert stat.S_IMODE(path.stat().st_mode) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_an_error_with_place_and_remedy() -> None:
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: No space left.*free space"):
        sink.log({"step": 1})
    with pytest.raises(CheckpointError, match="/dev/full"):
        sink.close()  # a device cannot be synced


def test_missing_folder_is_an_error_with_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        JsonlSink(tmp_path / "missing" / "metrics.jsonl")


def test_reading_a_file_that_is_not_there_gives_nothing(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl").records == ()


def test_metrics_jsonl_is_written_whatever_the_recipe_names(tmp_path: Path) -> None:
    (sink,) = make_sinks(LogConfig(sinks=()), tmp_path, "a run")
    sink.log({"step": 1})
    sink.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def test_resumed_sinks_drop_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    filled(tmp_path / "metrics.jsonl", [10, 20, 30]).close()
    (sink,) = make_sinks(LogConfig(), tmp_path, "a run", resume_after=20)
    sink.log({"step": 30, "again": True})
    sink.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [10, 20, 30]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_extra_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'pip install "relora\[{name}\]"'):
        make_sinks(LogConfig(sinks=("jsonl", name)), tmp_path, "a run", resume_after=0)
    assert list(tmp_path.iterdir()) == []


def test_config_lists_every_violation() -> None:
    assert LogConfig().violations() == []
    assert LogConfig(every=1, sinks=("tensorboard", "wandb")).violations() == []
    bad = LogConfig(every=0, sinks=("tensorbord", "jsonl", "jsonl")).violations()
    assert [line.split(" must ")[0] for line in bad] == ["every", "sinks", "sinks"]
    assert "'tensorbord'" in bad[1]
    assert LogConfig(every=True, sinks="jsonl").violations()[1].startswith("sinks must be a tuple")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="every must be at least 1"):
        make_sinks(LogConfig(every=-1), Path(), "a run")


def test_log_modules_load_without_torch() -> None:
    script = (
        "import sys, relora.log.config, relora.log.sinks, relora.log.console, relora.log.screen\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'wandb', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LogConfig(sinks=("tensorboard",))

    def train(steps: range, scale: float, resume_after: int | None) -> None:
        sinks = make_sinks(config, tmp_path, "a run", resume_after=resume_after)
        for step in steps:
            for sink in sinks:
                sink.log({"step": step, "train/loss": scale * step, "lr": math.nan, "phase": "full"})
        for sink in sinks:
            sink.close()

    train(range(1, 6), 1.0, None)
    train(range(4, 8), 10.0, 3)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, (1.0 if step <= 3 else 10.0) * step) for step in range(1, 8)
    ]
    assert sorted(events.Tags()["scalars"]) == ["lr", "train/loss"]


def test_wandb_run_is_resumed_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = '[run]\nname = "a run"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    ids = []
    for resume_after in (None, 3, 0):
        metrics, sink = make_sinks(LogConfig(sinks=("wandb",)), tmp_path, "a run", resume_after=resume_after)
        sink.log({"step": 4, "train/loss": 2.0})
        assert sink._run.config.as_dict() == tomllib.loads(recipe)  # type: ignore[attr-defined]
        ids.append(sink._run.id)  # type: ignore[attr-defined]
        sink.close()
        metrics.close()
    assert ids[0] == ids[1] != ids[2]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
