"""Damaged and foreign checkpoints: each is found, called by its name, and never loaded."""

import json
import os

import pytest
from checkpoint_samples import replace_file, rewrite_manifest, save

from relora.checkpoint.store import latest_valid, load_checkpoint, verify_checkpoint
from relora.errors import CheckpointError


def test_every_flipped_byte_is_found(tmp_path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for position in range(0, len(data), 13):
            flipped = bytearray(data)
            flipped[position] ^= 1 << (position % 8)
            file.write_bytes(bytes(flipped))
            problems = verify_checkpoint(path)
            assert len(problems) == 1, (file.name, position)
            assert file.name in problems[0]
        file.write_bytes(data)
    assert verify_checkpoint(path) == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["truncated", "lengthened", "missing", "emptied", "folder", "link", "pipe"])
def test_damage_to_a_file_is_named_and_the_checkpoint_is_not_loaded(tmp_path, name, kind):
    path = save(tmp_path / "root", 1)
    file = path / name
    data = file.read_bytes()
    file.unlink()
    if kind == "truncated":
        file.write_bytes(data[:-1])
    elif kind == "lengthened":
        file.write_bytes(data + b"\0")
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "folder":
        file.mkdir()
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    problems = verify_checkpoint(path)
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_a_size_is_said_with_what_was_expected_and_found(tmp_path):
    path = save(tmp_path, 1)
    file = path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    assert verify_checkpoint(path) == [f"model.safetensors should have {size} bytes, found {size - 4}"]


def test_all_files_of_a_wrong_size_are_named_before_any_is_digested(tmp_path):
    path = save(tmp_path, 1)
    for name in ("model.safetensors", "state.json"):
        (path / name).write_bytes(b"short")
    problems = verify_checkpoint(path)
    assert {problem.split()[0] for problem in problems} == {"model.safetensors", "state.json"}


def test_a_folder_under_another_steps_name_is_refused(tmp_path):
    path = save(tmp_path, 1).rename(tmp_path / "step-00000009")
    assert "should be of step-00000009, found step 1" in verify_checkpoint(path)[0]
    assert verify_checkpoint(path.rename(tmp_path / "best")) == []


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path):
    assert "found nothing" in verify_checkpoint(tmp_path / "step-00000001")[0]
    with pytest.raises(CheckpointError, match="found nothing"):
        load_checkpoint(tmp_path / "step-00000001")


def test_the_newest_valid_checkpoint_is_found_and_the_damaged_ones_are_named(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (paths[3] / "manifest.json").unlink()
    (paths[2] / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000009").symlink_to(paths[0])
    (tmp_path / ".step-00000008.0123456789abcdef.tmp").mkdir()
    (tmp_path / "step-8").mkdir()
    found, problems = latest_valid(tmp_path)
    assert found == paths[1]
    assert [problem.split(":")[0] for problem in problems] == [
        "step-00000009",
        "step-00000004",
        "step-00000003",
    ]


def test_no_checkpoint_is_no_error(tmp_path):
    assert latest_valid(tmp_path) == (None, [])
    assert latest_valid(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(
    "name",
    [
        "../state.json",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "model.pt",
        ".x.safetensors",
        "model.safetensors\n",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = save(tmp_path, 1)
    rewrite_manifest(path, lambda content: content["files"].update({name: content["files"]["state.json"]}))
    assert "neither state.json nor a bare NAME.safetensors" in verify_checkpoint(path)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format_version=2), "format_version 1, found 2"),
        (lambda content: content.update(step="one"), "step should be a whole number"),
        (lambda content: content.pop("files"), "files should be an object"),
        (lambda content: content["files"].pop("state.json"), "should list state.json"),
        (lambda content: content["files"]["state.json"].update(size=-1), "size of state.json"),
        (lambda content: content["files"]["state.json"].update(size=True), "size of state.json"),
        (lambda content: content["files"]["state.json"].update(sha256="xyz"), "sha256 of state.json"),
        (lambda content: content["files"]["state.json"].update(more=1), "entry of state.json"),
        (lambda content: content["files"]["model.safetensors"].update(tied={"x": 1}), "tied names"),
        (lambda content: content["files"]["model.safetensors"].update(tied={"x": "y"}), "'x' has no tensor"),
        (
            lambda content: content["files"]["model.safetensors"].update(tied={"b": "a.weight"}),
            "'b' is stored itself",
        ),
    ],
)
def test_malformed_manifests_are_refused_in_words(tmp_path, change, words):
    path = save(tmp_path, 1)
    rewrite_manifest(path, change)
    assert words in verify_checkpoint(path)[0]
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a": ' * 5_000,
        b'"' + b'\\"' * 100_000,
        b'{"format_version": 1, "format_version": 1}',
        b'{"format_version": NaN}',
        b'{"format_version": 1e999}',
        b"1" * 10_000,
        b'{"format_version": 1, "step": 1' + b"0" * 4000 + b"}",
    ],
)
def test_manifests_that_are_no_sound_json_are_refused(tmp_path, data):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(data)
    assert "manifest.json" in verify_checkpoint(path)[0]


def test_a_manifest_too_long_is_refused_before_it_is_read(tmp_path):
    path = save(tmp_path, 1)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # a hole: no disk is used, but reading it would take all memory
    assert "1099511627776 bytes, at most" in verify_checkpoint(path)[0]


def tensor_header(dtype: str, shape: list[int], end: int, *, count: int = 1) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return json.dumps({f"w{index}": entry for index in range(count)}).encode()


BAD_HEADERS = {
    "empty": (b"", b""),
    "long": (b"{}" + b" " * (17 * 2**20), b""),
    "deep": (b"[" * 200_000, b""),
    "huge shape": (tensor_header("F32", [2**20, 2**20, 2**20], 4), b"1234"),
    "overflowing shape": (tensor_header("F32", [2**62, 4], 4), b"1234"),
    "overflowing empty shape": (tensor_header("F32", [2**63, 0], 0), b""),
    "negative shape": (tensor_header("F32", [-1], 4), b"1234"),
    "too few bytes": (tensor_header("F32", [2], 4), b"1234"),
    "bytes of no tensor": (tensor_header("F32", [1], 4), b"12345678"),
    "half bytes": (tensor_header("F4", [8], 4), b"1234"),
    "unknown dtype": (tensor_header("X9", [1], 4), b"1234"),
    "many dimensions": (tensor_header("F32", [1] * 100, 4), b"1234"),
    "many tensors": (tensor_header("U8", [0], 0, count=100_001), b""),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_headers_out_of_bounds_are_refused(tmp_path, case):
    header, data = BAD_HEADERS[case]
    path = save(tmp_path, 1)
    replace_file(path, "model.safetensors", len(header).to_bytes(8, "little") + header + data)
    problems = verify_checkpoint(path)
    assert len(problems) == 1
    assert "model.safetensors" in problems[0]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("length", [2**63, 2**24, 100])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = save(tmp_path, 1)
    replace_file(path, "model.safetensors", length.to_bytes(8, "little") + b"{}")
    assert "model.safetensors is not a safetensors file" in verify_checkpoint(path)[0]


@pytest.mark.parametrize("data", [b"[]", b'{"a": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_state_that_is_no_sound_json_object_is_refused(tmp_path, data):
    path = save(tmp_path, 1)
    replace_file(path, "state.json", data)
    assert "state.json" in verify_checkpoint(path)[0]
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_checkpoint(path)
