"""Measure how fast text becomes token files, against the `tokenizers` library alone on the same documents.

    python benchmarks/data_speed.py [--json FILE] [--rounds 10]

The text is the running Python's standard library; the tokenizer a BPE trained on it beforehand, which is
timed apart. `prepare` reads, checks, hashes and splits the documents, encodes them, writes and syncs the
files and reads them back against their digests; the library is given the same texts, in memory, all at once.
Opening what is prepared already is timed as well. MB are 10^6 bytes of UTF-8; the exponent says how the
seconds of `prepare` grow with the text.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, exponent, interleaved, note, publish, ratios
from tokenizers import Tokenizer

from relora.data.config import DataConfig
from relora.data.corpus import Tally, documents
from relora.data.prepare import prepare
from relora.data.prepared import load_prepared
from relora.data.sources import open_source

SIZES = (1_000_000, 2_000_000, 4_000_000, 8_000_000)


def preparing(config: DataConfig, folder: Path) -> Callable[[], None]:
    """Return what prepares the text from the start."""
    cache = folder / "cache"

    def run() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        prepare(replace(config, cache_dir=str(cache)))

    return run


def encoding(config: DataConfig, texts: list[str]) -> Callable[[], object]:
    """Return what encodes the texts by the library alone."""
    backend = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json")
    return lambda: backend.encode_batch_fast(texts, add_special_tokens=False)


def measure(config: DataConfig, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Compare the two on the text of `config`, and time the opening of what is there."""
    texts = [document.text for document in documents(open_source(config), config, Tally())]
    num_bytes = sum(len(text.encode()) for text in texts)
    prepared = prepare(replace(config, cache_dir=str(folder / "kept")))
    times = interleaved(
        {
            "prepare": preparing(config, folder),
            "tokenizers alone": encoding(config, texts),
            "open prepared": lambda: load_prepared(prepared.folder),
        },
        rounds=rounds,
    )
    rows = ratios(times, base="tokenizers alone")
    for row in rows.values():
        row["mb_per_s"] = num_bytes / 1e6 / row["median_s"]
    return {"documents": len(texts), "text_bytes": num_bytes, "ways": rows}


def main() -> None:
    """Train the tokenizer, then measure the whole text and parts of it."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    sizes, whole_text = SIZES, DataConfig(vocab_size=4096)
    if options.quick:
        sizes, options.rounds = (200_000, 400_000), 1
        whole_text = DataConfig(vocab_size=512, max_bytes=sizes[-1], heldout_fraction=0.3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begun = time.perf_counter()
        trained = prepare(replace(whole_text, cache_dir=str(folder / "kept")))
        with_training_s = time.perf_counter() - begun
        config = replace(whole_text, tokenizer=str(trained.tokenizer_folder))
        whole = measure(config, folder, rounds=options.rounds)
        note(f"whole text: {whole['ways']['prepare']['mb_per_s']:.2f} MB/s")
        parts = {
            size: measure(replace(config, max_bytes=size), folder, rounds=options.rounds) for size in sizes
        }
    rows = list(parts.values())
    seconds = [row["ways"]["prepare"]["median_s"] for row in rows]
    share = whole["ways"]["prepare"]["speed"]
    publish(
        "data_speed",
        {
            "rounds": options.rounds,
            "headline": {
                "prepare, MB/s": whole["ways"]["prepare"]["mb_per_s"],
                "of tokenizers' speed": share,
            },
            "with_tokenizer_training_s": with_training_s,
            "whole": whole,
            "parts": parts,
            "exponent": exponent([row["text_bytes"] for row in rows], seconds),
        },
        options,
    )


if __name__ == "__main__":
    main()
