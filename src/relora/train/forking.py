"""What a fork may change: everything its checkpoint does not already hold an answer to.

Learning rates, lengths and the optimizer reset are read anew at every step. Batch and sequence length say
which text the steps so far have read: with others, a fork would read some of it twice or pass over it. Once
factors train, their shape, their scaling and their calendar are part of the checkpoint's weights and
counters. What only the text or the model can tell is refused where they are opened.
"""

from pathlib import Path

from relora.checkpoint.manifest import read_manifest
from relora.data.config import TRAIN_BPE
from relora.train.config import OptimConfig, Recipe
from relora.train.methods import STEPPED_BY
from relora.train.recipe_io import changed_fields

_FREE_WITH_FACTORS = {
    f"relora.{field}"
    for field in ("dropout", "forward", "reset", "reset_ratio", "reset_mask", "reset_step_count")
}
_OF_THE_ORDER = {"train.batch_size", "data.seq_len"}
_OF_THE_TEXT = {"data.vocab_size", "data.heldout_fraction", "data.tuning_fraction"}
_AT_FULL_RANK = {"run.method", "relora.warm_start_kind"}


def fork_violations(before: Recipe, wanted: Recipe, checkpoint: Path) -> list[str]:
    """Return what keeps a checkpoint from going on with another recipe, in words; empty if nothing does.

    Args:
        before: The recipe of the run that the checkpoint is of.
        wanted: The recipe of the fork.
        checkpoint: Its folder, which is valid.
    """
    manifest = read_manifest(checkpoint)
    step, has_factors = manifest.step, manifest.content.get("phase") == "low_rank"
    changed = list(changed_fields(before, wanted))
    found = _violations_of_data(changed, wanted)
    if shape := [name for name in changed if name.startswith("model.")]:
        found.append(f"a fork goes on with the same model; leave out {', '.join(shape)}")
    if step >= wanted.total_steps:
        found.append(
            f"the run must be longer than the {step} steps it has behind it, not {wanted.total_steps}"
        )
    if has_factors:
        fixed = [name for name in changed if _is_fixed_by_factors(name)]
        if fixed:
            found.append(
                f"{checkpoint.name} holds factors, which decide {', '.join(fixed)}: leave that out, or "
                "export the run and begin a new one with model.init_from"
            )
    elif wanted.switch_step is not None and wanted.switch_step < step:
        found.append(
            f"relora.warm_start_steps must be at least the {step} steps that {checkpoint.name} trained at "
            f"full rank, not {wanted.switch_step}"
        )
    return found + _violations_of_optimizer(before, wanted, checkpoint.name, has_factors=has_factors)


def _violations_of_data(changed: list[str], wanted: Recipe) -> list[str]:
    found = []
    if order := [name for name in changed if name in _OF_THE_ORDER]:
        found.append(
            "which text a step reads follows from the seed, the step, the batch and the sequence length, so "
            f"that a fork with others would read some twice or pass over it; leave out {', '.join(order)} "
            "(train.micro_batch_size may change)"
        )
    is_given = wanted.data.tokenizer != TRAIN_BPE  # data.vocab_size is then without effect
    text = [name for name in changed if name in _OF_THE_TEXT and not (is_given and "vocab" in name)]
    if text:
        found.append(f"a fork goes on with the same text; leave out {', '.join(text)}")
    return found


def _violations_of_optimizer(
    before: Recipe, wanted: Recipe, checkpoint: str, *, has_factors: bool
) -> list[str]:
    """Compare what is known of the optimizers without their model; others are compared when it is there."""
    by, by_wanted = _trained_by(before), _trained_by(wanted)
    changed = changed_fields(before, wanted)
    found = []
    if not has_factors and by != by_wanted:
        named = [name for name in changed if name in _AT_FULL_RANK]
        found.append(
            f"at full rank {checkpoint} was trained by {by}, whose states are others than those of "
            f"{by_wanted}; leave out {', '.join(named)}"
        )
    in_place = None if has_factors else wanted.warm_start_in_place
    if in_place and (named := [name for name in changed if name in ("relora.targets", "relora.exclude")]):
        found.append(
            f"{checkpoint} holds the optimizer's groups: which matrices step in place stays as it is; leave "
            f"out {', '.join(named)}"
        )
    has_matrices = not has_factors and by == "adamw"
    if _division(before.optim, has_matrices) != _division(wanted.optim, has_matrices):
        named = [name for name in changed if name in ("optim.rest_lr_multiples", "optim.rest_beta2")]
        found.append(
            f"{checkpoint} holds the optimizer's groups: which of the matrices, embeddings and head share a "
            f"rate and a beta2 stays as it is; leave out {', '.join(named)}"
        )
    return found


def _trained_by(recipe: Recipe) -> str:
    """Return what trains the target matrices at full rank; each has states of its own."""
    kind = recipe.warm_start_in_place
    return recipe.spec.warm_start if kind is None else STEPPED_BY[kind]


def _division(optim: OptimConfig, has_matrices: bool) -> tuple[bool, ...]:
    """Return which of the hidden matrices, the embeddings and the head share a group (`rest_groups`)."""
    embeddings, head, _ = optim.rest_lr_multiples
    shares_betas = has_matrices and optim.rest_beta2 is None
    return (embeddings == head, shares_betas and embeddings == 1, shares_betas and head == 1)


def _is_fixed_by_factors(name: str) -> bool:
    section = name.partition(".")[0]
    return name in ("run.method", "run.seed", "optim.factor_optimizer") or (
        section in ("relora", "method") and name not in _FREE_WITH_FACTORS
    )
