"""The random states of a process <-> tensors and JSON: torch (CPU, CUDA), numpy's global one, Python's.

What a resumed run draws is then what the uninterrupted one would have drawn, from libraries too that draw
from the global streams (dropout, data loaders). No pickle: the states are arrays of integers and a few
numbers beside them.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relora.checkpoint.strict_json import shown
from relora.errors import CheckpointError

_PYTHON_VERSION = 3  # of random.getstate's layout, since Python 3.2
_MERSENNE = "MT19937"
_MERSENNE_WORDS = 624


@dataclass(frozen=True, kw_only=True)
class RngRestoreReport:
    """Which random streams go on where they were."""

    restored: tuple[str, ...]
    """Such as "torch", "numpy", "python", "cuda.0"."""
    not_restored: tuple[str, ...]
    """Streams of devices that this machine lacks, or that were not in use when the state was saved."""


def seed_rng_(seed: int) -> None:
    """Begin all random streams of this process anew, the same for the same seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the random states of this process; `restore_rng_` puts them back.

    Returns:
        The states' integers as tensors by stream, and a JSON state with the rest.

    Raises:
        CheckpointError: if numpy's global generator was replaced by one of another kind.
    """
    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    if not isinstance(legacy, dict) or legacy["bit_generator"] != _MERSENNE:
        raise CheckpointError(
            f"numpy's global random generator is no {_MERSENNE}: its state cannot be stored"
        )
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
    }
    # A process that has not used CUDA has drawn nothing there; asking would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "kind": _MERSENNE,
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
    }


def restore_rng_(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> RngRestoreReport:
    """Put captured random states back.

    Args:
        tensors: As `capture_rng` returned them.
        state: As `capture_rng` returned it.

    Returns:
        Which streams were restored.

    Raises:
        CheckpointError: naming the stream whose state is missing or malformed; none has changed then.
    """
    python_state = _checked("python", lambda: _python_state(tensors, state))
    numpy_state = _checked("numpy", lambda: _numpy_state(tensors, state))
    torch_state = _checked("torch", lambda: _torch_state(tensors["torch"], "cpu"))
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [f"cuda.{index}" for index in range(num_devices)]
    cuda = {
        name: _checked(name, partial(_torch_state, tensors[name], name.replace(".", ":")))
        for name in here
        if name in tensors
    }
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    for name, value in cuda.items():
        torch.cuda.set_rng_state(value, name.replace(".", ":"))
    elsewhere = {name for name in tensors if name.startswith("cuda.")}
    return RngRestoreReport(
        restored=("python", "numpy", "torch", *cuda),
        not_restored=tuple(sorted(elsewhere.symmetric_difference(here))),
    )


def _checked(stream: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the random state of {stream} is missing or malformed: {shown(str(error))}"
        ) from error


def _python_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> tuple[Any, ...]:
    found = state["python"]
    gauss = found["gauss"]
    if found["version"] != _PYTHON_VERSION or not (gauss is None or type(gauss) is float):
        raise ValueError(f"version {found['version']!r}, gauss {gauss!r}")
    candidate = (_PYTHON_VERSION, tuple(_words(tensors["python"], _MERSENNE_WORDS + 1)), gauss)
    random.Random().setstate(candidate)
    return candidate


def _numpy_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    found = state["numpy"]
    position, has_gauss, gauss = found["position"], found["has_gauss"], found["gauss"]
    # numpy checks none of this: a position beyond the array would read memory that is not its own.
    if type(position) is not int or not 0 <= position <= _MERSENNE_WORDS:
        raise ValueError(f"position {position!r}")
    if found["kind"] != _MERSENNE or has_gauss not in (0, 1) or type(gauss) is not float:
        raise ValueError(f"kind {found['kind']!r}, has_gauss {has_gauss!r}, gauss {gauss!r}")
    key = np.array(_words(tensors["numpy"], _MERSENNE_WORDS), dtype=np.uint32)
    return {
        "bit_generator": _MERSENNE,
        "state": {"key": key, "pos": position},
        "has_gauss": has_gauss,
        "gauss": gauss,
    }


def _words(tensor: Tensor, count: int) -> list[int]:
    if (
        tensor.shape != (count,)
        or tensor.dtype != torch.int64
        or bool(((tensor < 0) | (tensor >= 2**32)).any())
    ):
        raise ValueError(
            f"it should be {count} numbers of 32 bits, found {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor.tolist()


def _torch_state(tensor: Tensor, device: str) -> Tensor:
    torch.Generator(device).set_state(tensor)
    return tensor
