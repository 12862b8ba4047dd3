"""Runs that go on from other people's models: what their configurations do not say."""

from pathlib import Path

import pytest
import transformers

from relora.errors import ConfigError, DataError
from relora.train.evaluate import evaluate_path
from relora.train.export import export_run
from relora.train.fit import fit
from relora.train.generate import generate_from
from tiny_run import tiny_recipe


def test_model_without_a_limit_of_positions_trains_and_writes(tmp_path: Path) -> None:
    """Bloom's ALiBi sets no limit, so its configuration has none to read."""
    first = fit(tiny_recipe(tmp_path, run={"name": "first", "method": "full"}, train={"steps": 3})).folder
    config = transformers.BloomConfig(vocab_size=300, hidden_size=24, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    settings = {
        "model": {"init_from": str(tmp_path / "bloom")},
        "data": {"tokenizer": str(first / "tokenizer")},
    }
    result = fit(tiny_recipe(tmp_path, **settings))
    assert result.summary["restarts"] == 3 and result.summary["sample"]
    out = export_run(result.folder, tmp_path / "exported")
    assert generate_from(out, prompt="def", max_new_tokens=300).startswith("def")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), run={"method": "full"}, train={"steps": 3})
    return fit(recipe).folder


def gpt2(folder: Path, tokenizer: Path, **sizes: int) -> Path:
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, **{"vocab_size": 300, **sizes})
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_evaluation_on_sequences_longer_than_the_model_takes_is_refused(run: Path, tmp_path: Path) -> None:
    model = gpt2(tmp_path / "gpt2", run / "tokenizer", n_positions=16)
    data = {"source": "text", "path": str(run.parent.parent / "text"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=r"data\.seq_len must be at most the 16 positions"):
        evaluate_path(model, data=data)
    assert evaluate_path(model, data=data | {"seq_len": 16}, sequences=4)["tokens_measured"] == 60


def test_model_with_fewer_embeddings_than_its_tokenizer_has_tokens_is_refused(
    run: Path, tmp_path: Path
) -> None:
    model = gpt2(tmp_path / "gpt2", run / "tokenizer", vocab_size=260)
    data = {"source": "text", "path": str(run.parent.parent / "text"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match="model's vocab_size is 260"):
        evaluate_path(model, data=data)
    with pytest.raises(DataError, match=r"token id .* but the model has 260 embeddings"):
        generate_from(model, prompt="return value", max_new_tokens=3)
