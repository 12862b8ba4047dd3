"""The model of a run: a LLaMA from random weights, or a Hugging Face checkpoint to go on from."""

import warnings
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from relora.errors import ConfigError, DataError
from relora.method.seeds import derived_seed
from relora.train.architecture import ModelConfig, llama_config


def build_model(model: ModelConfig, *, vocab_size: int, eos_token_id: int, seed: int) -> PreTrainedModel:
    """Build the plain model in float32 on the CPU.

    Args:
        model: Its section of the recipe.
        vocab_size: Entries of the tokenizer.
        eos_token_id: The token that ends a document.
        seed: Root of the seed of random weights.

    Raises:
        ConfigError: if `init_from` names nothing that loads.
        DataError: if the tokenizer has entries the checkpoint has no embedding for.
    """
    if model.init_from is not None:
        return _from_checkpoint(model.init_from, vocab_size)
    config = llama_config(model, vocab_size=vocab_size, eos_token_id=eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "initial weights"))
        return LlamaForCausalLM(config)


def _from_checkpoint(origin: str, vocab_size: int) -> PreTrainedModel:
    folder = Path(origin).expanduser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder) if folder.exists() else origin, dtype=torch.float32, use_safetensors=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.init_from {origin!r} does not load as a causal language model: {error}. Give a folder "
            "with config.json and safetensors weights, or a hub id that can be reached from here"
        ) from error
    rows = cast(nn.Embedding, loaded.get_input_embeddings()).num_embeddings
    if vocab_size > rows:
        raise DataError(
            f"the tokenizer has {vocab_size} entries but model.init_from {origin!r} embeds only {rows}: "
            f"use the checkpoint's own tokenizer (data.tokenizer = {origin!r})"
        )
    assert isinstance(loaded, PreTrainedModel)
    return loaded
