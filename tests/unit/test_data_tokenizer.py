"""The tokenizer: trained deterministically, or given; text is only text; an end-of-document token always."""

import json
import shutil
from pathlib import Path

import data_samples as samples
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relora import DataError
from relora.data.corpus import Document
from relora.data.tokenizer import load_tokenizer, pieces, train_tokenizer, training_texts

TEXTS = [samples.text(seed) for seed in range(20)]
ODD = ["a\0b", "\U0001f600 \u00e9\u0301 \u2028", " \n\t  x  \n\n", "\ufffd\u200b", "don't 1234567 it's"]


def document(text, *, heldout=False):
    return Document(text, len(text.encode()), 0, heldout, "a.txt")


def ids_of(tokenizer, *texts):
    return [ids.tolist() for _, ids in tokenizer.encode(map(document, texts))]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=300, eos_token=None)


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def word_tokenizer(path: Path, words, special=()):
    """A tokenizer.json of whole words, as a user might bring one."""
    backend = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.save(str(path))
    return str(path)


# Trained


def test_the_same_texts_give_the_same_tokenizer(trained):
    again = train_tokenizer(iter(TEXTS), vocab_size=300, eos_token=None)
    assert again.fingerprint == trained.fingerprint
    assert train_tokenizer(TEXTS, vocab_size=299, eos_token=None).fingerprint != trained.fingerprint


def test_every_text_comes_back_from_its_ids(trained):
    for text, ids in zip(ODD + TEXTS, ids_of(trained, *ODD, *TEXTS), strict=True):
        assert trained.fast.decode(ids) == text
        assert max(ids) < trained.vocab_size == 300


