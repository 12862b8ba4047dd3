"""The tokenizer, trained or given, and documents to token ids at the speed of the `tokenizers` library.

Text is only text: an end-of-document token that stands written out in a document is encoded as its
characters, and the tokenizer adds, cuts and pads nothing. Long documents are encoded in pieces that end where
white space begins. The pre-tokenizer of GPT-2, which is ours, never joins text across such a place, so there
the pieces give the ids of the whole, and a line of 100 MB needs no more memory than its text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relora.data.corpus import Document
from relora.errors import DataError

DEFAULT_EOS = "<|endoftext|>"
_USUAL_EOS = (DEFAULT_EOS, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 21
_LOOK_BACK = 1 << 12
# The trainer takes time quadratic in the length of a word: text without any space must not stall it, and no
# single document should decide the vocabulary.
_TRAINING_PIECE_CHARACTERS = 1 << 11
_MAX_TRAINING_CHARACTERS = 1 << 22
_GAP = re.compile(r"(?<=\S)\s")

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A Hugging Face fast tokenizer with an end-of-document token."""

    fast: Any
    """The `transformers.PreTrainedTokenizerFast`."""
    eos_token_id: int
    vocab_size: int
    """len(fast): added tokens included; every id is below it."""

    @property
    def fingerprint(self) -> str:
        """A hex digest of all that decides the ids."""
        state = f"{self.fast.backend_tokenizer.to_str()}\n{self.eos_token_id}"
        return hashlib.sha256(state.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained` loads.

        Raises:
            OSError: if they cannot be written.
        """
        try:
            self.fast.save_pretrained(folder)
        except Exception as error:  # all the Rust library has for a full disk
            raise OSError(str(error)) from error

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Tokens]]:
        """Yield each document with its ids, in order, without the end-of-document token.

        Raises:
            DataError: if an id is not below vocab_size.
        """
        backend = self._plain_backend()
        current: Document | None = None
        parts: list[Tokens] = []
        for batch in _batches(documents):
            encodings = backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (document, _), encoding in zip(batch, encodings, strict=True):
                if current is not None and document is not current:
                    yield current, self._checked(current, parts)
                    parts = []
                current = document
                parts.append(np.array(encoding.ids, dtype=np.uint32))
        if current is not None:
            yield current, self._checked(current, parts)

    def _plain_backend(self) -> Any:
        """Return a copy of the Rust tokenizer that adds, cuts and pads nothing."""
        tokenizers: Any = import_module("tokenizers")
        backend = tokenizers.Tokenizer.from_str(self.fast.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    def _checked(self, document: Document, parts: list[Tokens]) -> Tokens:
        ids = np.concatenate(parts)
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise DataError(
                f"{document.place} gives token id {int(ids.max())}, but the tokenizer has only "
                f"{self.vocab_size} tokens: its ids have gaps; use another, or save it again without them"
            )
        return ids


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, eos_token: str | None) -> TextTokenizer:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: The training documents, or pieces of them.
        vocab_size: Number of tokens, the 256 bytes and the end-of-document token included.
        eos_token: Name of that token, which is also the beginning-of-document token; None takes
            "<|endoftext|>".

    Raises:
        DataError: if the texts do not support so many tokens.
    """
    tokenizers: Any = import_module("tokenizers")
    eos_token = eos_token or DEFAULT_EOS
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is no evidence for a token
        special_tokens=[eos_token],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"the training text supports a vocabulary of {reached} tokens, not data.vocab_size = "
            f"{vocab_size}: set data.vocab_size to {reached} or less, or add text"
        )
    fast = _fast(tokenizer_object=backend, eos_token=eos_token, bos_token=eos_token)
    return _finished(fast, "the trained BPE")


def load_tokenizer(given: str, *, eos_token: str | None) -> TextTokenizer:
    """Load a tokenizer.json, a Hugging Face folder, or a hub id; code that comes with one is never run.

    Args:
        given: Path or id.
        eos_token: Its end-of-document token; None takes the one it declares.

    Raises:
        DataError: if it cannot be loaded, is not a fast tokenizer, or has no end-of-document token.
    """
    path = Path(given).expanduser()
    looks_like_path = given.endswith(".json") or given.startswith((".", "/", "~")) or given.count("/") > 1
    if looks_like_path and not path.exists():
        raise DataError(f"tokenizer {path} does not exist: check data.tokenizer (taken from {Path.cwd()})")
    # The Rust library raises bare Exception, and transformers whatever it met; hence Exception, here only.
    try:
        if path.is_file():
            fast = _fast(tokenizer_file=str(path))
        else:
            transformers: Any = import_module("transformers")
            # Said out loud because, left unsaid, transformers would ask on the terminal.
            fast = transformers.AutoTokenizer.from_pretrained(
                str(path) if path.exists() else given, trust_remote_code=False
            )
    except Exception as error:
        raise DataError(
            f"tokenizer {given!r} cannot be loaded: {' '.join(str(error).split())[:500]}: data.tokenizer "
            "must be 'bpe', a tokenizer.json, or a Hugging Face folder or id that can be reached"
        ) from error
    if not getattr(fast, "is_fast", False):
        raise DataError(f"tokenizer {given!r} has no fast (tokenizer.json) form: give one that has")
    eos_token = eos_token or fast.eos_token or _usual_eos(fast)
    if eos_token is None:
        raise DataError(
            f"tokenizer {given!r} has no end-of-document token: set data.eos_token to one of its tokens "
            f"(special ones: {', '.join(_special_tokens(fast)) or 'none'})"
        )
    if eos_token not in fast.get_vocab():
        raise DataError(
            f"data.eos_token {eos_token!r} is not a token of {given!r} "
            f"(special ones: {', '.join(_special_tokens(fast)) or 'none'})"
        )
    fast.eos_token = eos_token
    return _finished(fast, given)


def pieces(text: str, *, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut `text` into pieces of at most `limit` characters, where white space begins if that is in reach."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        window = end - min(limit // 2, _LOOK_BACK)
        cut = max((match.start() for match in _GAP.finditer(text, window, end)), default=end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def training_texts(documents: Iterable[Document], *, max_bytes: int) -> Iterator[str]:
    """Yield what a tokenizer is trained on: the documents that are not held out, up to max_bytes."""
    num_bytes = 0
    for document in documents:
        if document.split != "train":
            continue
        yield from pieces(document.text[:_MAX_TRAINING_CHARACTERS], limit=_TRAINING_PIECE_CHARACTERS)
        num_bytes += document.num_bytes
        if num_bytes >= max_bytes:
            return


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    size = 0
    for document in documents:
        for piece in pieces(document.text):
            batch.append((document, piece))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _fast(**arguments: object) -> Any:
    transformers: Any = import_module("transformers")
    return transformers.PreTrainedTokenizerFast(clean_up_tokenization_spaces=False, **arguments)


def _finished(fast: Any, name: str) -> TextTokenizer:
    eos_token_id = fast.eos_token_id
    vocab_size = len(fast)
    if eos_token_id is None or eos_token_id >= vocab_size:
        raise DataError(f"tokenizer {name!r}: end-of-document id {eos_token_id} is not below {vocab_size}")
    return TextTokenizer(fast=fast, eos_token_id=eos_token_id, vocab_size=vocab_size)


def _special_tokens(fast: Any) -> list[str]:
    return [token.content for token in fast.added_tokens_decoder.values() if token.special]


def _usual_eos(fast: Any) -> str | None:
    """Return the end-of-document token of a bare tokenizer.json, which has no place to say which it is."""
    found = [token for token in _special_tokens(fast) if token in _USUAL_EOS]
    return found[0] if len(found) == 1 else None
