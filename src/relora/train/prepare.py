"""The data of a recipe, made ready before the run that needs it."""

from relora.log.stages import StageLines
from relora.train.config import Recipe


def prepare_recipe(recipe: Recipe) -> dict[str, object]:
    """Read, tokenize and cache a recipe's data, or find it done; says on standard error what it does.

    Args:
        recipe: Its [data] section decides what is made; its length says how often that will be read.

    Returns:
        Where the data is, what identifies it, and how much of it there is.

    Raises:
        DataError: if the text or the tokenizer cannot be used.
    """
    from relora.data.prepare import prepare

    data = prepare(recipe.data, progress=StageLines())
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
