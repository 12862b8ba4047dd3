"""Measure how fast checkpoints are saved and loaded, against a plain copy and a plain read of their files.

    python benchmarks/checkpoint_speed.py [--json FILE] [--presets llama-9m ...] [--folder DISK] [--rounds 10]

A save takes the run's state, writes safetensors with their SHA-256, syncs files and folders, renames, and
reads everything back; the copy is `shutil.copyfile` and fsync of the same files. A load reads, checks every
digest and returns tensors; the read is `Path.read_bytes`. Full-rank runs, the largest checkpoints of a size.
Files that were just written come from the system's cache for all four, and both writers first remove what
their last round left. MB are 10^6 bytes; the exponents say how the seconds grow with the bytes.
"""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from common import arguments, exponent, interleaved, note, publish, ratios, record
from training import CPU, Stepper, token_batch

from relora.checkpoint.store import load_checkpoint, save_checkpoint
from relora.data.prepared import PreparedData
from relora.train.methods import load_method
from relora.train.model import build_model
from relora.train.phase import Plan
from relora.train.recipe_io import resolve
from relora.train.run_folder import settings
from relora.train.setup import build_state
from relora.train.state import checkpoint_content

VOCAB_SIZE = 4096


def content_of(sizes: dict[str, object]) -> dict[str, Any]:
    """Return the checkpoint of a full-rank run after its first step."""
    recipe = resolve(
        {"run": {"method": "full"}, "model": sizes, "data": {"vocab_size": VOCAB_SIZE, "seq_len": 32}}
    )
    data = cast(PreparedData, SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_id=0))
    method = load_method("full")(Plan(recipe=recipe))
    model = build_model(recipe, data)
    state = build_state(model, method, CPU, low_rank=False)
    batch = token_batch(32, vocab_size=VOCAB_SIZE, seq_len=32)
    Stepper(model, state.optimizer.adamw, batch, precision="fp32")()
    state.progress.step = 1
    return checkpoint_content(state, precision="fp32", fingerprint="", recipe=settings(recipe))


class Disk:
    """The four things that are timed, on one checkpoint in one folder."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self._folder, self._content = folder, content
        self.kept = save_checkpoint(folder / "kept", **content)
        self.num_bytes = sum(file.stat().st_size for file in self.kept.iterdir())

    def save(self) -> None:
        """Write it where nothing is."""
        shutil.rmtree(self._folder / "saved", ignore_errors=True)
        save_checkpoint(self._folder / "saved", **self._content)

    def copy(self) -> None:
        """Copy its files and bring them to the disk."""
        target = self._folder / "copied"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in self.kept.iterdir():
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb+") as stream:
                os.fsync(stream.fileno())

    def load(self) -> None:
        """Read and verify it."""
        load_checkpoint(self.kept)

    def read(self) -> None:
        """Read its files."""
        for file in self.kept.iterdir():
            file.read_bytes()


def measure(sizes: dict[str, object], root: Path | None, *, rounds: int) -> dict[str, Any]:
    """Time one size of model."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        disk = Disk(Path(scratch), content_of(sizes))
        found: dict[str, Any] = {"checkpoint_bytes": disk.num_bytes}
        for mine, plain in (("save", "copy"), ("load", "read")):
            times = interleaved({mine: getattr(disk, mine), plain: getattr(disk, plain)}, rounds=rounds)
            for name, row in ratios(times, base=plain).items():
                found[name] = {"mb_per_s": disk.num_bytes / 1e6 / row["median_s"], **row}
    return found


def main() -> None:
    """Measure every size."""
    parser = arguments(__doc__)
    parser.add_argument("--presets", nargs="+", default=["llama-9m", "llama-20m", "llama-60m", "llama-130m"])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: where temporary files go"
    )
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    sizes: dict[str, dict[str, object]] = {name: {"preset": name} for name in options.presets}
    if options.quick:
        numbers = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        sizes = {f"hidden {n}": {"preset": None, "hidden_size": n, **numbers} for n in (16, 32)}
        options.rounds = 2
    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"rounds": options.rounds, "sizes": rows}
    for name, model in sizes.items():
        row = rows[name] = measure(model, options.folder, rounds=options.rounds)
        result["headline"] = {
            f"{size}: {way}, {what}": found[way][key]
            for size, found in rows.items()
            for way in ("save", "load")
            for what, key in (("MB/s", "mb_per_s"), ("of a plain file's speed", "speed"))
        }
        speeds = ", ".join(f"{way} {row[way]['mb_per_s']:.0f}" for way in ("save", "copy", "load", "read"))
        note(f"{name}: {row['checkpoint_bytes'] / 1e6:.0f} MB; MB/s: {speeds}")
        record("checkpoint_speed", result, options)
    num_bytes = [row["checkpoint_bytes"] for row in rows.values()]
    if len(rows) > 1:
        result["exponents"] = {
            way: exponent(num_bytes, [row[way]["median_s"] for row in rows.values()])
            for way in ("save", "copy", "load", "read")
        }
    publish("checkpoint_speed", result, options)


if __name__ == "__main__":
    main()
