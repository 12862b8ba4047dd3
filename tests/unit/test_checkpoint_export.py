"""Exported folders as stock transformers sees them."""

import json
import stat
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from relora.checkpoint.export import export_folder
from relora.errors import CheckpointError

TEXT = "def merge(weight, delta):\n    return weight + delta  # in place, gr\u00fc\u00dfe"


@pytest.fixture(autouse=True)
def no_bars():
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def llama(
    *, tied: bool = False, vocab_size: int = 280, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    return model(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_gives_the_same_logits(tmp_path, tokenizer, tied):
    model = llama(tied=tied)
    out = export_folder(model, tokenizer, tmp_path / "deep" / "out", card="# A card\n")
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    again = AutoTokenizer.from_pretrained(out)
    assert torch.equal(logits(loaded, again), logits(model, tokenizer))
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"]) == TEXT
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (out / "README.md").read_text() == "# A card\n"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_generation_knows_the_special_tokens_of_the_tokenizer(tmp_path, tokenizer):
    out = export_folder(llama(), tokenizer, tmp_path / "out", card="")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs = AutoTokenizer.from_pretrained(out)("def", return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 1


def test_special_tokens_that_the_model_names_itself_are_kept(tmp_path, tokenizer):
    model = llama()
    model.generation_config.eos_token_id = [5, 7]
    out = export_folder(model, tokenizer, tmp_path / "out", card="")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [5, 7]


@pytest.mark.parametrize("said", [False, True])
def test_a_config_that_is_wrong_about_ties_does_not_change_the_weights(tmp_path, tokenizer, said):
    model = llama(tied=said)
    head = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(head) if said else model.model.embed_tokens.weight
    out = export_folder(model, tokenizer, tmp_path / "out", card="")
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))
    assert model.config.tie_word_embeddings == said
    assert loaded.config.tie_word_embeddings != said


def test_the_dtype_is_kept(tmp_path, tokenizer):
    model = llama(dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(export_folder(model, tokenizer, tmp_path / "out", card=""))
    assert loaded.dtype == torch.bfloat16
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_tokenizer_folder_will_do(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = export_folder(llama(), tmp_path / "tokenizer", tmp_path / "out", card="")
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_the_folder_holds_weights_as_safetensors_with_ordinary_permissions_and_no_path_of_this_machine(
    tmp_path, tokenizer
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = export_folder(llama(), tmp_path / "tokenizer", tmp_path / "out", card="")
    (tmp_path / "plain").touch()
    files = list(out.iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {
        stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    }
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_nothing_is_replaced(tmp_path, tokenizer, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="out exists"):
        export_folder(llama(), tokenizer, out, card="")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_with_factors_is_refused(tmp_path, tokenizer):
    model = llama()
    model.model.layers[0].mlp.up_proj.lora_A = torch.nn.Parameter(torch.zeros(3, 16))
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_A\): fold it"):
        export_folder(model, tokenizer, tmp_path / "out", card="")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(CheckpointError, match=r"has 2\d\d tokens, the model's embedding 100 rows"):
        export_folder(llama(vocab_size=100), tokenizer, tmp_path / "out", card="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_broken_tokenizer_folder_is_refused(tmp_path, content):
    folder = tmp_path / "tokenizer"
    if content is not None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        export_folder(llama(), folder, tmp_path / "out", card="")
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot create"):
        export_folder(llama(), tokenizer, tmp_path / "file" / "out", card="")
    with pytest.raises(UnicodeEncodeError):
        export_folder(llama(), tokenizer, tmp_path / "out", card="\ud800")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]
