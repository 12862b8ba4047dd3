"""Count what a LLaMA keeps between forward and backward, in bytes a token, by method and forward path.

    python benchmarks/kept_activations.py [--json FILE]

Counted, not timed: the storages that autograd saves, each once, parameters and buffers left out, per decoder
layer (the difference of two depths, so that embeddings, head and loss cancel). Storages whose size does not
follow the tokens, such as casts of weights, are listed apart, as bytes a layer.
"""

from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from common import arguments, note, publish
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from relora import ReLoRAConfig, inject
from relora.train.setup import enable_checkpointing_

HIDDEN, DIVISOR, TOKENS = 256, 16, 512
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "factored": {"forward": "factored"},
    "effective": {"forward": "effective"},
    "factored, one-sided": {"forward": "factored", "factors": "B"},
    "effective, one-sided": {"forward": "effective", "factors": "B"},
}


def build(settings: dict[str, Any] | None, *, num_layers: int, checkpointing: bool) -> LlamaForCausalLM:
    """Return a small LLaMA of the usual proportions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3 // 16 * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    if settings is not None:
        inject(model, ReLoRAConfig(rank=HIDDEN // DIVISOR, **settings))
    if checkpointing:
        enable_checkpointing_(model)
    return model.train()


def kept(model: LlamaForCausalLM, *, autocast: bool) -> tuple[int, int]:
    """Return the bytes kept that follow the number of tokens, and those that do not."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, tuple[int, bool]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), TOKENS in tensor.shape)
        return tensor

    ids = torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    by_kind = {
        wanted: sum(n for n, follows in storages.values() if follows == wanted) for wanted in (True, False)
    }
    return by_kind[True], by_kind[False]


def measure(name: str, precision: str, *, checkpointing: bool) -> dict[str, Any]:
    """Count one variant, as the difference of two layers and one."""
    autocast, settings = precision == "bf16", VARIANTS[name]
    shallow, deep = (
        kept(build(settings, num_layers=depth, checkpointing=checkpointing), autocast=autocast)
        for depth in (1, 2)
    )
    return {
        "precision": precision,
        "gradient_checkpointing": checkpointing,
        "variant": name,
        "bytes_a_token_and_layer": (deep[0] - shallow[0]) / TOKENS,
        "over_hidden_size": (deep[0] - shallow[0]) / TOKENS / HIDDEN,
        "other_bytes_a_layer": deep[1] - shallow[1],
    }


def main() -> None:
    """Count every variant, in both precisions, with gradient checkpointing and without."""
    options = arguments(__doc__).parse_args()
    precisions = ["fp32"] if options.quick else ["fp32", "bf16"]
    results = []
    for precision, checkpointing, name in product(precisions, [False, True], VARIANTS):
        row = measure(name, precision, checkpointing=checkpointing)
        results.append(row)
        note(
            f"{precision}  {'checkpointed' if checkpointing else '':13}{name:22}"
            f"{row['bytes_a_token_and_layer']:9.0f} bytes a token and layer "
            f"({row['over_hidden_size']:5.1f} x hidden_size), other {row['other_bytes_a_layer']:9,}"
        )
    report = {"hidden_size": HIDDEN, "rank": HIDDEN // DIVISOR, "tokens": TOKENS, "results": results}
    publish("kept_activations", report, options)


if __name__ == "__main__":
    main()
