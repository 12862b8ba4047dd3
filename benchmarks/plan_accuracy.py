"""Compare what `relora plan` foretells with what real training steps on the CPU hold.

    python benchmarks/plan_accuracy.py [--json FILE]

Weights, gradients and optimizer states are measured on the tensors themselves; activations as the distinct
storages that autograd packs in the layers' forward pass; the peak by the CPU allocator's own count, which
the profiler reports, so that kernels' scratch memory is in it. No timing: what else runs does no harm.
"""

import gc
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from common import allocated, arguments, publish
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from relora.data.prepared import PreparedData
from relora.lab.planner.footprint import footprint
from relora.train.config import Recipe
from relora.train.loss import TokenLoss
from relora.train.model import build_model
from relora.train.parallel import Processes
from relora.train.phase import build_optimizer, inject_factors, state_bytes
from relora.train.recipe_io import resolve
from relora.train.setup import enable_checkpointing_
from relora.train.step import train_step_

HERE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 3, "num_attention_heads": 5}
DEEP = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 6}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe to foretell and to measure."""

    sizes: dict[str, int] | str
    """Of a LLaMA; or the type of another architecture."""
    vocab_size: int = 4096
    relora: dict[str, Any] = field(default_factory=dict)
    rows: int = 4
    batch: int = 4
    seq_len: int = 256
    precision: str = "fp32"
    train: dict[str, Any] = field(default_factory=dict)


BOTH, ONE_SIDED = {"rank": 16}, {"rank": 16, "factors": "B"}
CASES = {
    "small, full rank": Case(sizes=SMALL),
    "small, relora": Case(sizes=SMALL, relora=BOTH),
    "small, one-sided": Case(sizes=SMALL, relora=ONE_SIDED),
    "small, one-sided, bf16": Case(sizes=SMALL, relora=ONE_SIDED, precision="bf16"),
    "small, full rank, bf16": Case(sizes=SMALL, precision="bf16"),
    "small, relora, rank 64, dropout": Case(sizes=SMALL, relora={"rank": 64, "dropout": 0.1}),
    "small, relora, checkpointing": Case(sizes=SMALL, relora=BOTH, train={"gradient_checkpointing": True}),
    "small, relora, accumulation": Case(sizes=SMALL, relora=BOTH, rows=2, batch=6),
    "small, relora, whole logits": Case(sizes=SMALL, relora=BOTH, train={"loss_chunk_tokens": 0}),
    "wide, full rank": Case(sizes=WIDE, vocab_size=16_000, rows=2),
    "wide, relora, bf16": Case(sizes=WIDE, vocab_size=16_000, relora=BOTH, rows=2, precision="bf16"),
    "wide, one-sided, one row": Case(sizes=WIDE, vocab_size=16_000, relora=ONE_SIDED, rows=1, seq_len=512),
    "deep, full rank, checkpointing": Case(sizes=DEEP, train={"gradient_checkpointing": True}),
    "deep, one-sided, bf16, accumulation": Case(
        sizes=DEEP, relora=ONE_SIDED, rows=3, batch=9, precision="bf16"
    ),
    "gpt2, relora": Case(sizes="gpt2", relora=BOTH),
    "gemma2, one-sided, its own loss": Case(sizes="gemma2", relora=ONE_SIDED),
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 4096, "n_positions": 512},
    "gemma2": {
        **{key: SMALL[key] for key in SMALL},
        **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "max_position_embeddings": 512},
    },
}
EXACT = ("weights", "factors", "gradients", "optimizer")


def recipe_of(case: Case, folder: Path) -> Recipe:
    """Return the case as a recipe; another architecture than LLaMA gets a checkpoint to start from."""
    model: dict[str, Any]
    if isinstance(case.sizes, str):
        config = AutoConfig.for_model(case.sizes, **OTHERS[case.sizes], bos_token_id=0, eos_token_id=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / case.sizes)
        model = {"preset": None, "init_from": str(folder / case.sizes)}
    else:
        model = {"preset": None, **case.sizes}
    return resolve(
        {
            "run": {"method": "relora" if case.relora else "full"},
            "model": model,
            "data": {
                "vocab_size": case.vocab_size,
                "seq_len": case.seq_len,
                **({"tokenizer": model["init_from"]} if "init_from" in model else {}),
            },
            "relora": {"restart_every": 10, **case.relora},
            "schedule": {"warmup_steps": 1, "rewarmup_steps": 1},
            "train": {
                "steps": 100,
                "batch_size": case.batch,
                "micro_batch_size": case.rows,
                "precision": case.precision,
                **case.train,
            },
        }
    )


def measured(recipe: Recipe, *, vocab_size: int, steps: int = 3) -> dict[str, int]:
    """Train for some steps and return what was held, in bytes."""
    data = SimpleNamespace(vocab_size=vocab_size, eos_token_id=0, check_fits=lambda _: None)
    low_rank = recipe.run.method != "full"
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(recipe, cast(PreparedData, data))
        plain = cast(nn.Module, model)
        if recipe.train.gradient_checkpointing:
            enable_checkpointing_(model)
        if low_rank:
            inject_factors(plain, recipe)
        optimizer = build_optimizer(plain, recipe, "low_rank" if low_rank else "full")
        loss = TokenLoss(model, chunk_tokens=recipe.train.loss_chunk_tokens)
        tokens = torch.randint(vocab_size, (recipe.train.batch_size, recipe.data.seq_len))
        for step in range(1, steps + 1):
            train_step_(
                loss,
                optimizer,
                tokens,
                HERE,
                step=step,
                seed=0,
                micro_batch_size=recipe.train.micro_batch_size,
                precision=cast(Any, recipe.train.precision),
                clip_grad_norm=1.0,
            )
        is_factor = {n: n.endswith(("lora_A", "lora_B")) for n, _ in plain.named_parameters()}
        held = {
            "weights": sum(p.nbytes for n, p in plain.named_parameters() if not is_factor[n])
            + sum(b.nbytes for b in plain.buffers()),
            "factors": sum(p.nbytes for n, p in plain.named_parameters() if is_factor[n]),
            "gradients": sum(p.grad.nbytes for p in plain.parameters() if p.grad is not None),
            "optimizer": state_bytes(optimizer.adamw),
        }
    held["peak"] = max(allocated(profiler))
    held["activations"] = saved_bytes(loss, tokens[: recipe.train.micro_batch_size], recipe)
    return held


def saved_bytes(loss: TokenLoss, tokens: Tensor, recipe: Recipe) -> int:
    """Return the bytes that the layers' forward pass keeps for the backward, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in loss.parameters()}
    kept: dict[int, Any] = {}
    is_counting = [True]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if is_counting[0] and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    loss.train()
    handle = loss.body.register_forward_hook(lambda *_: is_counting.__setitem__(0, False))
    is_bf16 = recipe.train.precision == "bf16"
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        loss(tokens)
    handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Foretell and measure one case."""
    recipe = recipe_of(case, folder)
    low_rank = recipe.run.method != "full"
    told = footprint(recipe, low_rank=low_rank, precision=cast(Any, case.precision))
    predicted = {
        "weights": told.weights_bytes + told.residual_bytes,
        "factors": told.factors_bytes,
        "gradients": told.gradients_bytes,
        "optimizer": told.optimizer_bytes,
        # Autograd keeps the casts that products need; both are what a forward pass leaves behind.
        "activations": told.activations_bytes + told.casts_bytes,
        "peak": told.peak_bytes,
    }
    found = measured(recipe, vocab_size=case.vocab_size)
    ratio = {kind: predicted[kind] / found[kind] for kind in predicted if found[kind]}
    return {"predicted_bytes": predicted, "measured_bytes": found, "predicted_over_measured": ratio}


def main() -> None:
    """Compare every case and say by how much the worst is off."""
    parser = arguments(__doc__)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    torch.manual_seed(0)
    chosen = dict(list(CASES.items())[1:2]) if options.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: compare(case, Path(folder)) for name, case in chosen.items()}

    def worst(kinds: tuple[str, ...]) -> float:
        errors = [
            abs(1 - case["predicted_over_measured"].get(kind, 1)) for case in cases.values() for kind in kinds
        ]
        return max(errors)

    worst_of = {"weights, gradients, states": worst(EXACT), "activations": worst(("activations",))}
    result = {"largest_error": worst_of | {"peak": worst(("peak",))}, "cases": cases}
    publish("plan_accuracy", result, options)


if __name__ == "__main__":
    main()
