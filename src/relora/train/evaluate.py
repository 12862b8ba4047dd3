"""Held-out loss, perplexity and bits per byte, weighted by tokens; in training and of any saved model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from relora.data.batches import heldout_batches
from relora.data.config import DataConfig
from relora.data.prepare import PreparedData, prepare
from relora.errors import ConfigError
from relora.train.loss import TokenLoss
from relora.train.model import check_fits
from relora.train.parallel import Processes, processes
from relora.train.precision import Resolved, autocast
from relora.train.recipe_io import changed_data
from relora.train.saved import load_saved


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts text it has not seen."""

    loss: float
    """Mean next-token loss in nats."""
    num_tokens: int
    """Predicted tokens."""
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text, which models with different tokenizers can be compared by."""
        return self.loss / math.log(2) / self.bytes_per_token

    def as_metrics(self) -> dict[str, float]:
        """Return the figures under their names in metrics.jsonl."""
        return {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def evaluate(
    model: TokenLoss,
    data: PreparedData,
    processes: Processes,
    *,
    seq_len: int,
    batch_size: int,
    sequences: int,
    precision: Resolved,
    split: str = "heldout",
) -> Evaluation:
    """Measure a model on the first sequences of a split; ranks take batches in turn.

    Args:
        model: Around a plain or an injected model, on this rank's device.
        data: Its held-out tokens.
        processes: This rank among its peers.
        seq_len: Tokens in a sequence; each predicts all but its first.
        batch_size: Sequences at once.
        sequences: How many at most.
        precision: Of the matrix products.
        split: "heldout" or "tuning".
    """
    was_training = model.training
    model.eval()
    tokens, bytes_per_token = data.evaluation(split)
    batches = heldout_batches(tokens, seq_len=seq_len, batch_size=batch_size, num_sequences=sequences)
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    for index, batch in enumerate(batches):
        if index % processes.world_size != processes.rank:
            continue
        with autocast(precision, processes.device):
            loss = model(batch.to(processes.device))
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        sums += torch.tensor([float(loss) * predicted, predicted], dtype=torch.float64, device=sums.device)
    model.train(was_training)
    total, count = processes.sum(sums).tolist()
    return Evaluation(loss=total / count, num_tokens=int(count), bytes_per_token=bytes_per_token)


def _refuse_training_text(trained: DataConfig, measured: DataConfig) -> None:
    """Refuse to call held out what a run has been trained on.

    Raises:
        ConfigError: naming the setting.
    """
    text = ("source", "path", "name", "split")
    if any(getattr(trained, field) != getattr(measured, field) for field in text):
        return
    aside = trained.heldout_fraction + trained.tuning_fraction
    wrong = [
        field for field in ("document", "text_field") if getattr(trained, field) != getattr(measured, field)
    ]
    wrong += ["heldout_fraction"] if measured.heldout_fraction > aside else []
    if wrong:
        raise ConfigError(
            f"data.{wrong[0]} must be the run's own, {getattr(trained, wrong[0])!r}, on the text that it was "
            f"trained on: with {getattr(measured, wrong[0])!r} its training text would count as held out"
        )


def evaluate_path(
    path: Path, *, data: Mapping[str, Any] | None = None, sequences: int | None = None
) -> dict[str, Any]:
    """Measure a run, a checkpoint or a Hugging Face folder.

    Args:
        path: What to measure.
        data: Fields of [data] to set otherwise. For a run they change its recipe's; for a folder they
            change the defaults, and the tokenizer is the folder's own.
        sequences: How many held-out sequences; None means the run's eval.sequences, or all for a folder.

    Returns:
        The metrics, and what they were measured on.
    """
    saved = load_saved(path)
    base = DataConfig() if saved.recipe is None else saved.recipe.data
    # The model's own tokenizer, never a newly trained one: its embeddings know no other.
    config = changed_data(base, {"tokenizer": str(saved.tokenizer_folder), **(data or {})})
    if saved.recipe is not None:
        _refuse_training_text(base, config)
    prepared = prepare(config)
    check_fits(saved.model, prepared, seq_len=config.seq_len, name=str(path))
    if sequences is None:
        recipe = saved.recipe
        sequences = len(prepared.heldout_tokens) if recipe is None else recipe.eval.sequences
    batch_size = 8 if saved.recipe is None else saved.recipe.train.micro_batch_size
    chunk_tokens = None if saved.recipe is None else saved.recipe.train.loss_chunk_tokens
    with processes("auto") as here:
        cast(nn.Module, saved.model).to(here.device)
        result = evaluate(
            TokenLoss(saved.model, chunk_tokens=chunk_tokens),
            prepared,
            here,
            seq_len=config.seq_len,
            batch_size=batch_size,
            sequences=sequences,
            precision="fp32",
        )
    tokens = np.asarray(prepared.heldout_tokens).size
    return {
        **result.as_metrics(),
        "path": str(path),
        "step": saved.step,
        "tokens_measured": result.num_tokens,
        "tokens_heldout": int(tokens),
    }
