"""Compare what `relora plan` foretells with what real training on the CPU holds.

    python benchmarks/plan_accuracy.py [--only fitted] [--json FILE]

Each case is built, trained for three steps, evaluated and restarted by the trainer's own parts. Weights,
gradients and optimizer states are measured on the tensors themselves; activations as the distinct storages
that autograd packs in the layers' forward pass; the peak, from an empty process to the last step, by the CPU
allocator's own count, which the profiler reports, so that kernels' scratch memory is in it. No timing: what
else runs does no harm.

"fitted" cases were looked at while the planner was written; "held out" ones were not.
"""

import gc
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from common import allocated, arguments, bar, publish
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from relora.data.prepared import PreparedData
from relora.lab.planner.footprint import footprint
from relora.method.linear import LoRALinear
from relora.train.config import Recipe
from relora.train.evaluate import evaluate
from relora.train.loss import TokenLoss
from relora.train.methods import load_method
from relora.train.model import build_model
from relora.train.parallel import Processes
from relora.train.phase import Plan, state_bytes
from relora.train.recipe_io import resolve
from relora.train.setup import build_state
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
    method: str = "relora"
    """Of the cases with factors."""
    train: dict[str, Any] = field(default_factory=dict)


TINY_ROWS = {"rows": 1, "batch": 1, "seq_len": 16}
BOTH, ONE_SIDED = {"rank": 16}, {"rank": 16, "factors": "B"}
SIGN = {**ONE_SIDED, "init": "orthonormal", "residual": "sign"}
BF16_HOST, INT8 = {"base_dtype": "bf16", "master": "host"}, {"base_dtype": "int8", "master": "host"}
CHECKPOINTING = {"gradient_checkpointing": True}
FITTED = {
    "small, full rank": Case(sizes=SMALL),
    "small, relora, checkpointing": Case(sizes=SMALL, relora=BOTH, train=CHECKPOINTING),
    "small, relora, whole logits": Case(sizes=SMALL, relora=BOTH, train={"loss_chunk_tokens": 0}),
    "small, one-sided, sign": Case(sizes=SMALL, relora=SIGN),
    "small, one-sided, muon": Case(sizes=SMALL, relora={**SIGN, "residual": "muon"}),
    "wide, full rank, 16 tokens": Case(sizes=WIDE, vocab_size=512, **TINY_ROWS),
    "wide, relora, int8, 16 tokens": Case(sizes=WIDE, vocab_size=512, relora={**BOTH, **INT8}, **TINY_ROWS),
    "deep, relora, bf16 base on the host": Case(sizes=DEEP, relora={**BOTH, **BF16_HOST}, precision="bf16"),
    "deep, one-sided, int8": Case(
        sizes=DEEP, relora={**ONE_SIDED, **INT8}, rows=2, batch=2, precision="bf16"
    ),
    "gpt2, relora": Case(sizes="gpt2", relora=BOTH),
    "qwen2, relora, checkpointing": Case(sizes="qwen2", relora=BOTH, train=CHECKPOINTING),
    "gemma2, one-sided, its own loss": Case(sizes="gemma2", relora=ONE_SIDED),
}
ODD = {"hidden_size": 168, "intermediate_size": 452, "num_hidden_layers": 7, "num_attention_heads": 6}
FLAT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8}
HELD_OUT = {
    "odd, relora, bf16 base on the host, checkpointing": Case(
        sizes=ODD,
        vocab_size=9001,
        relora={"rank": 24, **BF16_HOST},
        rows=3,
        batch=6,
        seq_len=383,
        precision="bf16",
        train=CHECKPOINTING,
    ),
    "odd, one-sided, sign, bf16, accumulation": Case(
        sizes=ODD, vocab_size=2000, relora={**SIGN, "rank": 40}, rows=5, batch=10, precision="bf16"
    ),
    "odd, columns, muon, bf16": Case(
        sizes=ODD, relora={**SIGN, "init": "columns", "residual": "muon"}, rows=3, batch=3, precision="bf16"
    ),
    "flat, one-sided, int8, checkpointing, 1024 tokens": Case(
        sizes=FLAT, relora={**ONE_SIDED, **INT8}, rows=1, batch=1, seq_len=1024, train=CHECKPOINTING
    ),
    "flat, lora, 24,000 entries, whole logits": Case(
        sizes=FLAT,
        vocab_size=24_000,
        relora={"rank": 32},
        method="lora",
        rows=2,
        batch=2,
        train={"loss_chunk_tokens": 0},
    ),
    "flat, relora, first factors from the gradient": Case(
        sizes=FLAT, relora={"rank": 48, "init": "gradient"}, rows=1, batch=2, seq_len=96
    ),
    "flat, full rank, 24,000 entries": Case(sizes=FLAT, vocab_size=24_000, rows=1, batch=1, seq_len=128),
    "mistral, relora, bf16": Case(sizes="mistral", relora=BOTH, precision="bf16"),
    "opt, one-sided": Case(sizes="opt", relora=ONE_SIDED),
}
GROUPS = {"fitted": FITTED, "held out": HELD_OUT}
GROUPED = {"num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 512}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 4096, "n_positions": 512},
    "qwen2": {**SMALL, **GROUPED, "num_hidden_layers": 6, "tie_word_embeddings": True},
    "gemma2": {**SMALL, **GROUPED, "head_dim": 32},
    "mistral": {**DEEP, **GROUPED},
    "opt": {
        **{"hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 5, "num_attention_heads": 4},
        **{"word_embed_proj_dim": 128, "vocab_size": 4096, "max_position_embeddings": 512},
    },
}
STEPS = 3
EXACT = ("weights", "factors", "gradients", "optimizer")
BARS = {**dict.fromkeys(EXACT, 0.05), "peak": 0.15}


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
            "run": {"method": case.method if case.relora else "full"},
            "model": model,
            "data": {
                "vocab_size": case.vocab_size,
                "seq_len": case.seq_len,
                **({"tokenizer": model["init_from"]} if "init_from" in model else {}),
            },
            "relora": {"restart_every": STEPS - 1, **case.relora},
            "schedule": {"warmup_steps": 1, "rewarmup_steps": 1},
            "train": {
                "steps": 4 * STEPS,
                "batch_size": case.batch,
                "micro_batch_size": case.rows,
                "precision": case.precision,
                **case.train,
            },
        }
    )


