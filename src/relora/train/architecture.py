"""The shape of the model: the LLaMA sizes of the paper by name, and any other by its numbers.

The presets are the configurations the paper's code ships (arXiv 2307.05695): SiLU, RMSNorm with eps 1e-6, no
biases, an output head of its own. With vocab_size V, hidden_size h, intermediate_size f and L layers a model
has L (4 h^2 + 3 h f) weights in wrapped linear layers, and 2 V h + 2 L h + h others.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from relora.train.checks import unmet

if TYPE_CHECKING:
    from transformers import LlamaConfig

Preset = Literal[
    "llama-9m",
    "llama-20m",
    "llama-35m",
    "llama-40m",
    "llama-60m",
    "llama-71m",
    "llama-100m",
    "llama-130m",
    "llama-250m",
    "llama-350m",
    "llama-1b",
    "llama-3b",
    "llama-7b",
]

PAPER_VOCAB_SIZE = 32100
"""Entries of the tokenizer (t5-base) with which the sizes in the presets' names are counted."""

RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers that make a LLaMA, vocabulary aside."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, positions: int = 1024) -> Architecture:
    return Architecture(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
    )


PRESETS: dict[Preset, Architecture] = {
    "llama-9m": _sizes(128, 352, 4, 4),
    "llama-20m": _sizes(256, 688, 4, 4),
    "llama-35m": _sizes(384, 1024, 6, 8),
    "llama-40m": _sizes(416, 1024, 8, 8),
    "llama-60m": _sizes(512, 1376, 8, 8),
    "llama-71m": _sizes(512, 1368, 12, 8),
    "llama-100m": _sizes(640, 1708, 12, 10),
    "llama-130m": _sizes(768, 2048, 12, 12),
    "llama-250m": _sizes(768, 2560, 24, 16),
    "llama-350m": _sizes(1024, 2736, 24, 16),
    "llama-1b": _sizes(2048, 5461, 24, 32),
    "llama-3b": _sizes(2560, 6848, 32, 32),
    "llama-7b": _sizes(4096, 11008, 32, 32, 2048),
}

ARCHITECTURE_FIELDS = tuple(field.name for field in fields(Architecture))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: a size of the paper by name, a LLaMA by its numbers, or a checkpoint to start from."""

    preset: Preset | None = "llama-60m"
    """A LLaMA size of the paper; the numbers given below override it."""
    init_from: str | None = None
    """Hugging Face folder or hub id of a causal language model to start from, instead of random weights."""
    pickled_weights: bool = False
    """Whether init_from may be a folder whose weights are pickles (.bin), read with weights_only=True."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width inside the feed-forward blocks."""
    num_hidden_layers: int | None = None
    """Number of transformer blocks."""
    num_attention_heads: int | None = None
    """Attention heads of a block; hidden_size is a multiple of it."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is declared for (default 1024, or the preset's); data.seq_len fits in."""

    @property
    def explicit(self) -> dict[str, int]:
        """The numbers given by hand."""
        given = {name: getattr(self, name) for name in ARCHITECTURE_FIELDS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def architecture(self) -> Architecture | None:
        """The numbers in force, or None where a checkpoint brings them (or some are missing)."""
        if self.init_from is not None or self._missing():
            return None
        named = {} if self.preset is None else vars(PRESETS[self.preset])
        return Architecture(**{**named, **self.explicit})

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        if self.init_from is not None:
            return self._origin_violations(self.init_from)
        if self.pickled_weights:
            return ["pickled_weights must be left out without init_from: there is nothing to read"]
        sizes = self.explicit.items()
        if too_small := [f"{name} must be at least 1, not {size}" for name, size in sizes if size < 1]:
            return too_small
        if missing := self._missing():
            return [f"{', '.join(missing)} must be given where neither preset nor init_from is"]
        return self._head_violations()

    def _missing(self) -> list[str]:
        if self.preset is not None:
            return []
        return [name for name in ARCHITECTURE_FIELDS[:4] if name not in self.explicit]

    def _origin_violations(self, origin: str) -> list[str]:
        rivals = [*([] if self.preset is None else ["preset"]), *self.explicit]
        return unmet(
            (origin != "", "init_from must name a checkpoint folder or a hub id, not an empty text"),
            (not rivals, f"{', '.join(rivals)} must be left out with init_from: the checkpoint decides"),
        )

    def _head_violations(self) -> list[str]:
        sizes = self.architecture
        assert sizes is not None
        heads, hidden = sizes.num_attention_heads, sizes.hidden_size
        if hidden % heads:
            return [f"num_attention_heads must divide hidden_size {hidden}, which {heads} does not"]
        return unmet(
            (
                hidden // heads % 2 == 0,
                f"num_attention_heads must leave heads of even width (rotary positions turn pairs), "
                f"but {hidden} / {heads} = {hidden // heads}",
            )
        )


def llama_config(model: ModelConfig, *, vocab_size: int, eos_token_id: int | None = None) -> "LlamaConfig":
    """Build the `transformers` configuration of a model that starts from random weights.

    Args:
        model: Sizes; without violations and without `init_from`.
        vocab_size: Entries of the tokenizer, and so rows of the embedding and the output head.
        eos_token_id: The token that ends a document, where generation stops; no other token starts one.
    """
    from transformers import LlamaConfig

    sizes = model.architecture
    assert sizes is not None, "a model that starts from a checkpoint brings its own configuration"
    return LlamaConfig(
        **vars(sizes),
        vocab_size=vocab_size,
        rms_norm_eps=RMS_NORM_EPS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
