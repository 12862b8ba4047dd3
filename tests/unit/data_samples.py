"""Small corpora, tokenizers and settings for the tests of the data package."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relora.data.config import DataConfig
from relora.data.prepare import PreparedData, prepare

SENTENCE = (
    "the rank of a sum is at most the sum of ranks so merge restart and train again on what remains "
    "until the loss falls \u00e9t\u00e9 apr\u00e8s \u00e9t\u00e9"
)
WORDS = SENTENCE.split()


def text(seed: int, *, num_words: int = 120) -> str:
    generator = random.Random(seed)
    words = [generator.choice(WORDS) + ("\n" if generator.random() < 0.1 else "") for _ in range(num_words)]
    return " ".join(words)


def write_texts(folder: Path, texts: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(content.encode())
    return folder


def write_corpus(folder: Path, *, num_documents: int = 40) -> Path:
    return write_texts(folder, (text(seed) for seed in range(num_documents)))


def config(folder: Path, **changes: Any) -> DataConfig:
    """Settings for the texts in folder / "texts", prepared in folder / "cache"."""
    settings: dict[str, Any] = {
        "source": "text",
        "path": str(folder / "texts"),
        "vocab_size": 270,
        "seq_len": 16,
        "heldout_fraction": 0.25,
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig(**(settings | changes))


def prepare_texts(folder: Path, texts: Iterable[str], **changes: Any) -> PreparedData:
    write_texts(folder / "texts", texts)
    return prepare(config(folder, **changes))


def decoded_documents(prepared: PreparedData, tokens: Any) -> list[str]:
    """The documents of a token array, by way of the saved tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    ids = tokens.tolist()
    ends = [place for place, token in enumerate(ids) if token == prepared.eos_token_id]
    assert ends
    assert ends[-1] == len(ids) - 1
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }
