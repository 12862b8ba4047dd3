"""Hub datasets, read by `datasets` from local folders of the shape that C4 and FineWeb-Edu have there."""

import gzip
import json
from datetime import datetime
from pathlib import Path

import data_samples as samples
import pytest

from relora import DataError
from relora.data.prepare import prepare
from relora.data.sources import HubDataset

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [samples.text(seed) for seed in range(40)]

C4_CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
# C4
"""
FINEWEB_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb-Edu
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def c4(folder: Path, texts=TEXTS) -> str:
    root = folder / "allenai" / "c4"
    shards = {
        "en/c4-train.00000-of-00002": texts[: len(texts) // 2],
        "en/c4-train.00001-of-00002": texts[len(texts) // 2 :],
        "en/c4-validation.00000-of-00001": ["validation text"] * 4,
        "realnewslike/c4-train.00000-of-00001": ["news"],
    }
    for name, content in shards.items():
        file = root / f"{name}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        stamp = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
        file.write_bytes(
            gzip.compress("".join(json.dumps({"text": t, **stamp}) + "\n" for t in content).encode())
        )
    (root / "README.md").write_text(C4_CARD)
    return str(root)


def fineweb(folder: Path) -> str:
    root = folder / "HuggingFaceFW" / "fineweb-edu"
    (root / "sample" / "10BT").mkdir(parents=True)
    (root / "data" / "CC-MAIN-2024-10").mkdir(parents=True)
    for number, part in enumerate((TEXTS[:25], TEXTS[25:])):
        columns = {
            "text": part,
            "id": [f"<urn:uuid:{n}>" for n in range(len(part))],
            "dump": ["CC-MAIN-2024-10"] * len(part),
            "date": [datetime(2024, 2, 20)] * len(part),
            "score": [3.5] * len(part),
            "token_count": [len(text.split()) for text in part],
        }
        parquet.write_table(pyarrow.table(columns), root / "sample" / "10BT" / f"{number:03}_00000.parquet")
    parquet.write_table(pyarrow.table({"text": ["other"]}), root / "data" / "CC-MAIN-2024-10" / "0.parquet")
    (root / "README.md").write_text(FINEWEB_CARD)
    return str(root)


def hub(folder, path, **changes):
    return samples.config(folder, source="hub", path=path, **changes)


def all_documents(prepared):
    both = (prepared.train_tokens, prepared.heldout_tokens)
    return sorted(text for tokens in both for text in samples.decoded_documents(prepared, tokens))


@pytest.mark.parametrize("streaming", [True, False])
def test_c4_is_read_by_name_and_text_field(tmp_path, streaming):
    prepared = prepare(hub(tmp_path, c4(tmp_path), name="en", text_field="text", streaming=streaming))
    assert all_documents(prepared) == sorted(TEXTS)


@pytest.mark.parametrize("streaming", [True, False])
def test_fineweb_edu_is_read_by_name(tmp_path, streaming):
    prepared = prepare(hub(tmp_path, fineweb(tmp_path), name="sample-10BT", streaming=streaming))
    assert all_documents(prepared) == sorted(TEXTS)


def test_another_split_is_read_where_named(tmp_path):
    settings = {"name": "en", "split": "validation", "vocab_size": 257, "heldout_fraction": 0.5}
    with pytest.raises(DataError, match="4 documents"):
        prepare(hub(tmp_path, c4(tmp_path), **settings))


def test_streaming_reads_no_further_than_its_limit(tmp_path):
    many = [f"{text} {number}" for number, text in enumerate(TEXTS * 16)]
    path = c4(tmp_path, many)
    (Path(path) / "en" / "c4-train.00001-of-00002.json.gz").write_bytes(b"\x1f\x8b never reached")
    prepared = prepare(hub(tmp_path, path, name="en", max_documents=50))
    assert all_documents(prepared) == sorted(many[:50])


def test_a_second_call_finds_the_tokens_by_content_of_a_local_dataset(tmp_path):
    path = c4(tmp_path)
    first = prepare(hub(tmp_path, path, name="en"))
    stages = []
    again = prepare(hub(tmp_path, path, name="en"), progress=lambda stage, _: stages.append(stage))
    assert (again.folder, stages) == (first.folder, ["looking for prepared tokens"])
    c4(tmp_path, TEXTS[1:])
    assert prepare(hub(tmp_path, path, name="en")).folder != first.folder


def test_a_hub_id_is_known_by_its_names():
    def key(**changes):
        names = {"name": "none/such", "config_name": "en", "split": "train", "revision": None}
        return HubDataset(**({"text_field": "text", "streaming": True} | names | changes)).key()

    others = [{"name": "a/b"}, {"config_name": "de"}, {"split": "validation"}, {"revision": "abc"}]
    assert all(key(**change) != key() for change in others)
    assert key(streaming=False) == key()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "xx"}, r"'xx'.*cannot be loaded: .*Available: .*check data\.path, data\.name"),
        ({"name": "en", "split": "nope"}, "'nope'.*cannot be loaded: .*train.*validation"),
        ({"name": "en", "text_field": "body"}, r"no column 'body': set data\.text_field to one of text"),
        ({"name": "en", "text_field": "timestamp"}, "'timestamp' is of type timestamp.*, not text"),
    ],
)
def test_a_wrong_name_split_or_field_names_what_there_is(tmp_path, settings, match, streaming):
    with pytest.raises(DataError, match=match):
        prepare(hub(tmp_path, c4(tmp_path), streaming=streaming, **settings))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_shard_is_one_error(tmp_path, streaming):
    path = c4(tmp_path)
    shard = Path(path) / "en" / "c4-train.00001-of-00002.json.gz"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"c4'.* cannot be (read on|loaded): "):
        prepare(hub(tmp_path, path, name="en", streaming=streaming))


def test_invalid_utf8_of_a_dataset_meets_the_same_policy(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    values = pyarrow.array([*(text.encode() for text in TEXTS), b"caf\xe9 " * 20], type=pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": values}), root / "train.parquet")
    prepared = prepare(hub(tmp_path, str(root)))
    assert prepared.counts["invalid_utf8_replaced"] == 1
    assert f"{root} row 41" in prepared.notes[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_saved_to_disk_is_read(tmp_path, streaming):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    prepared = prepare(hub(tmp_path, str(tmp_path / "saved"), streaming=streaming))
    assert all_documents(prepared) == sorted(TEXTS)


def test_a_split_of_datasets_saved_to_disk_is_read(tmp_path):
    splits = {"train": ["other"], "extra": TEXTS}
    saved = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    prepared = prepare(hub(tmp_path, str(tmp_path / "saved"), split="extra"))
    assert all_documents(prepared) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"'nope'.*cannot be loaded: .*train, extra"):
        prepare(hub(tmp_path, str(tmp_path / "saved"), split="nope"))
