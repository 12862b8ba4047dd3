"""prepare: what the token files hold, what the cache key knows, and that nothing half-made is ever seen."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import data_samples as samples
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from relora import DataError
from relora.data.corpus import content_rank
from relora.data.prepare import load_prepared, prepare

TEXTS = [samples.text(seed) for seed in range(40)]


def is_heldout(text, fraction):
    """The rule in its own words: the head of the SHA-256, as a fraction."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def folders(cache):
    return sorted(path.name for path in (cache / "prepared").iterdir() if not path.name.endswith(".lock"))


# What the files hold


def test_documents_keep_their_order_and_each_ends_with_the_end_token(tmp_path):
    prepared = samples.prepare_texts(tmp_path, TEXTS)
    train = samples.decoded_documents(prepared, prepared.train_tokens)
    assert train == [text for text in TEXTS if not is_heldout(text, 0.25)]


def test_held_out_documents_stand_in_the_order_of_their_hashes(tmp_path):
    prepared = samples.prepare_texts(tmp_path, TEXTS)
    heldout = samples.decoded_documents(prepared, prepared.heldout_tokens)
    expected = [text for text in TEXTS if is_heldout(text, 0.25)]
    assert heldout == sorted(expected, key=lambda text: content_rank(text.encode()))
    assert heldout != expected


def test_counts_are_what_the_files_hold(tmp_path):
    prepared = samples.prepare_texts(tmp_path, [*TEXTS, "", "a"])
    heldout = [text for text in TEXTS if is_heldout(text, 0.25)]
    train = [text for text in TEXTS if not is_heldout(text, 0.25)]
    assert prepared.counts == {
        "documents": 41,
        "train_documents": len(train),
        "heldout_documents": len(heldout),
        "train_tokens": len(prepared.train_tokens),
        "heldout_tokens": len(prepared.heldout_tokens),
        "train_bytes": len("".join(train).encode()),
        "heldout_bytes": len("".join(heldout).encode()),
        "empty_skipped": 1,
        "short_skipped": 1,
    }
    assert prepared.heldout_bytes == prepared.counts["heldout_bytes"]
    assert prepared.bytes_per_token == prepared.heldout_bytes / len(prepared.heldout_tokens)


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path):
    secret = next(text for n in range(100) if is_heldout(text := f"zqxj{n} " * 50, 0.25))
    with_secret = samples.prepare_texts(tmp_path / "with", [*TEXTS, secret])
    without = samples.prepare_texts(tmp_path / "without", TEXTS)
    saved = [p.tokenizer_folder / "tokenizer.json" for p in (with_secret, without)]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert len(with_secret.heldout_tokens) > len(without.heldout_tokens)


def test_added_documents_change_no_sides_and_equal_ones_share_one(tmp_path):
    before = samples.prepare_texts(tmp_path / "before", TEXTS)
    after = samples.prepare_texts(tmp_path / "after", [samples.text(99), *reversed(TEXTS), *TEXTS])
    for field in ("train_tokens", "heldout_tokens"):
        small = samples.decoded_documents(before, getattr(before, field))
        large = samples.decoded_documents(after, getattr(after, field))
        assert set(small) <= set(large)
        assert all(large.count(text) == 2 for text in small)


