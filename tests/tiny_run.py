"""A recipe small enough to train in a second or two, on text made here."""

from collections.abc import Mapping
from pathlib import Path

from relora.train.config import Recipe
from relora.train.recipe_io import resolve

WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "value",
    "index",
    "total",
    "number",
    "string",
    "result",
    "list",
    "for",
    "while",
    "if",
    "else",
]


def write_text(folder: Path, *, documents: int = 120) -> Path:
    """Write documents with structure enough to be learned from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            " ".join(
                WORDS[(number * 7 + line * 3 + word * (1 + number % 5)) % len(WORDS)] for word in range(9)
            )
            for line in range(14)
        ]
        (folder / f"document-{number:03d}.txt").write_text(f"{number}\n" + "\n".join(lines) + "\n")
    return folder


def tiny_recipe(tmp_path: Path, **changes: Mapping[str, object]) -> Recipe:
    """Return a ReLoRA run of 12 steps: switch after 4, restarts after 6, 8 and 10."""
    text = tmp_path / "text"
    if not text.exists():
        write_text(text)
    base = {
        "run": {"name": "tiny", "out": str(tmp_path / "runs"), "method": "relora"},
        "model": {
            "preset": None,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
        },
        "data": {
            "source": "text",
            "path": str(text),
            "vocab_size": 300,
            "seq_len": 16,
            "heldout_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        },
        "relora": {"rank": 3, "restart_every": 2, "warm_start_steps": 4, "scaling_rule": "matched"},
        "optim": {"lr": 5e-3, "betas": [0.9, 0.95]},
        "schedule": {"warmup_steps": 2, "rewarmup_steps": 1},
        "train": {"steps": 12, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
        "eval": {"every": 5, "sequences": 8},
        "checkpoint": {"every": 3, "keep_last": 9},
        "log": {"every": 1},
    }
    return resolve(base, changes)
