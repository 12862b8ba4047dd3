"""Named tensors <-> one safetensors file, bit for bit, with a digest of what memory holds.

The digest of a file that is written is taken from the tensors in memory, not from the file: reading the file
back then shows that the disk holds what the run held. The digest of a file that is loaded is taken from the
tensors that are handed out, so nothing can change between the check and the use.

Tensors that share memory: names of the very same tensor (tied weights) are stored once, and come back as one
tensor under all of the names. Tensors that merely overlap are stored in full each and come back independent.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora.checkpoint.files import disk_errors, open_regular
from relora.checkpoint.strict_json import listed, shown
from relora.errors import CheckpointError

HEADER_LIMIT_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 32
MAX_SIDES_PRODUCT = 2**60

_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPE_CODES = frozenset(_DTYPES.values())


def check_storable(tensors: Mapping[str, Tensor], *, place: str) -> None:
    """Refuse what a file of plain tensors cannot hold, before anything is written.

    Raises:
        CheckpointError: naming each tensor that is sparse, quantized, on the meta device, distributed, or of
            a dtype that safetensors lacks.
    """
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{place} holds {len(tensors)} tensors; at most {MAX_TENSORS} go into one file")
    problems = [problem for name, tensor in tensors.items() for problem in _storable_problems(name, tensor)]
    if problems:
        raise CheckpointError(f"{place} cannot be stored: {listed(problems)}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Write tensors into a new safetensors file.

    Args:
        path: The file; its folder exists.
        tensors: By name, of any layout and device; checked by `check_storable`.

    Returns:
        The sha256 that the file must have, and the tied names, each with the name it is stored under.

    Raises:
        CheckpointError: if the disk refuses.
    """
    stored, tied = _stored(tensors)
    with disk_errors("write", path):
        save_file(stored, path)
        with _opened(path) as file:
            order = file.offset_keys()
    return _memory_digest(_header(path), [stored[name] for name in order]), tied


def read_tensors(path: Path, tied: Mapping[str, str]) -> tuple[dict[str, Tensor], str]:
    """Read a safetensors file into memory of its own.

    Args:
        path: The file; links and devices are refused.
        tied: Names that are not stored, each with the stored name of the same tensor.

    Returns:
        The tensors by name, and the sha256 of the file as they and its header give it.

    Raises:
        CheckpointError: if it is no safetensors file, or out of bounds.
    """
    header = _header(path)
    check_structure(path, tied)
    try:
        with disk_errors("read", path), _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path.name} holds what cannot be read: {shown(str(error))}") from error
    digest = _memory_digest(header, list(tensors.values()))
    return tensors | {name: tensors[stored] for name, stored in tied.items()}, digest


def check_structure(path: Path, tied: Mapping[str, str]) -> list[str]:
    """Check a file's header against its size and our bounds, without reading a tensor.

    The library checks every shape against its bytes, and that tensors fill the file without gap or overlap.

    Returns:
        The names of its tensors.

    Raises:
        CheckpointError: naming what is wrong.
    """
    _header(path)
    try:
        with _opened(path) as file:
            names = file.offset_keys()
            if len(names) > MAX_TENSORS:
                raise CheckpointError(
                    f"{path.name} holds {len(names)} tensors, at most {MAX_TENSORS} are allowed"
                )
            problems = [problem for name in names for problem in _slice_problems(name, file.get_slice(name))]
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path.name} is not a safetensors file: {shown(str(error))}") from error
    stored = set(names)
    problems += [f"tied name {shown(name)} is stored itself" for name in tied if name in stored]
    problems += [f"tied name {shown(name)} has no tensor" for name in tied if tied[name] not in stored]
    if problems:
        raise CheckpointError(f"{path.name}: {listed(problems)}")
    return list(names)


def _opened(path: Path) -> safe_open:
    # pread gives tensors memory of their own; a memory map would change, or fault, with the file under it.
    return safe_open(path, framework="pt", backend="pread")


def _header(path: Path) -> bytes:
    with open_regular(path) as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or length > HEADER_LIMIT_BYTES:
            raise CheckpointError(
                f"{path.name} is not a safetensors file: its header should have at most {HEADER_LIMIT_BYTES} "
                f"bytes, found {length}"
            )
        return start + file.read(length)


def _slice_problems(name: str, found: object) -> list[str]:
    dtype, shape = found.get_dtype(), found.get_shape()  # type: ignore[attr-defined]
    problems = [] if dtype in _DTYPE_CODES else [f"{shown(name)} has the unsupported dtype {shown(dtype)}"]
    if len(shape) > MAX_DIMENSIONS:
        problems.append(f"{shown(name)} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} allowed")
    # A 0 among the sides needs no bytes, and so gets past the check against the file's size.
    elif math.prod(max(side, 1) for side in shape) > MAX_SIDES_PRODUCT:
        problems.append(f"{shown(name)} has the shape {shown(shape)}, which is too large")
    return problems


def _storable_problems(name: object, tensor: object) -> list[str]:
    if not isinstance(name, str) or name == _METADATA_KEY:
        return [f"{shown(name)} cannot name a tensor"]
    if not isinstance(tensor, Tensor):
        return [f"{name} is a {type(tensor).__name__}, not a tensor"]
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return [f"{name} is a {type(tensor).__name__}: gather it into a plain tensor first"]
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return [f"{name} is sparse, quantized, or on the meta device: make it a plain dense tensor first"]
    if tensor.dtype not in _DTYPES or tensor.dim() > MAX_DIMENSIONS:
        return [f"{name} has {tensor.dim()} dimensions of {tensor.dtype}, which is not supported"]
    return []


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous CPU tensors without overlap, and the tied names."""
    first_of: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        same = (tensor.device, tensor.data_ptr(), *view)
        # A tensor without elements has no memory to share.
        first = first_of.setdefault(same, name) if tensor.numel() else name
        if first == name:
            stored[name] = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        else:
            tied[name] = first
    return _without_overlap(stored), tied


def _without_overlap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart = dict(tensors)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart


def _memory_digest(header: bytes, tensors: list[Tensor]) -> str:
    digest = hashlib.sha256(header)
    for tensor in tensors:
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