def test_limits_end_the_reading(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    assert prepare(samples.config(tmp_path, max_documents=30)).counts["documents"] == 30
    limit = sum(len(text.encode()) for text in TEXTS[:25])
    assert prepare(samples.config(tmp_path, max_bytes=limit)).counts["documents"] == 25
    assert prepare(samples.config(tmp_path, max_bytes=limit + 1)).counts["documents"] == 26


@pytest.mark.parametrize(("num_tokens", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_as_long_as_they_fit(tmp_path, num_tokens, dtype):
    words = {"</s>": 0} | {f"w{n}": n for n in range(1, num_tokens)}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = [f"w{num_tokens - 1} w{n}" for n in range(1, 60)]
    prepared = samples.prepare_texts(tmp_path, texts, tokenizer=str(tmp_path / "tokenizer.json"))
    assert prepared.vocab_size == num_tokens
    assert prepared.train_tokens.dtype == prepared.heldout_tokens.dtype == dtype
    assert prepared.train_tokens[0] == num_tokens - 1


def test_a_given_tokenizer_is_saved_beside_the_tokens(tmp_path):
    first = samples.prepare_texts(tmp_path / "first", TEXTS)
    second = samples.prepare_texts(tmp_path / "second", TEXTS, tokenizer=str(first.tokenizer_folder))
    assert second.fingerprint == first.fingerprint
    assert second.folder.name != first.folder.name
    assert samples.decoded_documents(second, second.train_tokens)


def test_a_model_with_too_few_embeddings_is_refused(tmp_path):
    prepared = samples.prepare_texts(tmp_path, TEXTS)
    prepared.check_fits(prepared.vocab_size)
    with pytest.raises(DataError, match=r"token ids up to 269, but the model's vocab_size is 269"):
        prepared.check_fits(269)


def test_the_standard_library_is_prepared_without_any_setting_but_size(tmp_path):
    settings = {"source": "python-stdlib", "path": None, "max_bytes": 300_000, "heldout_fraction": 0.1}
    prepared = prepare(samples.config(tmp_path, **settings))
    assert prepared.counts["train_bytes"] + prepared.counts["heldout_bytes"] >= 300_000
    assert "import" in "".join(samples.decoded_documents(prepared, prepared.train_tokens))


# The cache


def test_a_second_call_finds_everything_again_and_writes_nothing(tmp_path):
    first = samples.prepare_texts(tmp_path, TEXTS)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    stages = []
    second = prepare(samples.config(tmp_path), progress=lambda stage, _: stages.append(stage))
    assert stages == ["looking for prepared tokens"]
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert (second.counts, second.notes) == (first.counts, first.notes)


def test_moved_text_and_another_seq_len_are_found_again(tmp_path):
    first = samples.prepare_texts(tmp_path, TEXTS)
    (tmp_path / "texts").rename(tmp_path / "moved")
    again = prepare(samples.config(tmp_path, path=str(tmp_path / "moved"), seq_len=8))
    assert again.folder == first.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 271},
        {"heldout_fraction": 0.3},
        {"max_documents": 30},
        {"max_bytes": 9000},
        {"document": "line"},
        {"on_invalid_utf8": "skip"},
        {"eos_token": "<stop>"},
        {"tokenizer_bytes": 5000},
    ],
)
def test_a_setting_that_can_change_the_tokens_has_its_own_folder(tmp_path, changes):
    first = samples.prepare_texts(tmp_path, TEXTS)
    other = prepare(samples.config(tmp_path, **changes))
    assert other.folder != first.folder
    assert len(folders(tmp_path / "cache")) == 2


def test_the_fingerprint_tells_what_training_sees(tmp_path):
    first = samples.prepare_texts(tmp_path, TEXTS)
    no_effect = prepare(samples.config(tmp_path, on_invalid_utf8="skip"))
    assert no_effect.fingerprint == first.fingerprint
    (tmp_path / "texts" / "0007.txt").write_text("something else entirely")
    assert prepare(samples.config(tmp_path)).fingerprint != first.fingerprint


def test_the_manifest_holds_size_and_digest_of_every_file(tmp_path):
    folder = samples.prepare_texts(tmp_path, TEXTS).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    found = samples.files_below(folder)
    found.pop("manifest.json")
    assert {"train.bin", "heldout.bin", "tokenizer/tokenizer.json"} <= set(found)
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in found.items()
    }


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_refused_with_the_file_and_the_remedy_and_kept(tmp_path, name, damage):
    file = samples.prepare_texts(tmp_path, TEXTS).folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-2] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "remove":
        file.unlink()
    before = samples.files_below(tmp_path)
    with pytest.raises(DataError, match=rf"{name} .*damaged; delete .*{file.parents[name.count('/')].name}"):
        prepare(samples.config(tmp_path))
    assert samples.files_below(tmp_path) == before


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format_version": 99}'])
def test_a_folder_without_a_readable_manifest_is_refused(tmp_path, content):
    manifest = samples.prepare_texts(tmp_path, TEXTS).folder / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    for call in (lambda: prepare(samples.config(tmp_path)), lambda: load_prepared(manifest.parent)):
        with pytest.raises(DataError, match="delete this folder"):
            call()


