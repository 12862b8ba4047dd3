"""Over 1,000 mutated manifests, states, headers and indexes: our error or the same content, nothing else.

The seed is fixed: the same files every time. Where a file is mutated as a disk would (its bytes), nothing
but the very content that was saved may be loaded. Where it is forged as an attacker would (consistent
digests), it is refused in our words or loads; it never gets past our bounds.
"""

import hashlib
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_forging import digest_of, save_run_checkpoint
from mutations import HOSTILE, as_text, mutated_bytes, mutated_json
from tracing import Reached

from relora.checkpoint import folder as folder_module
from relora.checkpoint import manifest as manifest_module
from relora.checkpoint import model_folder, strict_json, tensor_file, values
from relora.checkpoint.folder import load_checkpoint, verify_checkpoint
from relora.checkpoint.model_folder import check_model_folder
from relora.errors import CheckpointError
from relora.train.state import Progress, SavedState, _contradictions, _fits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def reached() -> Reached:
    return Reached(
        strict_json.from_json,
        strict_json.too_deep,
        strict_json._without_doubles,
        strict_json._finite,
        strict_json._bounded,
        strict_json._not_json,
        manifest_module.read_manifest,
        manifest_module._digest_problems,
        manifest_module._step_problems,
        manifest_module._files_problems,
        manifest_module._entry_problems,
        folder_module._problems,
        folder_module._loaded,
        folder_module._check_size,
        folder_module._compare_digest,
        folder_module._check_bounds,
        folder_module._parsed_state,
        tensor_file.read_tensors,
        tensor_file.check_structure,
        tensor_file._header,
        tensor_file._slice_problems,
        values.decode,
        Progress.from_json,
        SavedState.of,
        _contradictions,
        _fits,
    )


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    """Make a folder hold exactly these files."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def forged(files: dict[str, bytes], name: str, data: bytes) -> dict[str, bytes]:
    """Return files with one replaced, listed with its right size and digest."""
    manifest = json.loads(files["manifest.json"])
    manifest["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {**files, name: data, "manifest.json": digest_of(manifest)}


def outcome(path: Path) -> Any:
    """Load a checkpoint of a run, as resuming does; None where it is refused in our words."""
    problems = verify_checkpoint(path)
    assert all(isinstance(problem, str) and problem for problem in problems)
    try:
        loaded = load_checkpoint(path)
        saved = SavedState.of(loaded)
    except CheckpointError as error:
        assert str(error)
        return None
    assert problems == []
    return loaded, saved


def assert_is(found: Any, original: Any) -> None:
    """Check that what was loaded is what was saved, bit for bit."""
    (loaded, saved), (other, other_saved) = found, original
    assert loaded.state == other.state and loaded.manifest == other.manifest and saved == other_saved
    assert loaded.tensors.keys() == other.tensors.keys()
    for group, tensors in other.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in tensors.items())


def test_files_that_a_disk_has_changed_never_load_as_something_else(checkpoint: Path, tmp_path: Path) -> None:
    chance, files, original = random.Random(1), contents(checkpoint), outcome(checkpoint)
    names, folder = sorted(files), tmp_path / checkpoint.name
    refused = 0
    for number in range(600):
        name = names[number % len(names)]
        data = mutated_bytes(files[name], chance)
        found = outcome(put(folder, {**files, name: data}))
        if found is None:
            refused += 1
        else:
            assert_is(found, original)
            assert data == files[name]
    assert refused > 500


def test_forged_manifests_states_and_headers_are_refused_in_words_or_load(
    checkpoint: Path, tmp_path: Path, reached: Reached
) -> None:
    chance, files = random.Random(2), contents(checkpoint)
    folder = tmp_path / checkpoint.name
    manifest, state = json.loads(files["manifest.json"]), json.loads(files["state.json"])
    model = files["model.safetensors"]
    length = int.from_bytes(model[:8], "little")
    header, body = json.loads(model[8 : 8 + length]), model[8 + length :]
    del manifest["manifest_sha256"]
    refused = 0
    with reached.tracing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(900):
            if number % 3 == 0:
                case = {**files, "manifest.json": digest_of(mutated_json(manifest, chance), loose=True)}
            elif number % 3 == 1:
                case = forged(files, "state.json", as_text(mutated_json(state, chance)))
            else:
                text = as_text(mutated_json(header, chance))
                case = forged(files, "model.safetensors", len(text).to_bytes(8, "little") + text + body)
            refused += outcome(put(folder, case)) is None
        for case in targeted(files, manifest, state, body):
            assert outcome(put(folder, case)) is None
        for damage in (lambda file: file.unlink(), lambda file: (file.unlink(), file.mkdir())):
            put(folder, files)
            damage(folder / "state.json")
            assert outcome(folder) is None
            if (folder / "state.json").is_dir():
                (folder / "state.json").rmdir()
        assert outcome(put(folder, files)) is not None
        assert outcome(tmp_path / "step-00000099") is None
        (tmp_path / "step-00000098").symlink_to(folder)
        assert outcome(tmp_path / "step-00000098") is None
    assert refused > 400
    # No file is known that the library opens and then cannot read; it may say so all the same.
    lines = Path(tensor_file.__file__).read_text().splitlines()
    never = {f"tensor_file.py:{n}" for n, line in enumerate(lines, start=1) if "holds what cannot" in line}
    never |= {f"tensor_file.py:{int(place.partition(':')[2]) - 1}" for place in never}
    missed = [place for place in reached.missed if place not in never]
    assert not missed, " ".join(missed)


def targeted(
    files: dict[str, bytes], manifest: dict[str, Any], state: dict[str, Any], body: bytes
) -> list[dict[str, bytes]]:
    """Return forgeries that chance would take long to find: one for each rule of the parsers."""

    def with_manifest(**changes: Any) -> dict[str, bytes]:
        return {**files, "manifest.json": digest_of({**manifest, **changes}, loose=True)}

    def with_state(**changes: Any) -> dict[str, bytes]:
        return forged(files, "state.json", as_text({**state, **changes}))

    def with_header(text: bytes, data: bytes = body) -> dict[str, bytes]:
        return forged(files, "model.safetensors", len(text).to_bytes(8, "little") + text + data)

    entry = manifest["files"]["state.json"]
    listed = manifest["files"]
    progress = state["progress"]["dict"]
    raw = [
        b"[]",
        b"[" * 100,
        b'{"a": 1, "a": 1}',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": 1' + b"0" * 4000 + b"}",
    ]
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = [
        ({"w": {**one, "shape": [2**20, 2**20, 2**20]}}, 4),
        ({"w": {"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, 0),
        ({"w": {"dtype": "U8", "shape": [0, 2**31, 2**31], "data_offsets": [0, 0]}}, 0),
        ({"w": {"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}}, 4),
        ({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, 4),
        ({f"w{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)}, 0),
    ]
    return [
        *({**files, "manifest.json": data} for data in raw),
        *(forged(files, "state.json", data) for data in raw),
        *(with_manifest(step=step) for step in (-1, 10**8, True, "1", manifest["step"] + 1)),
        *(with_manifest(format_version=version) for version in (2, True, None)),
        *(with_manifest(files=found) for found in ([], {})),
        *(with_manifest(files={**listed, name: entry}) for name in ("x/y", "a.pt")),
        *(with_manifest(files={**listed, "state.json": {**entry, **bad}}) for bad in (
            {"size": -1}, {"size": True}, {"sha256": "x"}, {"sha256": 3}, {"more": 1}, {"tied": []},
            {"tied": {"a": 1}},
        )),
        {**files, "manifest.json": files["manifest.json"].replace(b"\n", b"\r\n")},
        {**files, "manifest.json": files["manifest.json"].replace(b'"step": 7', b'"step": 8')},
        {**files, "state.json": files["state.json"].replace(b"low_rank", b"law_rank")},
        with_manifest(
            files={**listed, "model.safetensors": {**listed["model.safetensors"], "tied": {"a": "b"}}}
        ),
        with_manifest(
            files={name: listed[name] for name in listed if name != "optimizer.safetensors"}
        ),
        *(with_state(**{name: bad}) for name in state for bad in (3, None if name != "method" else 3)),
        *(with_state(progress={"dict": {**progress, **bad}}) for bad in (
            {"step": -1}, {"step": 1.5}, {"switch": 3}, {"switch": {"step": "x"}}, {"evaluated": []},
            {"new": 1},
            {"wall_s": 1}, {"step": progress["step"] + 1}, {"restarts": 10**6},
        )),
        *(with_state(progress=bad) for bad in ({}, {"list": []}, {"tuple": [1]}, {"float": "nan"},
            {"float": "x"}, {"tensor": "x"}, {"a": 1, "b": 2}, {"dict": {"step": {"float": "inf"}}})),
        with_state(phase="cooldown"), with_state(precision="fp16"), with_state(more=1),
*(with_header(json.dumps(bad).encode(), b"\0" * size) for bad, size in headers),
        with_header(b" " * (17 * 2**20)), with_header(b"", b""),
        forged(files, "model.safetensors", b""), forged(files, "model.safetensors", b"\xff" * 8),
    ]  # fmt: skip


def test_mutated_model_folders_are_refused_in_words_or_stay_inside(tmp_path: Path) -> None:
    chance, folder = random.Random(3), tmp_path / "model"
    index = {
        "metadata": {"total_size": 100},
        "weight_map": {
            f"layers.{n}.weight": f"model-0000{1 + n // 4}-of-00002.safetensors" for n in range(8)
        },
    }
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "rope": {"theta": 1.0}}
    shard = tensor_bytes()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    reached = Reached(
        model_folder.check_model_folder,
        model_folder.check_files,
        model_folder.check_config,
        model_folder._object,
        model_folder._bounded_json,
        model_folder._config_problems,
        model_folder._indexed,
        model_folder._checked,
    )
    outcomes = {"refused": 0, "taken": 0}

    def look(files: dict[str, bytes], **options: bool) -> bool:
        for old in folder.iterdir() if folder.exists() else ():
            old.unlink()
        try:
            found = check_model_folder(put(folder, files), **options)
        except CheckpointError as error:
            assert str(error)
            outcomes["refused"] += 1
            return False
        assert found and all(path.parent == folder and path.is_file() for path in found)
        outcomes["taken"] += 1
        return True

    whole = {"config.json": as_text(config), "model.safetensors.index.json": as_text(index)}
    whole |= dict.fromkeys(names, shard)
    with reached.tracing():
        assert look(whole)
        for number in range(500):
            name = ("model.safetensors.index.json", "config.json", names[0])[number % 3]
            if name.endswith(".json") and number % 2:
                data = as_text(mutated_json(json.loads(whole[name]), chance))
            else:
                data = mutated_bytes(whole[name], chance)
            look({**whole, name: data})
        for value in HOSTILE:
            look({**whole, "model.safetensors.index.json": as_text({"weight_map": {"a": value}})})
        # One for each rule, which chance may not meet.
        bare = {"config.json": as_text(config)}
        assert not look({}) and not look(bare)
        assert look({**bare, "model.safetensors": shard})
        assert not look({**bare, "pytorch_model.bin": b"x"})
        assert look({**bare, "pytorch_model.bin": b"x"}, with_pickles=True)
        pickled = {
            **bare,
            "pytorch_model.bin.index.json": as_text({"weight_map": {"a": "p.bin"}}),
            "p.bin": b"x",
        }
        assert look(pickled, with_pickles=True) and not look(pickled)
        assert not look({**whole, "adapter_config.json": b"{}"})
        assert not look({**whole, "tokenizer_config.json": b"[" * 65})
        assert not look({**whole, "config.json": b"[]"})
        assert not look({**whole, "config.json": as_text({"attn_implementation": "someone/kernel"})})
        assert not look({**whole, "config.json": as_text({"num_hidden_layers": 10**6})})
        assert not look({**whole, "config.json": as_text({"text_config": {"vocab_size": 2**50}})})
        assert not look(
            {**whole, "model.safetensors.index.json": as_text({"weight_map": {"a": "p.bin"}}), "p.bin": b""}
        )
        assert not look(dict.fromkeys((f"f{n}" for n in range(10_001)), b""))
        for old in folder.iterdir():
            old.unlink()
        put(folder, whole)
        os.mkfifo(folder / "pipe.json")
        with pytest.raises(CheckpointError, match=r"'pipe\.json' is neither a file nor a folder"):
            check_model_folder(folder)
        (folder / "extra.json").symlink_to(folder / "config.json")
        with pytest.raises(CheckpointError, match=r"'extra\.json' is a link"):
            check_model_folder(folder)
    assert outcomes["refused"] > 300 and outcomes["taken"] > 20
    assert not reached.missed, " ".join(reached.missed)


def tensor_bytes() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 8
