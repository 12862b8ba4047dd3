"""Bad input: one clear DataError with place and remedy, or a counted policy; what was on disk stays."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import data_samples as samples
import pytest

from relora import DataError
from relora.data.prepare import prepare

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [samples.text(seed) for seed in range(40)]
GOOD = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)


def refused(folder, match, **settings):
    """Assert that preparing fails with that message and leaves cache and texts as they were."""
    before = samples.files_below(folder)
    with pytest.raises(DataError, match=match) as caught:
        prepare(samples.config(folder, **settings))
    assert samples.files_below(folder) == before
    return str(caught.value)


def write(folder, name, content):
    path = folder / "texts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Nothing, or too little


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_path_that_does_not_exist(tmp_path, source):
    refused(tmp_path, r"texts does not exist: check data\.path", source=source)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_folder_without_files(tmp_path, source):
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    refused(tmp_path, r"texts holds no file.*: check data\.path", source=source)


def test_a_glob_that_matches_nothing(tmp_path):
    refused(tmp_path, r"holds no file: check data\.path", path=str(tmp_path / "*.txt"))


@pytest.mark.parametrize("contents", [[b""], [b"", b"\xef\xbb\xbf", b""]])
def test_a_corpus_of_empty_files(tmp_path, contents):
    for number, content in enumerate(contents):
        write(tmp_path, f"{number}.txt", content)
    refused(tmp_path, rf"texts is an empty corpus: 0 documents \({len(contents)} documents? empty, skipped")


def test_an_empty_json_lines_file(tmp_path):
    write(tmp_path, "a.jsonl", b"\n\n")
    refused(tmp_path, "is an empty corpus", source="jsonl")


def test_a_corpus_of_documents_shorter_than_two_tokens(tmp_path):
    given = samples.prepare_texts(tmp_path / "other", TEXTS).tokenizer_folder
    samples.write_texts(tmp_path / "texts", "abcdefghij")
    refused(
        tmp_path,
        r"empty corpus: 10 documents \(10 documents shorter than 2 tokens, skipped",
        tokenizer=str(given),
    )


def test_documents_shorter_than_two_tokens_are_skipped_and_counted(tmp_path):
    prepared = samples.prepare_texts(tmp_path, [*TEXTS, "a", "b"])
    assert prepared.counts["short_skipped"] == 2
    place = tmp_path / "texts" / "0040.txt"
    assert prepared.notes == (f"2 documents shorter than 2 tokens, skipped (first: {place})",)
    assert not {"a", "b"} & set(samples.decoded_documents(prepared, prepared.train_tokens))


def test_a_vocabulary_larger_than_the_data_supports(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    refused(tmp_path, r"supports a vocabulary of \d+ tokens, not data\.vocab_size = 30000", vocab_size=30_000)


def test_no_document_held_out_names_a_fraction_that_works(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS[:5])
    message = refused(tmp_path, r"none of 5 documents was held out", heldout_fraction=1e-6)
    fraction = float(message.split("set it above ")[1].split(",")[0]) + 1e-4
    assert prepare(samples.config(tmp_path, heldout_fraction=fraction)).counts["heldout_documents"] == 1


def test_every_document_held_out(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS[:5])
    refused(
        tmp_path,
        r"all of 5 documents were held out.*lower data\.heldout_fraction",
        heldout_fraction=0.9999999,
    )


def test_a_split_shorter_than_one_sequence(tmp_path):
    prepared = samples.prepare_texts(tmp_path, TEXTS)
    sizes = {"held-out": len(prepared.heldout_tokens), "training": len(prepared.train_tokens)}
    assert sizes["held-out"] < sizes["training"]
    for split, size in sizes.items():
        match = rf"the {split} documents have {size} tokens, fewer than one sequence"
        with pytest.raises(DataError, match=match):
            prepare(samples.config(tmp_path, seq_len=size + 1))
    assert prepare(samples.config(tmp_path, seq_len=sizes["held-out"])).fingerprint == prepared.fingerprint


# Files that cannot be read


def test_a_file_that_vanishes_while_the_others_are_read(tmp_path):
    def remove(stage, _):
        if stage == "training the tokenizer":
            (tmp_path / "texts" / "0039.txt").unlink()

    samples.write_texts(tmp_path / "texts", TEXTS)
    with pytest.raises(DataError, match=r"0039\.txt cannot be read: No such file"):
        prepare(samples.config(tmp_path), progress=remove)
    assert samples.files_below(tmp_path / "cache") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    (tmp_path / "texts" / "0003.txt").chmod(0)
    with pytest.raises(DataError, match=r"0003\.txt cannot be read: Permission denied"):
        prepare(samples.config(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(GOOD)[:-9]),
        ("damaged.jsonl.gz", gzip.compress(GOOD)[:200] + bytes(50) + gzip.compress(GOOD)[250:]),
        ("cut.jsonl.zst", zstandard.compress(GOOD)[:-9]),
        ("damaged.jsonl.zst", CHECKED[:100] + b"\xff" * 50 + CHECKED[150:]),
        ("tail.jsonl.zst", zstandard.compress(GOOD) + b"not a frame"),
    ],
)
def test_a_compressed_file_that_is_cut_off_or_damaged(tmp_path, name, content):
    write(tmp_path, name, content)
    refused(tmp_path, rf"{name} cannot be read: ", source="jsonl")


def test_zstd_without_a_module_for_it_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl.zst", zstandard.compress(GOOD))
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(tmp_path, r"a\.jsonl\.zst is compressed with zstd.*pip install 'relora\[zstd\]'", source="jsonl")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_a_file_that_is_not_parquet(tmp_path, content):
    write(tmp_path, "a.parquet", content)
    refused(tmp_path, r"a\.parquet is not a readable Parquet file", source="parquet")


# Lines and columns


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "cut off', "is not one JSON object"),
        (b"plain words", "is not one JSON object"),
        (b"[" * 100_000, "is not one JSON object"),
        (b'{"text": "a"} {"text": "b"}', "is not one JSON object"),
        (b'["a", "b"]', "is not a JSON object but a list"),
        (b"3", "is not a JSON object but a int"),
        (b'{"body": "a", "id": 3}', r"has no field 'text', but body, id: set data\.text_field"),
        (b"{}", "has no field 'text', but none"),
        (b'{"text": 3}', "field 'text' is a int, not text"),
        (b'{"text": ["a"]}', "field 'text' is a list, not text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, match):
    write(tmp_path, "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    refused(tmp_path, rf"a\.jsonl:42.*{match}", source="jsonl")


def test_null_and_empty_texts_are_skipped_and_counted(tmp_path):
    write(tmp_path, "a.jsonl", GOOD + b'{"text": null}\n{"text": ""}\n')
    prepared = prepare(samples.config(tmp_path, source="jsonl"))
    assert prepared.counts["empty_skipped"] == 2
    assert prepared.notes == (f"2 documents empty, skipped (first: {tmp_path}/texts/a.jsonl:41)",)


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ({"body": TEXTS}, r"has no column 'text': set data\.text_field to one of body"),
        ({"text": [1, 2]}, r"column 'text' is of type int64, not text"),
        ({"text": [["a"], ["b"]]}, r"column 'text' is of type list.*, not text"),
    ],
)
def test_a_column_that_is_missing_or_not_text(tmp_path, column, match):
    (tmp_path / "texts").mkdir()
    parquet.write_table(pyarrow.table(column), tmp_path / "texts" / "a.parquet")
    refused(tmp_path, rf"a\.parquet.*{match}", source="parquet")


# Invalid UTF-8: text bytes, bytes inside JSON, surrogates in JSON's own escapes, bytes in a Parquet column

BAD = b"caf\xe9 " * 20
MENDED = "caf\ufffd " * 20


def corpus_with_bad_document(folder, container):
    if container == "text":
        samples.write_texts(folder / "texts", TEXTS)
        write(folder, "bad.txt", BAD)
    elif container == "jsonl":
        write(folder, "a.jsonl", GOOD + b'{"text": "' + BAD + b'"}\n')
    elif container == "surrogate":
        write(folder, "a.jsonl", GOOD + b'{"text": "' + BAD.replace(b"\xe9", b"\\ud800") + b'"}\n')
    else:
        (folder / "texts").mkdir()
        column = pyarrow.array([*(text.encode() for text in TEXTS), BAD], type=pyarrow.binary())
        parquet.write_table(pyarrow.table({"text": column}), folder / "texts" / "a.parquet")
    return {"surrogate": "jsonl"}.get(container, container)


CONTAINERS = {"text": r"bad\.txt", "jsonl": ":41", "surrogate": ":41", "parquet": "row 41"}


@pytest.mark.parametrize(("container", "place"), CONTAINERS.items())
def test_invalid_utf8_is_replaced_and_counted(tmp_path, container, place):
    source = corpus_with_bad_document(tmp_path, container)
    prepared = prepare(samples.config(tmp_path, source=source))
    assert prepared.counts["invalid_utf8_replaced"] == 1
    assert prepared.notes[0].startswith("1 document not UTF-8, bad bytes replaced by U+FFFD (first: ")
    assert place.replace("\\", "") in prepared.notes[0]
    both = [prepared.train_tokens, prepared.heldout_tokens]
    assert sum(samples.decoded_documents(prepared, tokens).count(MENDED) for tokens in both) == 1


@pytest.mark.parametrize(("container", "place"), CONTAINERS.items())
def test_invalid_utf8_can_be_skipped_and_is_counted(tmp_path, container, place):
    source = corpus_with_bad_document(tmp_path, container)
    prepared = prepare(samples.config(tmp_path, source=source, on_invalid_utf8="skip"))
    assert prepared.counts["invalid_utf8_skipped"] == 1
    assert prepared.counts["documents"] == 40
    assert place.replace("\\", "") in prepared.notes[0]


@pytest.mark.parametrize(("container", "place"), CONTAINERS.items())
def test_invalid_utf8_can_be_an_error(tmp_path, container, place):
    source = corpus_with_bad_document(tmp_path, container)
    match = rf"{place} is not UTF-8 .*set data\.on_invalid_utf8"
    refused(tmp_path, match, source=source, on_invalid_utf8="error")


def test_bad_bytes_outside_the_text_field_do_no_harm(tmp_path):
    write(tmp_path, "a.jsonl", GOOD + b'{"url": "\xff", "text": "a fine text"}\n')
    prepared = prepare(samples.config(tmp_path, source="jsonl", on_invalid_utf8="error"))
    assert prepared.counts["documents"] == 41


# Odd but good


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_nul_characters_are_text_and_are_counted(tmp_path, source):
    odd = "before\0after " * 9
    samples.write_texts(tmp_path / "texts", [*TEXTS, odd])
    write(tmp_path, "a.jsonl", GOOD + json.dumps({"text": odd}).encode() + b"\n")
    parquet.write_table(pyarrow.table({"text": [*TEXTS, odd]}), tmp_path / "texts" / "a.parquet")
    path = {"text": "*.txt", "jsonl": "*.jsonl", "parquet": "*.parquet"}[source]
    prepared = prepare(samples.config(tmp_path, source=source, path=str(tmp_path / "texts" / path)))
    assert prepared.counts["nul_kept"] == 1
    both = [prepared.train_tokens, prepared.heldout_tokens]
    assert sum(samples.decoded_documents(prepared, tokens).count(odd) for tokens in both) == 1


@pytest.mark.parametrize(("source", "unit"), [("jsonl", "ab cd "), ("jsonl", "x"), ("text", "\u20ac")])
def test_a_line_of_a_megabyte_is_one_document_like_any_other(tmp_path, source, unit):
    line = unit * (1_000_000 // len(unit.encode()))
    if source == "text":
        samples.write_texts(tmp_path / "texts", [*TEXTS, line])
    else:
        write(tmp_path, "a.jsonl", GOOD + json.dumps({"text": line}, ensure_ascii=False).encode())
    prepared = prepare(samples.config(tmp_path, source=source))
    counts = prepared.counts
    assert counts["documents"] == 41
    assert counts["train_bytes"] + counts["heldout_bytes"] == len("".join([*TEXTS, line]).encode())


# Folders and networks


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_folder_that_cannot_be_written(tmp_path, below):
    samples.write_texts(tmp_path / "texts", TEXTS)
    (tmp_path / "file").write_text("in the way")
    refused(
        tmp_path,
        r"prepared tokens cannot be written to .*file.*: set data\.cache_dir|or set data\.cache_dir",
        cache_dir=str(tmp_path / "file" / below),
    )
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("limit", [999, 12_000], ids=["tokenizer", "tokens"])
def test_a_full_disk_is_told_and_leaves_nothing_half_made(tmp_path, limit):
    """A limit on file size stands in for a full disk: the same writes fail in the same way."""
    samples.write_texts(tmp_path / "texts", TEXTS)
    code = (
        "import resource, signal, sys; from pathlib import Path; import data_samples as samples\n"
        "from relora import DataError; from relora.data.prepare import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: prepare(samples.config(Path(sys.argv[1])))\n"
        "except DataError as error: print(error)\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=here, capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout
    assert "data.cache_dir" in done.stdout
    assert samples.files_below(tmp_path / "cache") == {}


def test_a_hub_id_without_a_network(tmp_path):
    samples.write_texts(tmp_path / "texts", TEXTS)
    code = (
        "import sys; from pathlib import Path; import data_samples as samples\n"
        "from relora import DataError; from relora.data.prepare import prepare\n"
        "for settings in ({'source': 'hub', 'path': 'no/dataset'}, {'tokenizer': 'no/tokenizer'}):\n"
        "    try: prepare(samples.config(Path(sys.argv[1]), **settings))\n"
        "    except DataError as error: print(error)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=offline,
        capture_output=True,
        text=True,
        check=True,
    )
    dataset, tokenizer = done.stdout.splitlines()
    assert re.search(r"'no/dataset'.*cannot be loaded: .*check data\.path.*the network", dataset)
    assert re.search(r"'no/tokenizer' cannot be loaded: .*data\.tokenizer must", tokenizer)
    assert done.stderr == ""