# Never half-made


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenising"])
def test_an_interrupt_leaves_no_folder_and_the_next_call_succeeds(tmp_path, stage):
    def interrupt(now, _):
        if now == stage:
            raise KeyboardInterrupt

    samples.write_texts(tmp_path / "texts", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        prepare(samples.config(tmp_path), progress=interrupt)
    assert folders(tmp_path / "cache") == []
    assert prepare(samples.config(tmp_path)).counts["documents"] == 40


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    code = (
        "import os, signal, sys; from pathlib import Path; import data_samples as samples\n"
        "from relora.data.prepare import prepare\n"
        "def kill(stage, _):\n"
        "    if stage == 'tokenising': os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(samples.config(Path(sys.argv[1])), progress=kill)\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=here, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in folders(tmp_path / "cache")] == [True]
    prepared = prepare(samples.config(tmp_path))
    assert folders(tmp_path / "cache") == [prepared.folder.name]


def test_of_two_that_start_together_one_builds_and_the_other_waits(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    inside, stages, results = threading.Event(), [], []

    def first(stage, _):
        if stage == "tokenising":
            inside.set()
            waiting.wait(20)

    def second(stage, _):
        stages.append(stage)
        if stage.startswith("waiting for another process"):
            waiting.set()

    def run(progress):
        results.append(prepare(samples.config(tmp_path), progress=progress).fingerprint)

    waiting = threading.Event()
    builder = threading.Thread(target=run, args=(first,))
    builder.start()
    assert inside.wait(20)
    run(second)
    builder.join(20)
    assert results[0] == results[1]
    assert "tokenising" not in stages
    assert waiting.is_set()


def test_text_that_changes_while_it_is_read_is_refused(tmp_path):
    def meddle(stage, _):
        if stage == "tokenising":
            (tmp_path / "texts" / "0039.txt").write_text("changed under your feet")

    samples.write_texts(tmp_path / "texts", TEXTS)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(samples.config(tmp_path), progress=meddle)
    assert folders(tmp_path / "cache") == []


def test_progress_counts_bytes_of_each_stage(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    seen = {}
    prepared = prepare(samples.config(tmp_path), progress=lambda stage, count: seen.update({stage: count}))
    total = prepared.counts["train_bytes"] + prepared.counts["heldout_bytes"]
    assert seen == {"looking for prepared tokens": 0, "training the tokenizer": total, "tokenising": total}


# The tuning split


def prepared_texts(prepared, split):
    return samples.decoded_documents(prepared, prepared.evaluation(split)[0])


def test_tuning_documents_come_out_of_training_and_leave_the_held_out_ones_alone(tmp_path):
    without = samples.prepare_texts(tmp_path / "without", TEXTS)
    prepared = samples.prepare_texts(tmp_path / "with", TEXTS, tuning_fraction=0.2)
    assert prepared_texts(prepared, "heldout") == prepared_texts(without, "heldout")
    tuning = [text for text in TEXTS if is_heldout(text, 0.45) and not is_heldout(text, 0.25)]
    assert prepared_texts(prepared, "tuning") == sorted(tuning, key=lambda t: content_rank(t.encode()))
    train = samples.decoded_documents(prepared, prepared.train_tokens)
    assert train == [text for text in TEXTS if not is_heldout(text, 0.45)]
    assert prepared.counts["tuning_bytes"] == len("".join(tuning).encode())
    assert prepared.fingerprint != without.fingerprint


def test_data_without_a_tuning_split_keeps_its_key_and_refuses_to_evaluate_on_it(tmp_path):
    prepared = samples.prepare_texts(tmp_path, TEXTS)
    inputs = json.loads((prepared.folder / "manifest.json").read_text())["inputs"]
    assert "tuning_fraction" not in inputs and not (prepared.folder / "tuning.bin").exists()
    with pytest.raises(DataError, match=r"set data\.tuning_fraction above 0"):
        prepared.evaluation("tuning")


def test_tuning_split_that_gets_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="fell into the tuning split"):
        samples.prepare_texts(tmp_path, TEXTS, tuning_fraction=1e-6)