def measured(recipe: Recipe, *, vocab_size: int) -> dict[str, int]:
    """Train for some steps, with an evaluation and a restart, and return what was held, in bytes."""
    rows, seq_len = recipe.train.micro_batch_size, recipe.data.seq_len
    heldout = np.zeros(2 * rows * seq_len + 1, dtype=np.uint16)
    data = SimpleNamespace(
        vocab_size=vocab_size,
        eos_token_id=0,
        check_fits=lambda _: None,
        evaluation=lambda _: (heldout, 4.0),
    )
    precision = cast(Any, recipe.train.precision)
    plan = Plan(recipe=recipe)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(recipe, cast(PreparedData, data))
        method = load_method(recipe.run.method)(plan)
        state = build_state(model, method, HERE, low_rank=recipe.run.method != "full")
        loss = TokenLoss(model, chunk_tokens=recipe.train.loss_chunk_tokens)
        tokens = torch.randint(vocab_size, (recipe.train.batch_size, seq_len))
        for step in range(1, STEPS + 1):
            state.optimizer.set_multiplier_(plan.multiplier(step))
            train_step_(
                loss,
                state.optimizer,
                tokens,
                HERE,
                step=step,
                seed=0,
                micro_batch_size=rows,
                precision=precision,
                clip_grad_norm=1.0,
                after_backward=method.after_backward,
            )
            restart = method.after_step(step)
            assert (restart is not None) == (recipe.run.method == "relora" and step == STEPS - 1)
            if step == 1:
                evaluate(
                    loss,
                    cast(PreparedData, data),
                    HERE,
                    seq_len=seq_len,
                    batch_size=rows,
                    sequences=2 * rows,
                    precision=precision,
                )
        plain = cast(nn.Module, model)
        layers = [module for module in plain.modules() if isinstance(module, LoRALinear)]
        is_factor = {n: n.endswith(("lora_A", "lora_B")) for n, _ in plain.named_parameters()}
        held = {
            "weights": sum(p.nbytes for n, p in plain.named_parameters() if not is_factor[n])
            + sum(b.nbytes for b in plain.buffers())
            + sum(layer.host_residual.nbytes for layer in layers if layer.host_residual is not None),
            "factors": sum(p.nbytes for n, p in plain.named_parameters() if is_factor[n]),
            "gradients": sum(p.grad.nbytes for p in plain.parameters() if p.grad is not None),
            "optimizer": state_bytes(state.optimizer.adamw, state.model),
        }
    held["peak"] = max(allocated(profiler))
    held["activations"] = saved_bytes(loss, tokens[:rows], recipe)
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
        "weights": told.weights_bytes + told.residual_bytes + told.host_bytes,
        "factors": told.factors_bytes,
        "gradients": told.gradients_bytes,
        "optimizer": told.optimizer_bytes,
        # Autograd keeps the casts that products need; both are what a forward pass leaves behind.
        "activations": told.activations_bytes + told.casts_bytes,
        "peak": told.peak_bytes,
    }
    found = measured(recipe, vocab_size=case.vocab_size)
    ratio = {kind: round(predicted[kind] / found[kind], 4) for kind in predicted if found[kind]}
    return {
        "predicted_bytes": predicted,
        "measured_bytes": found,
        "predicted_over_measured": ratio,
        "peak_in": told.peak_moment,
        "is_within_bars": all(abs(1 - ratio.get(kind, 1)) <= most for kind, most in BARS.items()),
    }


def worst(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative error of each kind."""
    kinds = (*EXACT, "activations", "peak")
    ratios = [case["predicted_over_measured"] for case in cases.values()]
    return {kind: round(max(abs(1 - ratio.get(kind, 1)) for ratio in ratios), 4) for kind in kinds}


def bars(groups: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield this project's bars, and how far the worst case of each group is off."""
    for group, found in groups.items():
        for kind, most in BARS.items():
            yield bar(f"{group}: largest error of {kind}", found["largest_error"][kind], most=most)


def main() -> None:
    """Compare every case and say by how much the worst is off."""
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=GROUPS, help="this group of cases alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    torch.manual_seed(0)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for group, cases in GROUPS.items():
            if options.only not in (None, group) or (options.quick and group != "fitted"):
                continue
            chosen = {"small, one-sided, sign": cases["small, one-sided, sign"]} if options.quick else cases
            found = {}
            for name, case in chosen.items():
                found[name] = compare(case, Path(folder))
                print(group, name, found[name]["predicted_over_measured"], file=sys.stderr, flush=True)
            result[group] = {
                "num_cases": len(found),
                "num_within_bars": sum(case["is_within_bars"] for case in found.values()),
                "largest_error": worst(found),
                "cases": found,
            }
    publish("plan_accuracy", {"bars": list(bars(result)), **result}, options)


if __name__ == "__main__":
    main()
