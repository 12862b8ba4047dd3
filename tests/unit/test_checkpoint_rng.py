"""Random states taken through a checkpoint: every stream draws what it would have drawn."""

import random

import numpy as np
import pytest
import torch

from relora.checkpoint.rng import capture_rng, restore_rng_
from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.errors import CheckpointError


@pytest.fixture(autouse=True)
def streams_as_before():
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def draw() -> list[float]:
    layer = torch.nn.Dropout(0.5)
    return [
        *torch.rand(3).tolist(),
        *torch.randn(5).tolist(),
        *layer(torch.ones(8)).tolist(),
        random.random(),
        random.gauss(0, 1),
        random.randrange(10**30),
        *np.random.rand(3).tolist(),
        np.random.standard_normal(),
    ]


@pytest.mark.parametrize("used", [0, 1, 2])
def test_every_stream_goes_on_where_it_was(tmp_path, used):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    for _ in range(used):  # an odd number leaves the second half of a pair of normal numbers in waiting
        draw()
    tensors, state = capture_rng()
    expected = draw() + draw()
    path = save_checkpoint(tmp_path, step=1, tensors={"rng": tensors}, state={"rng": state}, description={})
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    loaded = load_checkpoint(path)
    report = restore_rng_(loaded.tensors["rng"], loaded.state["rng"])
    assert {"python", "numpy", "torch"} <= set(report.restored)
    assert draw() + draw() == expected


def test_capturing_draws_nothing():
    torch.manual_seed(5)
    capture_rng()
    first = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1))


def test_streams_of_devices_that_are_not_here_are_named():
    tensors, state = capture_rng()
    report = restore_rng_({**tensors, "cuda.77": tensors["torch"]}, state)
    assert "cuda.77" in report.not_restored


BAD_STATES = {
    "numpy position": lambda tensors, state: state["numpy"].update(position=625),
    "numpy position text": lambda tensors, state: state["numpy"].update(position="1"),
    "numpy kind": lambda tensors, state: state["numpy"].update(kind="PCG64"),
    "numpy gauss": lambda tensors, state: state["numpy"].update(gauss=None),
    "numpy words": lambda tensors, state: tensors.update(numpy=tensors["numpy"][:-1]),
    "numpy range": lambda tensors, state: tensors.update(numpy=tensors["numpy"] - 2**33),
    "numpy missing": lambda tensors, state: tensors.pop("numpy"),
    "python version": lambda tensors, state: state["python"].update(version=2),
    "python gauss": lambda tensors, state: state["python"].update(gauss="0"),
    "python position": lambda tensors, state: tensors["python"][-1].fill_(1000),
    "python missing": lambda tensors, state: state.pop("python"),
    "python text": lambda tensors, state: state.update(python="x"),
    "torch size": lambda tensors, state: tensors.update(torch=tensors["torch"][:-1]),
    "torch dtype": lambda tensors, state: tensors.update(torch=tensors["torch"].float()),
    "torch content": lambda tensors, state: tensors["torch"].zero_(),
    "torch missing": lambda tensors, state: tensors.pop("torch"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_malformed_states_are_named_and_no_stream_changes(case):
    tensors, state = capture_rng()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    good_tensors, good_state = capture_rng()
    expected = draw()
    restore_rng_(good_tensors, good_state)
    BAD_STATES[case](tensors, state)
    with pytest.raises(
        CheckpointError, match=f"the random state of {case.split()[0]} is missing or malformed"
    ):
        restore_rng_(tensors, state)
    assert draw() == expected
