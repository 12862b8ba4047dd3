"""A trained model as a folder that stock `transformers` loads: weights, tokenizer, generation config, model
card.

The folder appears as a whole or not at all, as a checkpoint does, and never in place of something else.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.checkpoint.files import FileOperations, disk_errors
from relora.checkpoint.strict_json import listed
from relora.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FACTORS = ("lora_A", "lora_B")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_folder(
    model: "PreTrainedModel", tokenizer: "Path | PreTrainedTokenizerBase", out: Path, *, card: str
) -> Path:
    """Write a model folder that stock `transformers` loads.

    Args:
        model: A plain model of `transformers`; a model with factors must be folded first.
        tokenizer: The tokenizer, or the folder it was saved in.
        out: The folder to make; its parents are made if missing.
        card: The text of README.md, such as `model_card` returns.

    Returns:
        `out`.

    Raises:
        CheckpointError: if `out` exists, the model holds factors, the tokenizer cannot be read or has more
            tokens than the model, or the disk refuses. Nothing is left of the export then.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(
            f"{out} exists: an export replaces nothing; remove it, or choose another folder"
        )
    _check_plain(model)
    loaded = _read_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    _check_vocabulary(model, loaded)
    files = FileOperations()
    with disk_errors("create", out):
        out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        files.make_folder(temporary)
        _save_all(model, loaded, temporary)
        files.write(temporary / "README.md", card.encode("utf-8"))
        _make_durable(temporary, files)
        files.rename(temporary, out)
        files.sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _save_all(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    with disk_errors("write", folder), _quietly(), _ties_as_they_are(model):
        try:
            model.save_pretrained(folder)
            _generation_config(model, tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except ValueError as error:  # settings that transformers would not load again
            raise CheckpointError(f"transformers cannot save this model: {error}") from error


def _check_plain(model: "PreTrainedModel") -> None:
    factors = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in _FACTORS]
    if factors:
        raise CheckpointError(f"the model holds factors ({listed(factors, most=3)}): fold it first")


def _read_tokenizer(folder: Path | str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise CheckpointError(f"cannot read the tokenizer {folder}: it is not a folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the tokenizer {folder}: {error}") from error
    return tokenizer


def _check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    num_rows = len(_weight(model.get_input_embeddings()))
    if len(tokenizer) > num_rows:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {num_rows} rows: "
            "it is not the one that the model was trained with"
        )


def _generation_config(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the model's generation config, special tokens that it lacks taken from the tokenizer."""
    from copy import deepcopy

    config = deepcopy(model.generation_config)
    for name in _SPECIAL_IDS:
        if getattr(config, name, None) is None and getattr(tokenizer, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))
    return config


@contextmanager
def _ties_as_they_are(model: "PreTrainedModel") -> Iterator[None]:
    """Let the config say whether input and output embeddings are one tensor.

    Tensors that share memory are stored once; a config that denies the tie would have stock `transformers`
    draw the other one at random.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    said = config.tie_word_embeddings
    if head is not None:
        config.tie_word_embeddings = _weight(head) is _weight(model.get_input_embeddings())
    try:
        yield
    finally:
        config.tie_word_embeddings = said


def _weight(embedding: "nn.Module") -> "Tensor":
    return embedding.get_parameter("weight")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep `transformers` from drawing progress bars: the screen belongs to the run's own console."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _make_durable(folder: Path, files: FileOperations) -> None:
    # safetensors makes its files for their owner alone; an export has the permissions that files get here.
    mode = (folder / "README.md").stat().st_mode & 0o777
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            files.sync_folder(path)
        else:
            path.chmod(mode)
            files.sync_file(path)
    files.sync_folder(folder)
