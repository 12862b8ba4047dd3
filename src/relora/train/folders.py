"""Open what a run's folder keeps beside its checkpoints: the tokenizer, and the plain model's configuration.

A run may come from elsewhere: its files are looked at before they are opened, and a model is compared with
the checkpoint's tensors before memory is taken for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from relora.checkpoint.model_folder import check_config, check_files
from relora.checkpoint.strict_json import listed, shown
from relora.errors import CheckpointError

Opened = TypeVar("Opened")


def open_tokenizer(folder: Path) -> Any:
    """Open a tokenizer that was saved in a folder, offline and without code of its own.

    Raises:
        CheckpointError: if it does not open, or must not be opened.
    """
    check_files(folder)
    return _opened(
        folder,
        lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )


def empty_model(folder: Path, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build the plain model of a configuration, its weights still to be loaded.

    Args:
        folder: Holds config.json.
        tensors: The weights that it is for; more may be there.

    Raises:
        CheckpointError: if it cannot be built, or its weights are not among the tensors.
    """
    check_files(folder)
    check_config(folder)
    config = _opened(
        folder,
        lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )

    def build() -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    with torch.device("meta"):
        wanted = _opened(folder, build).state_dict()
    problems = [
        f"{name} should be {shown(list(tensor.shape))}, found "
        + (shown(list(tensors[name].shape)) if name in tensors else "nothing")
        for name, tensor in wanted.items()
        if name not in tensors or tensors[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model of {folder}: {listed(problems, most=3)}"
        )
    model = _opened(folder, build)
    assert isinstance(model, PreTrainedModel)
    return model


def _opened(folder: Path, action: Callable[[], Opened]) -> Opened:
    try:
        return action()
    except Exception as error:  # transformers lets through whatever a foreign file makes of its own code
        reason = " ".join(str(error).split())[:1000] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be opened: {reason}") from error
