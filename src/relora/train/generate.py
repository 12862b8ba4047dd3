"""Let a trained model write."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora.errors import ConfigError, DataError
from relora.train.folders import open_tokenizer
from relora.train.model import num_embeddings, num_positions
from relora.train.saved import load_saved


def generate_from(
    path: Path, *, prompt: str, max_new_tokens: int = 128, temperature: float = 0.8, seed: int = 0
) -> str:
    """Continue a prompt with a run, a checkpoint or a Hugging Face folder.

    Args:
        path: The model.
        prompt: Text to continue; empty starts as a new document does.
        max_new_tokens: Most tokens to add.
        temperature: Spread of the choice; 0 takes the likeliest token.
        seed: Of the choice.

    Returns:
        Prompt and continuation.
    """
    saved = load_saved(path)
    tokenizer = open_tokenizer(saved.tokenizer_folder)
    return generate(
        saved.model,
        tokenizer,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Continue a prompt; the process's random state stays as it was."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        ids = [tokenizer.eos_token_id]
    if max(ids) >= num_embeddings(model):
        raise DataError(
            f"generate: the tokenizer gives token id {max(ids)}, but the model has {num_embeddings(model)} "
            "embeddings: it is not the tokenizer that the model was made with"
        )
    positions = num_positions(model)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise ConfigError(
            f"generate: the prompt's {len(ids)} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{positions} positions: shorten one of them"
        )
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    tokens = torch.tensor([ids], device=model.device)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **choice,
        )
    model.train(was_training)
    start = 0 if prompt else 1
    return str(tokenizer.decode(output[0, start:], skip_special_tokens=True))
