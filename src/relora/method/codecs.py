"""How the device may hold a frozen base in fewer bits, while the exact base waits in host memory.

A codec turns rows of a weight into codes and scales and back; each row is coded by itself, so that merges go
over blocks of rows and `stored[rows]` is what coding those rows alone would give. "int8" is here: 64 weights
share the scale max|w| / 127. "nf4" is in `relora.integrations.bitsandbytes`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from relora.errors import ConfigError
from relora.method.plugins import load_plugins

BLOCK = 64


class BaseCodec(Protocol):
    """One format of a stored base."""

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of (rows, columns) float32 values, each with as many rows."""

    def decode(self, stored: Tensor, scale: Tensor, *, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the (rows, columns) values that codes and scales stand for, in `dtype`."""


class Int8:
    """Symmetric 8-bit integers, 64 to a scale: relative error 0.6 % of a Gaussian weight."""

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Round to the nearest of 255 steps; a block of zeros has scale 0."""
        blocks = in_blocks(rows)
        scale = blocks.abs().amax(2) / 127
        steps = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
        return steps.round().to(torch.int8).flatten(1), scale

    def decode(self, stored: Tensor, scale: Tensor, *, columns: int, dtype: torch.dtype) -> Tensor:
        """Multiply codes and scales, in float32 rounded once."""
        values = stored.view(*scale.shape, BLOCK) * scale.unsqueeze(2)
        return values.flatten(1)[:, :columns].to(dtype)


def in_blocks(rows: Tensor) -> Tensor:
    """Return (rows, blocks, 64), the last block of each row filled up with zeros."""
    padded = F.pad(rows, (0, -rows.shape[1] % BLOCK))
    return padded.view(rows.shape[0], -1, BLOCK)


_CODECS: dict[str, BaseCodec] = {"int8": Int8()}


def register_base_codec(name: str, codec: BaseCodec) -> None:
    """Give a `base_dtype` its codec; a later codec of the same name replaces the earlier."""
    _CODECS[name] = codec


def base_codec(name: str) -> BaseCodec | None:
    """Return the codec of a `base_dtype`; None for one that needs none.

    Raises:
        ConfigError: if its package is missing or was never imported.
    """
    if name in ("keep", "bf16"):
        return None
    if name not in _CODECS:
        load_plugins("relora.base_codecs", name)
    if name not in _CODECS:
        raise ConfigError(
            f"base_dtype={name!r} needs bitsandbytes: pip install 'relora[bitsandbytes]', and "
            "`import relora.integrations.bitsandbytes` where relora itself is not installed"
        )
    return _CODECS[name]
