"""Commands as forks of one process: what they say, how they end, and that they outlive who asked for them."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from relora.lab.cell_files import try_lock
from relora.lab.forks import Fork
from relora.lab.processes import Launcher, Started
from relora.train.recipe_io import write_recipe
from tiny_run import tiny_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux alone")


@pytest.fixture
def launcher():
    launcher = Launcher(threads=1, environment={**os.environ, "OF_THE_SERVER": "1"})
    STARTED.clear()
    yield launcher
    for process in STARTED:
        process.send_signal(signal.SIGKILL)
    launcher.close()


STARTED: list[Started] = []


def started(launcher: Launcher, words: list[str], folder: Path) -> Started:
    lock = freed_lock(folder)
    with (folder / "log").open("ab") as log:
        process = launcher.start(words, log=log.fileno(), lock=lock)
    os.close(lock)
    STARTED.append(process)
    return process


def freed_lock(folder: Path) -> int:
    """A lock may be freed a moment after the pipe of the process that held it."""
    limit = time.monotonic() + 10
    while (lock := try_lock(folder / "lock")) is None:
        assert time.monotonic() < limit, "the lock stays taken"
        time.sleep(0.02)
    return lock


def end_of(process: Started, *, within_s: float = 120) -> int:
    limit = time.monotonic() + within_s
    while (code := process.poll()) is None:
        assert time.monotonic() < limit, "the command does not end"
        time.sleep(0.02)
    return code


def long_training(folder: Path) -> list[str]:
    write_recipe(tiny_recipe(folder, train={"steps": 3000}), folder / "long.toml")
    return ["train", str(folder / "long.toml")]


def wait_for_steps(folder: Path) -> None:
    limit = time.monotonic() + 120
    while not any(file.stat().st_size for file in folder.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < limit, (folder / "log").read_text()
        time.sleep(0.02)


def pid_and_parent(process: Started) -> tuple[int, int]:
    assert isinstance(process, Fork) and process.poll() is None and process.pid is not None
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return process.pid, int(fields[1])


def test_commands_end_with_their_codes_and_say_what_they_say_to_their_own_logs(launcher, tmp_path):
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder in folders:
        folder.mkdir()
    good = started(launcher, ["--version"], folders[0])
    bad = started(launcher, ["train", "nowhere.toml"], folders[1])
    assert isinstance(good, Fork)
    assert (end_of(good), end_of(bad)) == (0, 2)
    assert good.poll() == 0  # and again
    assert (folders[0] / "log").read_text().startswith("relora ")
    assert "nowhere.toml" in (folders[1] / "log").read_text()


def test_each_is_forked_from_the_same_process(launcher, tmp_path):
    parents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        process = started(launcher, long_training(tmp_path / name), tmp_path / name)
        wait_for_steps(tmp_path / name)
        pid, parent = pid_and_parent(process)
        parents.append(parent)
        assert b"OF_THE_SERVER=1" in Path(f"/proc/{pid}/environ").read_bytes()
        process.send_signal(signal.SIGKILL)
        assert end_of(process) == -signal.SIGKILL
    assert parents[0] == parents[1] != os.getpid()


def test_a_signal_before_the_fork_reaches_it_and_lets_it_save(launcher, tmp_path):
    words = long_training(tmp_path)
    process = started(launcher, words, tmp_path)
    process.send_signal(signal.SIGTERM)  # while the server is still importing
    assert end_of(process) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    process = started(launcher, words, tmp_path)
    wait_for_steps(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == 128 + signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # to one that has ended: nothing


def test_a_fork_outlives_the_server_and_holds_its_lock(launcher, tmp_path):
    process = started(launcher, long_training(tmp_path), tmp_path)
    wait_for_steps(tmp_path)
    launcher.close()
    assert process.poll() is None and try_lock(tmp_path / "lock") is None
    process.send_signal(signal.SIGKILL)
    assert end_of(process) == 1  # nobody is left who could tell
    os.close(freed_lock(tmp_path))


def test_a_fork_that_ends_after_its_server_still_says_how(launcher, tmp_path):
    process = started(launcher, long_training(tmp_path), tmp_path)
    wait_for_steps(tmp_path)
    launcher.close()
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == 128 + signal.SIGTERM


def test_the_server_has_one_thread_though_its_forks_may_have_more(tmp_path):
    launcher = Launcher(threads=2, environment=dict(os.environ))
    process = started(launcher, long_training(tmp_path), tmp_path)
    wait_for_steps(tmp_path)
    _, parent = pid_and_parent(process)
    threads = len(list(Path(f"/proc/{parent}/task").iterdir()))
    process.send_signal(signal.SIGKILL)
    assert end_of(process) == -signal.SIGKILL
    launcher.close()
    assert threads == 1


def test_a_server_that_was_killed_is_replaced(launcher, tmp_path):
    assert end_of(started(launcher, ["--version"], tmp_path)) == 0
    process = started(launcher, long_training(tmp_path), tmp_path)
    wait_for_steps(tmp_path)
    os.kill(pid_and_parent(process)[1], signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    assert end_of(process) == 1
    assert end_of(started(launcher, ["--version"], tmp_path)) == 0


def test_a_server_that_cannot_begin_fails_its_commands(tmp_path):
    launcher = Launcher(threads=1, environment={"PYTHONHOME": str(tmp_path)})
    assert end_of(started(launcher, ["--version"], tmp_path)) == 1
    assert "encodings" in (tmp_path / "log").read_text()
    launcher.close()
