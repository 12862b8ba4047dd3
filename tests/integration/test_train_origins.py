"""Runs that go on from other people's models: what their configurations do not say."""

from pathlib import Path

import transformers

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
