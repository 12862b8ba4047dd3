"""Signals to real training processes: what is saved, the exit code, and that the rest of it is the same."""

import re
import signal
from collections.abc import Iterator

import pytest
from killing import Trial, Victims

from relora.checkpoint.store import latest_valid, verify_checkpoint

BACKWARD_OF_STEP_7 = ["agree", "return", 7]
SECOND_GROUP_OF_STEP_7 = ["write_tensors", "return", 11]  # steps 3, 4 and 6 had three each


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    victims = Victims()
    yield Trial(victims, tmp_path_factory.mktemp("trial"))
    victims.close()


def newest(trial: Trial, name: str) -> str:
    path, problems = latest_valid(trial.run_folder(name) / "checkpoints")
    assert path is not None and problems == []
    return path.name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_first_signal_ends_the_step_saves_it_and_the_run_goes_on_the_same(trial: Trial, name: str) -> None:
    recipe = trial.file(name)
    answer = trial.victims.train(recipe, at_functions=[[*BACKWARD_OF_STEP_7, name]])
    assert answer["code"] == 128 + signal.Signals[name]
    assert "stopped after step 7; the same command resumes" in answer["log"]
    assert newest(trial, name) == "step-00000007"
    assert trial.victims.train(recipe, watched=False)["code"] == 0
    assert trial.differences(name) == []


def test_a_second_signal_ends_it_at_once_and_the_checkpoint_before_is_intact(trial: Trial) -> None:
    recipe = trial.file("twice")
    second = [*SECOND_GROUP_OF_STEP_7, "SIGINT"]
    answer = trial.victims.train(recipe, at_functions=[[*BACKWARD_OF_STEP_7, "SIGTERM"], second])
    assert answer["code"] == -signal.SIGINT, answer["log"]
    assert re.findall(r"SIG\w+ IN", answer["log"]) == ["SIGTERM IN", "SIGINT IN"]
    assert newest(trial, "twice") == "step-00000006"
    assert list((trial.run_folder("twice") / "checkpoints").glob(".*.tmp"))  # it was in the middle of a save
    assert trial.victims.train(recipe, watched=False)["code"] == 0
    assert trial.differences("twice") == []


def test_a_request_to_save_is_served_and_training_goes_on_the_same(trial: Trial) -> None:
    recipe = trial.file("usr1")
    answer = trial.victims.train(recipe, at_functions=[[*BACKWARD_OF_STEP_7, "SIGUSR1"]])
    assert answer["code"] == 0
    extra = trial.run_folder("usr1") / "checkpoints" / "step-00000007"
    assert verify_checkpoint(extra) == []
    assert not (trial.whole / "checkpoints" / extra.name).exists()
    assert trial.differences("usr1") == []


def test_a_request_to_save_before_training_has_begun_does_not_end_the_process(trial: Trial) -> None:
    recipe = trial.file("early", every=0)
    answer = trial.victims.train(recipe, before_training=["prepare", "SIGUSR1"])
    assert answer["code"] == 0 and "SIGUSR1 IN" in answer["log"]
    assert (trial.run_folder("early") / "checkpoints" / "step-00000001").is_dir()


def test_a_signal_in_the_last_step_lets_the_run_finish(trial: Trial) -> None:
    answer = trial.victims.train(trial.file("last"), at_functions=[["agree", "return", 12, "SIGTERM"]])
    assert answer["code"] == 0
    assert trial.differences("last") == []
