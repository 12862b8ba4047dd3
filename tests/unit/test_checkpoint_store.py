"""Saving, loading and retiring checkpoints: what survives, and what is refused."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from checkpoint_samples import assert_same_bits, save, snapshot

from relora.checkpoint.lock import writer_lock
from relora.checkpoint.store import (
    latest_valid,
    load_checkpoint,
    retire,
    save_checkpoint,
    verify_checkpoint,
)
from relora.errors import CheckpointError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = save(tmp_path / "checkpoints", 40)
    loaded = load_checkpoint(path)
    generator = torch.Generator().manual_seed(40)
    assert path == tmp_path / "checkpoints" / "step-00000040"
    assert loaded.step == 40
    assert loaded.state == {"position": 40, "losses": [0.1, 1e-300], "phase": "low_rank", "next": None}
    assert_same_bits(loaded.tensors["model"]["a.weight"], torch.randn(3, 7, generator=generator))
    assert_same_bits(loaded.tensors["model"]["b"], torch.tensor(40.0))
    assert loaded.manifest["restart_index"] == 2
    assert loaded.manifest["format_version"] == 1
    assert set(loaded.manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_manifest_gives_sizes_and_digests_of_the_files(tmp_path):
    import hashlib

    path = save(tmp_path, 1)
    for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives_bit_for_bit(tmp_path, dtype):
    bits = torch.randint(0, 2, (5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    # Random bytes hold NaN with payloads, infinities, -0.0 and subnormal numbers; bool has two values only.
    if dtype != torch.bool:
        bits = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = {
        "matrix": bits.view(dtype),
        "transposed": bits.view(dtype).t(),
        "strided": bits.view(dtype)[::2, ::2],
        "scalar": bits.view(dtype)[0, 0].clone(),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    loaded = load_checkpoint(save(tmp_path, 1, tensors={"model": tensors})).tensors["model"]
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor)
        assert loaded[name].is_contiguous()


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path):
    weight = torch.nn.Parameter(torch.randn(50, 30))
    path = save(
        tmp_path, 1, tensors={"model": {"embed.weight": weight, "head.weight": weight, "x": torch.ones(1)}}
    )
    loaded = load_checkpoint(path).tensors["model"]
    assert loaded["embed.weight"] is loaded["head.weight"]
    assert_same_bits(loaded["head.weight"], weight.detach())
    assert (path / "model.safetensors").stat().st_size < 2 * weight.nbytes
    assert not verify_checkpoint(path)


def test_overlapping_tensors_come_back_whole_and_independent(tmp_path):
    buffer = torch.arange(12.0)
    views = {"all": buffer, "head": buffer[:5], "middle": buffer[3:9], "square": buffer.view(3, 4).t()}
    loaded = load_checkpoint(save(tmp_path, 1, tensors={"model": views})).tensors["model"]
    for name, view in views.items():
        assert_same_bits(loaded[name], view)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == len(views)


def test_conjugate_views_are_not_taken_for_the_tensor_they_share_memory_with(tmp_path):
    plain = torch.randn(4, dtype=torch.complex64)
    loaded = load_checkpoint(save(tmp_path, 1, tensors={"model": {"plain": plain, "conj": plain.conj()}}))
    assert_same_bits(loaded.tensors["model"]["plain"], plain)
    assert_same_bits(loaded.tensors["model"]["conj"], plain.conj().resolve_conj())


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    path = save(tmp_path, 1, tensors={"model": {"w": torch.ones(10_000)}})
    loaded = load_checkpoint(path).tensors["model"]["w"]
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert_same_bits(loaded, torch.ones(10_000))
    loaded.add_(1)


def test_saving_does_not_change_what_is_saved(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    before, pointer = weight.detach().clone(), weight.data_ptr()
    save(tmp_path, 1, tensors={"model": {"w": weight, "t": weight.t()}})
    assert torch.equal(weight, before)
    assert weight.data_ptr() == pointer
    assert weight.requires_grad


def test_no_tensors_at_all_can_be_saved(tmp_path):
    assert load_checkpoint(save(tmp_path, 0, tensors={"optimizer": {}})).tensors == {"optimizer": {}}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta device"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ([1.0], "a list, not a tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_nothing_is_written(tmp_path, tensor, words):
    with pytest.raises(CheckpointError, match=rf"layer\.weight.*{words}"):
        save(tmp_path / "root", 1, tensors={"model": {"layer.weight": tensor}})
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [1, float("nan")]}}, r"state\.a\.b\[1\]"),
        ({"betas": (0.9, 0.99)}, r"state\.betas is a tuple"),
        ({"a": {1: 2}}, r"state\.a has a key 1"),
        ({"a": torch.ones(2)}, r"state\.a is a Tensor"),
        ({"a": Path("x")}, r"state\.a is a "),
    ],
)
def test_state_that_json_would_change_is_refused_by_its_place(tmp_path, state, place):
    with pytest.raises(CheckpointError, match=place):
        save(tmp_path, 1, state=state)


def test_state_nested_too_deep_to_be_read_back_is_refused(tmp_path):
    nested: list[object] = []
    for _ in range(64):
        nested = [nested]
    with pytest.raises(CheckpointError, match="nested too deep"):
        save(tmp_path, 1, state={"a": nested})
    assert load_checkpoint(save(tmp_path, 1, state={"a": nested[0][0]})).state == {"a": nested[0][0]}


@pytest.mark.parametrize("key", ["../model", "a/b", ".hidden", "", "model.safetensors", "x" * 65])
def test_group_names_that_are_no_bare_names_are_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match="cannot name a file"):
        save(tmp_path, 1, tensors={key: {"a": torch.ones(1)}})


@pytest.mark.parametrize("step", [-1, 100_000_000, 1.0, True])
def test_steps_that_have_no_folder_name_are_refused(tmp_path, step):
    with pytest.raises(CheckpointError, match="step must be"):
        save_checkpoint(tmp_path, step=step, tensors={}, state={}, description={})


def test_a_description_cannot_take_a_key_of_the_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="'files'"):
        save(tmp_path, 1, description={"files": []})


def test_files_get_ordinary_permissions(tmp_path):
    path = save(tmp_path, 1)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_files_reach_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path):
    heard = []
    save(tmp_path, 1, observer=lambda action, path: heard.append((action, path.name)))
    folder = heard[0][1]
    assert folder.startswith(".step-00000001.")
    assert heard == [
        ("create", folder),
        ("write", "state.json"),
        ("fsync", "state.json"),
        ("write", "model.safetensors"),
        ("fsync", "model.safetensors"),
        ("write", "optimizer.safetensors"),
        ("fsync", "optimizer.safetensors"),
        ("write", "manifest.json"),
        ("fsync", "manifest.json"),
        ("fsync", folder),
        ("rename", "step-00000001"),
        ("fsync", tmp_path.name),
        ("verify", "step-00000001"),
    ]


def test_a_valid_checkpoint_is_never_written_over(tmp_path):
    before = snapshot(save(tmp_path, 5))
    with pytest.raises(CheckpointError, match="step-00000005 exists and is valid"):
        save(tmp_path, 5, state={"other": 1})
    assert snapshot(tmp_path / "step-00000005") == before


def test_a_damaged_checkpoint_of_the_step_is_replaced(tmp_path):
    (save(tmp_path, 5) / "state.json").unlink()
    assert load_checkpoint(save(tmp_path, 5, state={"new": 1})).state == {"new": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000005"]


def test_what_a_dead_writer_left_is_swept_and_nothing_else(tmp_path):
    tmp_path.joinpath(".step-00000007.00112233aabbccdd.tmp").mkdir()
    tmp_path.joinpath(".step-00000007.00112233aabbccdd.tmp", "model.safetensors").write_bytes(b"half")
    tmp_path.joinpath(".step-00000008.00112233aabbccdd.tmp").symlink_to(tmp_path / "notes")
    tmp_path.joinpath("notes").mkdir()
    tmp_path.joinpath(".step-7.tmp").mkdir()
    save(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        ".step-7.tmp",
        "notes",
        "step-00000007",
    ]


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path):
    stale = tmp_path / ".step-00000007.00112233aabbccdd.tmp"
    stale.mkdir()
    with writer_lock(tmp_path) as held:
        assert held
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on "):
            save(tmp_path, 7)
        assert stale.exists()
    save(tmp_path, 7)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
    ],
)
def test_a_refusal_at_any_operation_leaves_the_older_checkpoint_and_no_rest(tmp_path, number, words):
    before = snapshot(save(tmp_path, 1))
    heard = []
    save(tmp_path / "count", 2, observer=lambda *operation: heard.append(operation))
    for last in range(len(heard) - 1):  # up to the rename and its fsync; the last one is the verification
        left = iter(range(last))

        def refuse(action, path, left=left):
            if next(left, None) is None:
                raise OSError(number, os.strerror(number))

        with pytest.raises(CheckpointError, match=words):
            save(tmp_path, 2, observer=refuse)
        assert snapshot(tmp_path / "step-00000001") == before
        assert not list(tmp_path.glob(".step-*"))
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)  # there once the rename was done


def test_an_interrupt_leaves_no_rest(tmp_path):
    def interrupt(action, path):
        if path.name == "manifest.json":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, observer=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    save(tmp_path, 2)


def test_a_root_that_is_a_file_is_said_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot create"):
        save(tmp_path / "file", 1)
    with pytest.raises(CheckpointError, match="a part of its path is a file"):
        save(tmp_path / "file" / "checkpoints", 1)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_retiring_keeps_the_newest(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert retire(tmp_path, keep_last=2) == [tmp_path / "step-00000020", tmp_path / "step-00000010"]
    assert steps(tmp_path) == [30, 40]
    assert retire(tmp_path, keep_last=2) == []
    assert not list(tmp_path.glob(".step-*"))


def test_retiring_spares_steps_that_are_kept_besides(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert retire(tmp_path, keep_last=1, keep_steps=[20]) == [
        tmp_path / "step-00000030",
        tmp_path / "step-00000010",
    ]
    assert steps(tmp_path) == [20, 40]


def test_retiring_counts_from_the_newest_valid_one_and_leaves_damaged_newer_ones(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for step in (30, 40):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    assert retire(tmp_path, keep_last=1) == [tmp_path / "step-00000010"]
    assert steps(tmp_path) == [20, 30, 40]
    assert latest_valid(tmp_path)[0] == tmp_path / "step-00000020"


def test_nothing_is_retired_when_nothing_is_valid(tmp_path):
    for step in (10, 20):
        (save(tmp_path, step) / "state.json").unlink()
    assert retire(tmp_path, keep_last=1) == []
    assert steps(tmp_path) == [10, 20]
    assert retire(tmp_path / "missing", keep_last=1) == []


def test_retiring_spares_multiples_of_keep_every(tmp_path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    verified = tmp_path / "step-00000050"
    removed = retire(tmp_path, keep_last=1, keep_every=20, verified=verified)
    assert removed == [tmp_path / "step-00000030", tmp_path / "step-00000010"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last must be at least 1"):
        retire(tmp_path, keep_last=0)
