"""Which documents a training sequence is made of: where it lies, and how each of its documents begins."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np

from relora.data.prepared import PreparedData

_LOOK_BACK_TOKENS = 1 << 20
_BEGINNING_TOKENS = 24
_COUNTED_TOKENS = 1 << 31


def describe_sequences(
    data: PreparedData, sequences: Iterable[int], *, seq_len: int
) -> list[dict[str, object]]:
    """Describe training sequences so that their text can be found again.

    Args:
        data: The prepared data they are of.
        sequences: Their indices: sequence i is tokens i * seq_len to (i + 1) * seq_len.
        seq_len: T, tokens in a sequence.

    Returns:
        One JSON-able value each, in the order of their indices: "sequence", "tokens" (first, and one past
        the last) and "documents", each with its "number" (from 0, in the order of the training documents;
        None in very large data, where counting would take minutes) and how it "begins".
    """
    transformers: Any = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        data.tokenizer_folder, local_files_only=True, trust_remote_code=False
    )
    tokens, end_token = data.train_tokens, data.eos_token_id
    countable = len(tokens) <= _COUNTED_TOKENS
    described: list[dict[str, object]] = []
    counted = number = 0
    for sequence in sorted(set(sequences)):
        start, end = sequence * seq_len, (sequence + 1) * seq_len
        if countable:
            number += int(np.count_nonzero(tokens[counted:start] == end_token))
            counted = start
        # A document ends with its end token: the next begins one further on.
        ends = start + np.flatnonzero(tokens[start : end - 1] == end_token)
        begins = [_beginning(data, start), *(int(at) + 1 for at in ends)]
        texts = [tokens[at : at + _BEGINNING_TOKENS] for at in begins]
        documents = [
            {
                "number": number + offset if countable else None,
                "begins": tokenizer.decode(_before_end(text, end_token).tolist()),
            }
            for offset, text in enumerate(texts)
        ]
        described.append({"sequence": sequence, "tokens": [start, end], "documents": documents})
    return described


def _beginning(data: PreparedData, position: int) -> int:
    """Return where the document at a position begins, as far back as is looked."""
    first = max(position - _LOOK_BACK_TOKENS, 0)
    ends = np.flatnonzero(data.train_tokens[first:position] == data.eos_token_id)
    return first + int(ends[-1]) + 1 if ends.size else first


def _before_end(text: Any, end_token: int) -> Any:
    ends = np.flatnonzero(text == end_token)
    return text[: ends[0]] if ends.size else text
