"""Real processes killed at every operation of a save, and inside its writes: a valid checkpoint remains."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import checkpoint_victim
import pytest
import torch

import relora
from relora.checkpoint.store import latest_valid, load_checkpoint, save_checkpoint, verify_checkpoint
from relora.errors import CheckpointError

NOBODY = 65534

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")


class Victims:
    """The process that forks victims, seen from the test."""

    def __init__(self) -> None:
        command = [sys.executable, checkpoint_victim.__file__]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(relora.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, "signal": "SIGKILL", **request}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    victims = Victims()
    yield victims
    victims.close()


def save(root: Path, step: int) -> Path:
    content = checkpoint_victim.content(step)
    return save_checkpoint(root, step=step, **content, description={"restart_index": step})


def assert_holds(path: Path, step: int) -> None:
    """Check that a checkpoint is the whole of a step, bit for bit."""
    loaded = load_checkpoint(path)
    expected = checkpoint_victim.content(step)
    assert loaded.step == step
    assert loaded.state == expected["state"]
    assert loaded.manifest["restart_index"] == step
    assert {key: set(group) for key, group in loaded.tensors.items()} == {
        key: set(group) for key, group in expected["tensors"].items()
    }
    for key, group in expected["tensors"].items():
        for name, tensor in group.items():
            assert torch.equal(loaded.tensors[key][name], tensor)


def temporaries(root: Path) -> list[Path]:
    return list(root.glob(".step-*"))


def kill_at_every_operation(victims: Victims, prepared: Path, do: str, **request: Any) -> Iterator[Path]:
    """Yield copies of a folder as victims leave them, killed before operation 0, 1, ... until none is."""
    for operations in count():
        root = prepared.with_name(f"killed-{operations}")
        shutil.copytree(prepared, root)
        answer = victims.run(do, root=str(root), operations=operations, **request)
        assert answer["code"] in (0, -signal.SIGKILL), answer
        yield root
        shutil.rmtree(root)
        if answer["code"] == 0:
            return


def test_a_save_killed_at_any_operation_leaves_the_old_or_the_new_checkpoint_whole(victims, tmp_path):
    save(tmp_path / "prepared", 1)
    found_steps = []
    for root in kill_at_every_operation(victims, tmp_path / "prepared", "save", step=2):
        path, problems = latest_valid(root)
        assert path is not None
        assert problems == []
        found_steps.append(int(path.name.removeprefix("step-")))
        assert_holds(path, found_steps[-1])
        assert_holds(save(root, 3), 3)
        assert temporaries(root) == []
        assert_holds(root / "step-00000001", 1)
    # create, 4 x (write, fsync), fsync of the folder, rename | fsync of the parent, verify, and none.
    assert found_steps == [1] * 11 + [2] * 3


def test_the_first_save_killed_at_any_operation_leaves_nothing_or_all(victims, tmp_path):
    (tmp_path / "prepared").mkdir()
    found = []
    for root in kill_at_every_operation(victims, tmp_path / "prepared", "save", step=1):
        path, problems = latest_valid(root)
        assert problems == []
        found.append(path is not None)
        if path is not None:
            assert_holds(path, 1)
    assert found == [False] * 11 + [True] * 3


def test_replacing_a_damaged_checkpoint_killed_at_any_operation_keeps_the_older_one(victims, tmp_path):
    save(tmp_path / "prepared", 1)
    (save(tmp_path / "prepared", 2) / "state.json").write_bytes(b"{}")
    found_steps = []
    for root in kill_at_every_operation(victims, tmp_path / "prepared", "save", step=2):
        path, _ = latest_valid(root)
        assert path is not None
        found_steps.append(int(path.name.removeprefix("step-")))
        assert_holds(path, found_steps[-1])
        assert_holds(save(root, 3), 3)
        assert temporaries(root) == []
    # One operation more before the new one is in place, and one more after: the damaged one goes aside.
    assert found_steps == [1] * 12 + [2] * 4


def test_a_save_killed_while_it_sweeps_is_swept_by_the_next(victims, tmp_path):
    prepared = tmp_path / "prepared"
    save(prepared, 1)
    assert victims.run("save", root=str(prepared), step=2, operations=6)["code"] == -signal.SIGKILL
    left = {path.name for path in temporaries(prepared)}
    assert len(left) == 1
    for root in kill_at_every_operation(victims, prepared, "save", step=2):
        path, problems = latest_valid(root)
        assert path is not None
        assert problems == []
        save(root, 3)
        assert temporaries(root) == []


def test_retiring_killed_at_any_operation_leaves_only_whole_checkpoints(victims, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "prepared", step)
    counts = []
    for root in kill_at_every_operation(victims, tmp_path / "prepared", "retire"):
        left = sorted(root.glob("step-*"))
        assert all(verify_checkpoint(path) == [] for path in left)
        assert_holds(left[-1], 3)
        counts.append(len(left))
        assert_holds(save(root, 4), 4)
        assert temporaries(root) == []
    assert counts == [3, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", "optimizer.safetensors", "manifest.json"]
)
def test_a_save_killed_inside_a_write_leaves_the_old_checkpoint(victims, tmp_path, name):
    size = (save(tmp_path / "measure", 2) / name).stat().st_size
    save(tmp_path / "root", 1)
    for limit in sorted({0, 1, 8, size // 3, size // 2, size - 1}):
        answer = victims.run("save", root=str(tmp_path / "root"), step=2, signal="SIGXFSZ", file_limit=limit)
        assert answer["code"] == -signal.SIGXFSZ
        assert latest_valid(tmp_path / "root") == (tmp_path / "root" / "step-00000001", [])
        assert_holds(tmp_path / "root" / "step-00000001", 1)
    assert_holds(save(tmp_path / "root", 2), 2)
    assert temporaries(tmp_path / "root") == []


def test_a_file_that_the_disk_does_not_take_is_reported_in_words_and_nothing_is_lost(victims, tmp_path):
    size = (save(tmp_path, 1) / "model.safetensors").stat().st_size
    for limit in (0, 100, size // 2, size - 1):
        answer = victims.run("save", root=str(tmp_path), step=2, file_limit=limit)
        assert answer["code"] == checkpoint_victim.REFUSED
        assert "the file would be larger than this disk or this process allows" in answer["complaint"]
        assert "cannot write" in answer["complaint"] or "cannot lock" in answer["complaint"]
        assert temporaries(tmp_path) == []
    assert_holds(tmp_path / "step-00000001", 1)
    assert latest_valid(tmp_path)[0] == tmp_path / "step-00000001"


def test_a_folder_that_may_not_be_written_is_reported_in_words(victims, tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".lock").unlink()
    tmp_path.chmod(0o555)
    user = NOBODY if os.geteuid() == 0 else None  # for root, permissions refuse nothing
    answer = victims.run("save", root=str(tmp_path), step=2, user=user)
    tmp_path.chmod(0o755)
    assert answer["code"] == checkpoint_victim.REFUSED
    assert "permission denied" in answer["complaint"]
    assert str(tmp_path) in answer["complaint"]
    assert_holds(tmp_path / "step-00000001", 1)


def test_a_living_writers_folder_is_not_swept_and_a_dead_ones_is(victims, tmp_path):
    save(tmp_path, 1)
    victim = victims.run("save", root=str(tmp_path), step=2, signal="SIGSTOP", operations=5)
    assert victim["stopped"]
    kept = temporaries(tmp_path)
    assert len(kept) == 1
    with pytest.raises(CheckpointError, match=f"process {victim['pid']} on .* is writing"):
        save(tmp_path, 3)
    assert temporaries(tmp_path) == kept
    assert latest_valid(tmp_path)[0] == tmp_path / "step-00000001"
    assert victims.run("end", pid=victim["pid"])["code"] == -signal.SIGKILL
    assert_holds(save(tmp_path, 3), 3)
    assert temporaries(tmp_path) == []
