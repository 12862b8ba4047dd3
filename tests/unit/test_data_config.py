"""DataConfig: defaults that need no download, and violations in words, all at once."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from relora import ConfigError
from relora.data.config import DataConfig
from relora.data.prepare import prepare

OUT_OF_RANGE: list[tuple[str, Any]] = [
    *(("source", value) for value in ("c4", "", None, 3)),
    *(("split", value) for value in ("", None)),
    *(("text_field", value) for value in ("", None, 0)),
    *(("document", value) for value in ("page", None)),
    *(("on_invalid_utf8", value) for value in ("ignore", None)),
    *(("streaming", value) for value in (1, "yes", None)),
    *(("max_documents", value) for value in (0, -3, 2.5, True)),
    *(("max_bytes", value) for value in (0, "10")),
    *(("tokenizer", value) for value in ("", None)),
    *(("vocab_size", value) for value in (256, 0, 4096.0, None)),
    *(("tokenizer_bytes", value) for value in (0, None)),
    *(("eos_token", value) for value in ("", 2)),
    *(("seq_len", value) for value in (1, -1, 256.0, "256")),
    *(("heldout_fraction", value) for value in (0.0, 1.0, -0.1, math.nan, "0.1", True)),
    *(("cache_dir", value) for value in ("", 3)),
]


def test_defaults_are_the_standard_library_and_valid():
    config = DataConfig()
    assert config.source == "python-stdlib"
    assert config.tokenizer == "bpe"
    assert config.violations() == []


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        DataConfig().seq_len = 3  # type: ignore[misc]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_one_violation_that_names_field_and_value(field, value):
    given = {"path": "somewhere"} if field == "source" else {}
    violations = DataConfig(**{field: value}, **given).violations()
    assert len(violations) == 1
    assert violations[0].startswith(f"{field} must ")
    assert violations[0].endswith(repr(value)) or violations[0].endswith(f"{value}")


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub"])
def test_every_source_but_the_standard_library_needs_a_path(source):
    assert DataConfig(source=source, path="somewhere").violations() == []
    assert DataConfig(source=source).violations() == [f"path must be given with source {source!r}"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"path": "texts"}, "path"),
        ({"source": "text", "path": "texts", "name": "en"}, "name"),
        ({"source": "jsonl", "path": "texts", "revision": "main"}, "revision"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(settings, field):
    violations = DataConfig(**settings).violations()
    assert len(violations) == 1
    assert violations[0].startswith(f"{field} must be left out")


def test_the_smallest_byte_vocabulary_binds_only_a_trained_tokenizer():
    assert DataConfig(vocab_size=257).violations() == []
    assert DataConfig(vocab_size=100, tokenizer="some/folder").violations() == []


def test_prepare_lists_all_violations_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare(DataConfig(seq_len=0, heldout_fraction=2.0, cache_dir=str(tmp_path / "cache")))
    assert "seq_len must" in str(caught.value)
    assert "heldout_fraction must" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_settings_and_preparing_load_no_heavy_library_before_they_need_it():
    heavy = "{'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow'}"
    code = f"import sys, relora.data.config, relora.data.prepare; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
