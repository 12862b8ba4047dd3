"""The model of a run: a LLaMA from random weights, or a Hugging Face checkpoint to go on from."""

import warnings
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from relora.data.prepared import PreparedData
from relora.errors import ConfigError
from relora.method.seeds import derived_seed
from relora.train.architecture import llama_config
from relora.train.config import Recipe


def build_model(recipe: Recipe, data: PreparedData) -> PreTrainedModel:
    """Build the plain model a run begins with, in float32 on the CPU.

    Args:
        recipe: Its [model] section, seq_len and seed.
        data: Decides the vocabulary of a model from random weights.

    Raises:
        ConfigError: if `init_from` names nothing that loads, or its positions are fewer than seq_len.
        DataError: if the tokenizer has entries the checkpoint has no embedding for.
    """
    if recipe.model.init_from is not None:
        model = load_pretrained(recipe.model.init_from)
        check_fits(model, data, seq_len=recipe.data.seq_len, name=recipe.model.init_from)
        return model
    config = llama_config(recipe.model, vocab_size=data.vocab_size, eos_token_id=data.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(recipe.run.seed, "initial weights"))
        return LlamaForCausalLM(config)


def check_fits(model: PreTrainedModel, data: PreparedData, *, seq_len: int, name: str) -> None:
    """Compare a model that was made elsewhere with the data it is to read.

    Raises:
        ConfigError: if sequences are longer than the model is declared for.
        DataError: if the tokenizer has entries the model has no embedding for.
    """
    data.check_fits(num_embeddings(model))
    positions = num_positions(model)
    if positions is not None and seq_len > positions:
        raise ConfigError(
            f"data.seq_len must be at most the {positions} positions of {name!r}, not {seq_len}"
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """Return how many tokens a model knows."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def num_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence a model is declared for; None where its configuration sets no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def load_pretrained(origin: str) -> PreTrainedModel:
    """Load a causal language model in float32 from a Hugging Face folder or hub id, safetensors only.

    Raises:
        ConfigError: if it does not load.
    """
    folder = Path(origin).expanduser()
    looks_like_path = origin.startswith((".", "/", "~")) or origin.count("/") > 1
    if looks_like_path and not folder.exists():
        raise ConfigError(f"model {folder} does not exist: check model.init_from (taken from {Path.cwd()})")
    _refuse_factors(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder) if folder.exists() else origin, dtype=torch.float32, use_safetensors=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{origin!r} does not load as a causal language model: {error}. Give a folder "
            "with config.json and safetensors weights, or a hub id that can be reached from here"
        ) from error
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _refuse_factors(folder: Path) -> None:
    """Refuse a folder saved with its factors: `from_pretrained` would drop them with a warning at most."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt") as file:
                factors = [key for key in file.keys() if key.endswith(".lora_A")]  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}") from error
        if factors:
            raise ConfigError(
                f"{path} holds low-rank factors ({factors[0]} and more): fold(model) before "
                "saving it, or export the run it comes from"
            )
