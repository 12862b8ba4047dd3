"""Saving on a thread of its own: what is copied, and that nothing that goes wrong there is lost."""

import threading

import pytest
import torch
from checkpoint_samples import save

from relora.checkpoint.background import BackgroundWriter, copied
from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.errors import CheckpointError


def quiet(_: str) -> None:
    pass


def test_a_copy_stays_as_it_was_and_names_of_one_tensor_stay_one(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "embed": weight,
        "head": weight,
        "view": weight[:1],
        "turned": weight.T,
        "empty": torch.zeros(0),
    }
    copies = copied(tensors)
    weight.fill_(-1)
    assert copies["embed"] is copies["head"] and copies["embed"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copies["view"].tolist() == [[0, 1, 2]] and copies["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    path = save_checkpoint(tmp_path, step=1, tensors={"model": copies}, state={}, description={})
    loaded = load_checkpoint(path).tensors["model"]
    assert loaded["head"] is loaded["embed"] and loaded["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_copy_needs_no_gradient_and_keeps_dtype_and_conjugation():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    value = torch.tensor([1 + 2j]).conj()
    copies = copied({"p": parameter, "c": value})
    assert not copies["p"].requires_grad and copies["p"].dtype == torch.bfloat16
    assert copies["c"].resolve_conj().tolist() == [1 - 2j]


def test_what_a_job_raises_is_raised_once_where_it_is_asked():
    writer = BackgroundWriter(timeout_s=60, notice=quiet)

    def fail() -> None:
        raise CheckpointError("the disk is full")

    for ask in (writer.wait, writer.check, lambda: writer.submit("next", lambda: None)):
        writer.submit("a save", fail)
        assert writer._thread is not None
        writer._thread.join()
        with pytest.raises(CheckpointError, match="the disk is full"):
            ask()
        writer.check()
        writer.wait()


def test_one_job_is_in_flight_at_a_time_and_asking_does_not_wait():
    writer, gate, order = BackgroundWriter(timeout_s=60, notice=quiet), threading.Event(), []
    writer.submit("first", lambda: (gate.wait(), order.append("first")))
    writer.check()
    assert order == []
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    writer.submit("second", lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]


def test_a_disk_that_hangs_ends_the_run_in_words_and_leaves_the_checkpoint_before(tmp_path):
    before = save(tmp_path, 1)
    gate, said = threading.Event(), []
    writer = BackgroundWriter(timeout_s=0.05, notice=said.append)

    def hang(action: str, path: object) -> None:
        if action == "fsync":
            gate.wait()

    writer.submit("the checkpoint of step 2", lambda: save(tmp_path, 2, observer=hang))
    with pytest.raises(CheckpointError, match=r"step 2: the disk has not taken it within 0.05 s.*timeout_s"):
        writer.wait()
    assert said == ["waiting for the disk: the checkpoint of step 2"]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    assert load_checkpoint(before).step == 1
    gate.set()
    assert writer._thread is not None
    writer._thread.join()
    writer.wait()
