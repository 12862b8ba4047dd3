"""Sizes of tiny language models, for `AutoConfig.for_model`."""

from typing import Any

VOCAB_SIZE = 37
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
GPT2_SIZES: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB_SIZE,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
