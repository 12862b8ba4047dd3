"""The model of a run: a LLaMA from random weights, or a Hugging Face checkpoint to go on from."""

import warnings
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from relora.checkpoint.model_folder import check_model_folder
from relora.checkpoint.tensor_file import check_structure
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
        origin = recipe.model.init_from
        model = load_pretrained(origin, pickled_weights=recipe.model.pickled_weights)
        check_fits(model, data, seq_len=recipe.data.seq_len, name=origin)
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


def load_pretrained(origin: str, *, pickled_weights: bool = False) -> PreTrainedModel:
    """Load a causal language model in float32 from a Hugging Face folder or hub id.

    Code that comes with a model is never run. A local folder is looked at before anything of it is opened.

    Args:
        origin: The folder, or the id.
        pickled_weights: Whether weights may be pickles, read with `weights_only=True`; else safetensors only.

    Raises:
        ConfigError: if it does not load, or must not be loaded.
    """
    folder = Path(origin).expanduser()
    looks_like_path = origin.startswith((".", "/", "~")) or origin.count("/") > 1
    if looks_like_path and not folder.exists():
        raise ConfigError(f"model {folder} does not exist: check model.init_from (taken from {Path.cwd()})")
    has_safetensors = True
    try:
        if folder.is_dir():
            weights = check_model_folder(folder, with_pickles=pickled_weights)
            has_safetensors = all(path.suffix == ".safetensors" for path in weights)
            _refuse_factors(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = AutoModelForCausalLM.from_pretrained(
                str(folder) if folder.exists() else origin,
                dtype=torch.float32,
                use_safetensors=has_safetensors,
                weights_only=True,
                trust_remote_code=False,
            )
    except ConfigError:
        raise
    except Exception as error:  # transformers lets through whatever a foreign file makes of its own code
        raise ConfigError(
            f"{origin!r} does not load as a causal language model: {' '.join(str(error).split())[:2000]}. "
            "Give a folder with config.json and safetensors weights, or a hub id that can be reached"
        ) from error
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _refuse_factors(weights: list[Path]) -> None:
    """Refuse a folder saved with its factors: `from_pretrained` would drop them with a warning at most."""
    for path in weights:
        names = check_structure(path, {}) if path.suffix == ".safetensors" else []
        factors = [name for name in names if name.endswith(".lora_A")]
        if factors:
            raise ConfigError(
                f"{path} holds low-rank factors ({factors[0]} and more): fold(model) before "
                "saving it, or export the run it comes from"
            )
