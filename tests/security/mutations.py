"""Mutations of files with a fixed seed: of their bytes, and of what their JSON says."""

import copy
import json
import random
from typing import Any

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308,
    "", "..", "../../etc/passwd", "/etc/passwd", "a/b.safetensors", "model.pt", "model.bin", "\x00", "\ud800",
    "model.safetensors", "state.json", "x" * 5000, [], {}, [[]], [0], ["a"], {"a": 1}, {"": None},
    [1, 2**62], [2**31, 2**31, 2**31], [-1], [0, 2**63], "F32", "U8", "Q4", {"tied": {"a": "b"}},
]  # fmt: skip
"""What no writer of ours puts where it ends up."""


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with one to four edits: flips, cuts, doublings, insertions, other numbers."""
    edited = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(edited) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(edited):
            edited[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del edited[at : at + chance.randint(1, 64)]
        elif kind == 2:
            del edited[at:]
        elif kind == 3:
            edited[at:at] = chance.randbytes(chance.randint(1, 16))
        elif kind == 4:
            edited[at:at] = edited[at : at + chance.randint(1, 200)]
        elif kind == 5:
            edited[at : at + 1] = chance.choice(
                [b"[" * 300, b'{"a":' * 300, b"9" * 30, b'"', b"\\", b"}", b","]
            )
        else:
            edited[at : at + 8] = chance.randrange(2**64).to_bytes(8, "little")
    return bytes(edited)


def mutated_json(value: Any, chance: random.Random) -> Any:
    """Return JSON with one to three of its nodes replaced, removed, renamed, moved or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return chance.choice(HOSTILE)
        parent, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(chance.choice(HOSTILE))[:50]] = parent.pop(key)
        elif kind == 2:
            other, from_key = chance.choice(places)
            if from_key in other if isinstance(other, dict) else from_key < len(other):
                parent[key] = copy.deepcopy(other[from_key])
        elif kind == 3:
            for _ in range(chance.choice([1, 5, 90])):
                parent[key] = [parent[key]]
        else:
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
    return value


def as_text(value: Any) -> bytes:
    """Return JSON text, lone surrogates and huge numbers included."""
    return json.dumps(value, indent=1).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)
