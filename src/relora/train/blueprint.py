"""The model of a recipe without its weights: on the meta device, where shapes are all there is."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from relora.data.config import TRAIN_BPE
from relora.errors import ConfigError, DataError
from relora.train.architecture import PAPER_VOCAB_SIZE, llama_config
from relora.train.config import Recipe

# Tokenizers whose size need not be asked for over a network.
_KNOWN_VOCAB_SIZES = {"google-t5/t5-base": PAPER_VOCAB_SIZE}


def blueprint(recipe: Recipe, *, vocab_size: int | None = None) -> PreTrainedModel:
    """Build the plain model a run begins with, without memory for its weights; a 7B takes a second.

    Args:
        recipe: Its [model] section, and [data] for the vocabulary.
        vocab_size: Entries of the tokenizer, where they are known better; without effect with init_from.

    Raises:
        ConfigError: if `init_from` has no configuration to be read, or the tokenizer's size cannot be had.
    """
    origin = recipe.model.init_from
    if origin is None:
        size = vocabulary(recipe) if vocab_size is None else vocab_size
        with torch.device("meta"):
            return LlamaForCausalLM(llama_config(recipe.model, vocab_size=size))
    try:
        config = AutoConfig.from_pretrained(origin, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.init_from {origin!r} has no configuration of a causal language model: {error}. Give a "
            "folder with config.json, or a hub id that can be reached from here"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def vocabulary(recipe: Recipe) -> int:
    """Return the number of entries the recipe's tokenizer will have.

    Raises:
        ConfigError: if a given tokenizer cannot be loaded.
    """
    data = recipe.data
    if data.tokenizer == TRAIN_BPE:
        return data.vocab_size
    if data.tokenizer in _KNOWN_VOCAB_SIZES:
        return _KNOWN_VOCAB_SIZES[data.tokenizer]
    from relora.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(data.tokenizer, eos_token=data.eos_token).vocab_size
    except DataError as error:
        raise ConfigError(f"{error}; or say how many entries it has with --vocab_size") from error
