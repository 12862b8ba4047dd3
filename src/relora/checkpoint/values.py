"""Python values with tensors in them <-> JSON and named tensors, without loss of type or bit.

JSON keeps None, booleans, whole and finite numbers, and texts as they are. The others become an object with
one key that says what they are: {"tensor": key, "shape": ..., "dtype": ...}, {"tuple": [...]}, {"list":
[...]}, {"dict": {...}}, {"float": "inf"}. As every dict is wrapped, no value of a user can be taken for one
of these.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from relora.checkpoint.strict_json import shown
from relora.errors import CheckpointError

Placer = Callable[[Tensor], Tensor]


def encode(value: object, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; its tensors are added to `tensors` under names that begin with `key`.

    Raises:
        CheckpointError: naming the place of a value that is neither.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        return _encode_tensor(value, key, tensors)
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": encode_items(value, key, tensors)}
    raise CheckpointError(
        f"cannot store {key}: a {type(value).__name__} is neither a tensor nor a JSON value; "
        "use numbers, texts, lists, tuples and dicts"
    )


def encode_items(values: Mapping[Any, object], key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a mapping with text keys as a JSON object of encoded values.

    Raises:
        CheckpointError: as `encode`.
    """
    strange = [name for name in values if not isinstance(name, str)]
    if strange:
        raise CheckpointError(f"cannot store {key}: its key {shown(strange[0])} is no text")
    return {name: encode(value, f"{key}/{name}", tensors) for name, value in values.items()}


def decode(encoded: Any, tensors: Mapping[str, Tensor], place: Placer) -> Any:
    """Return the value that `encode` turned into JSON.

    Args:
        encoded: The JSON.
        tensors: All tensors by name.
        place: Makes the tensor to hand out from a stored one: its own copy, where it belongs.

    Raises:
        CheckpointError: if a tensor is missing or differs from what the JSON says, or the JSON is malformed.
    """
    if encoded is None or isinstance(encoded, bool | int | float | str):
        return encoded
    if isinstance(encoded, dict) and "tensor" in encoded:
        return place(_stored_tensor(encoded, tensors))
    if not isinstance(encoded, dict) or len(encoded) != 1:
        raise CheckpointError(f"{shown(encoded)} is not an encoded value")
    kind, inner = next(iter(encoded.items()))
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind in ("tuple", "list") and isinstance(inner, list):
        items = [decode(item, tensors, place) for item in inner]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(inner, dict):
        return {name: decode(item, tensors, place) for name, item in inner.items()}
    raise CheckpointError(f"{shown(encoded)} is not an encoded value")


def tensor_keys(encoded: Any) -> set[str]:
    """Return the names of the tensors that encoded JSON refers to."""
    if isinstance(encoded, dict) and isinstance(encoded.get("tensor"), str):
        return {encoded["tensor"]}
    inner = encoded.values() if isinstance(encoded, dict) else encoded if isinstance(encoded, list) else ()
    return {key for item in inner for key in tensor_keys(item)}


def _encode_tensor(value: Tensor, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if key in tensors:
        raise CheckpointError(f"cannot store {key}: two tensors would have this name")
    tensors[key] = value.detach()
    return {"tensor": key, "shape": list(value.shape), "dtype": dtype_name(value)}


def _stored_tensor(encoded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    key = encoded["tensor"]
    if not isinstance(key, str) or key not in tensors:
        raise CheckpointError(f"the tensor {shown(key)} is missing")
    tensor = tensors[key]
    found = [list(tensor.shape), dtype_name(tensor)]
    expected = [encoded.get("shape"), encoded.get("dtype")]
    if found != expected:
        raise CheckpointError(f"the tensor {key} should be {shown(expected)}, found {shown(found)}")
    return tensor


def dtype_name(tensor: Tensor) -> str:
    """Return a dtype as JSON text, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
