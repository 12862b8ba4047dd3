"""The data of a recipe, made ready before the run that needs it."""

from collections.abc import Callable

from relora.train.config import Recipe


def prepare_recipe(
    recipe: Recipe, *, progress: Callable[[str, int], None] | None = None
) -> dict[str, object]:
    """Read, tokenize and cache a recipe's data, or find it done.

    Args:
        recipe: Its [data] section decides what is made; its length says how often that will be read.
        progress: Called with what is being done and the bytes of text done so far.

    Returns:
        Where the data is, what identifies it, and how much of it there is.

    Raises:
        DataError: if the text or the tokenizer cannot be used.
    """
    from relora.data.prepare import prepare

    data = prepare(recipe.data, progress=progress)
    tokens_of_the_run = recipe.total_steps * recipe.tokens_per_step
    return {
        "folder": data.folder,
        "fingerprint": data.fingerprint,
        "vocab_size": data.vocab_size,
        "train_tokens": len(data.train_tokens),
        "heldout_tokens": len(data.heldout_tokens),
        "bytes_per_token": data.bytes_per_token,
        "epochs_of_the_run": tokens_of_the_run / len(data.train_tokens),
        "counts": data.counts,
        "notes": data.notes,
    }