def test_the_saved_folder_loads_offline_with_the_same_ids(trained, folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token_id == loaded.bos_token_id == trained.eos_token_id
    assert len(loaded) == trained.vocab_size
    assert [loaded(text)["input_ids"] for text in TEXTS] == ids_of(trained, *TEXTS)


def test_a_name_for_the_end_of_document_token_is_taken(trained):
    named = train_tokenizer(TEXTS, vocab_size=300, eos_token="<stop>")
    assert named.fast.eos_token == "<stop>"
    assert trained.fast.eos_token == "<|endoftext|>"


def test_a_vocabulary_larger_than_the_data_supports_names_the_size_reached():
    with pytest.raises(
        DataError, match=r"supports a vocabulary of (\d+) tokens, not data.vocab_size = 5000"
    ) as e:
        train_tokenizer(["abab cdcd"] * 3, vocab_size=5000, eos_token=None)
    reached = int(str(e.value).split("vocabulary of ")[1].split()[0])
    assert 257 < reached < 300
    assert train_tokenizer(["abab cdcd"] * 3, vocab_size=reached, eos_token=None).vocab_size == reached


def test_an_error_of_the_texts_passes_through_the_training():
    def texts():
        yield "one text"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2 is bad"):
        train_tokenizer(texts(), vocab_size=300, eos_token=None)


def test_training_texts_leave_out_what_is_held_out_and_stop_at_the_limit():
    documents = [document(f"text {n:02}", heldout=n % 3 == 0) for n in range(12)]
    assert list(training_texts(documents, max_bytes=1000)) == [f"text {n:02}" for n in range(12) if n % 3]
    assert list(training_texts(documents, max_bytes=15)) == ["text 01", "text 02", "text 04"]


# Only text


def test_special_tokens_written_in_a_text_are_encoded_as_their_characters(trained):
    text = "an <|endoftext|> inside"
    (ids,) = ids_of(trained, text)
    assert trained.eos_token_id not in ids
    assert trained.fast.decode(ids) == text


def test_cutting_and_padding_of_a_given_tokenizer_are_switched_off(trained, tmp_path):
    backend = Tokenizer.from_str(trained.fast.backend_tokenizer.to_str())
    backend.enable_truncation(max_length=5)
    backend.enable_padding(length=500)
    backend.save(str(tmp_path / "tokenizer.json"))
    given = load_tokenizer(str(tmp_path / "tokenizer.json"), eos_token=None)
    assert ids_of(given, *TEXTS) == ids_of(trained, *TEXTS)


# Long documents


@pytest.mark.parametrize("limit", [2, 5, 17, 64])
def test_pieces_lose_nothing_and_give_the_ids_of_the_whole_where_there_are_gaps(trained, limit):
    backend = trained.fast.backend_tokenizer
    for text in TEXTS:
        cut = list(pieces(text, limit=limit))
        assert "".join(cut) == text
        assert max(map(len, cut)) <= limit
        if limit >= 17:
            ids = [id for piece in cut for id in backend.encode(piece).ids]
            assert ids == backend.encode(text).ids


def test_a_document_of_many_pieces_is_one_array_in_its_place(trained):
    long = " ".join(TEXTS) * 40
    assert len(long) > 1 << 18
    encoded = ids_of(trained, "before", long, "after")
    assert len(encoded) == 3
    assert encoded[1] == trained.fast.backend_tokenizer.encode(long).ids


# Given


def test_a_folder_a_tokenizer_json_and_the_original_agree(trained, folder):
    for given in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(str(given), eos_token=None)
        assert loaded.fingerprint == trained.fingerprint
        assert ids_of(loaded, *TEXTS, *ODD) == ids_of(trained, *TEXTS, *ODD)


def test_a_bare_tokenizer_json_shows_its_end_token_by_a_usual_name(tmp_path):
    given = word_tokenizer(tmp_path / "t.json", {"<unk>": 0, "a": 1, "b": 2}, special=["<unk>", "</s>"])
    tokenizer = load_tokenizer(given, eos_token=None)
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (3, 4)


@pytest.mark.parametrize("special", [["<unk>"], ["<unk>", "</s>", "<eos>"]])
def test_no_or_no_one_end_token_is_refused_and_can_be_named(tmp_path, special):
    given = word_tokenizer(tmp_path / "t.json", {"<unk>": 0, "a": 1, "stop": 2}, special=special)
    with pytest.raises(DataError, match=r"no end-of-document token: set data\.eos_token .*<unk>"):
        load_tokenizer(given, eos_token=None)
    assert load_tokenizer(given, eos_token="stop").eos_token_id == 2


def test_an_end_token_that_is_no_token_is_refused(folder):
    with pytest.raises(DataError, match=r"data\.eos_token '<nope>' is not a token"):
        load_tokenizer(str(folder), eos_token="<nope>")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "BPE"}}', "\0\0"])
def test_a_broken_tokenizer_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json' cannot be loaded: .*data\.tokenizer must"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), eos_token=None)


@pytest.mark.parametrize("given", ["./none", "/none/at/all", "none.json", "a/b/c"])
def test_a_tokenizer_path_that_does_not_exist_is_never_asked_of_the_hub(given):
    with pytest.raises(DataError, match=r"does not exist: check data\.tokenizer"):
        load_tokenizer(given, eos_token=None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path), eos_token=None)


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(DataError, match="no fast"):
        load_tokenizer(str(tmp_path), eos_token=None)


def test_a_tokenizer_that_brings_code_is_refused_and_its_code_not_run(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "code")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "code" / "tokenizer_config.json").write_text(json.dumps(settings))
    marker = tmp_path / "ran"
    (tmp_path / "code" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path / "code"), eos_token=None)
    assert not marker.exists()


def test_ids_with_gaps_are_refused_where_one_reaches_the_vocabulary_size(tmp_path):
    given = word_tokenizer(tmp_path / "t.json", {"</s>": 0, "a": 1, "b": 9}, special=["</s>"])
    tokenizer = load_tokenizer(given, eos_token=None)
    assert ids_of(tokenizer, "a a") == [[1, 1]]
    with pytest.raises(DataError, match=r"a\.txt gives token id 9, but the tokenizer has only 3 tokens"):
        ids_of(tokenizer, "a b")


def test_a_tokenizer_object_of_transformers_is_what_is_kept(trained):
    assert isinstance(trained.fast, PreTrainedTokenizerFast)
