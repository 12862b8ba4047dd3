"""Model cards: what they say, and that nothing from data becomes markup."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from relora.checkpoint.card import model_card

RECIPE = {
    "run": {"name": "quickstart", "method": "relora", "out": "/home/me/runs"},
    "model": {"preset": "llama-9m", "init_from": None, "hidden_size": 128},
    "data": {"source": "text", "path": "/home/me/secret/corpus.txt"},
    "relora": {"rank": 32, "targets": "all-linear", "exclude": ("*.q_proj", "a|b")},
    "optim": {"lr": 0.001, "betas": (0.9, 0.95)},
}
SUMMARY = {
    "method": "relora",
    "steps": 3000,
    "tokens": 12_288_000,
    "eval/loss": 3.123456789,
    "eval/perplexity": 22.7251,
    "restarts": 4,
    "switch": {"step": 1000, "eval/perplexity": 40.5},
    "versions": {"torch": "2.13.0", "relora": "0.1.0"},
    "sample": "def f(x):\n\treturn x",
}


def front_matter(card: str) -> dict:
    matched = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert matched is not None
    return yaml.safe_load(matched[1])


def test_a_card_tells_method_results_and_recipe():
    card = model_card(RECIPE, SUMMARY)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["relora"],
    }
    assert "# `quickstart`" in card
    assert "trained from scratch at high rank through a sequence of low-rank updates (ReLoRA)" in card
    assert "| held-out perplexity | 22.7251 |" in card
    assert "| held-out perplexity at the end of the warm start | 40.5 |" in card
    assert "| tokens | 12,288,000 |" in card
    assert "| `relora.rank` | 32 |" in card
    assert "```text\ndef f(x):\n\treturn x\n```" in card
    assert "`torch 2.13.0`" in card
    assert "arxiv.org/abs/2307.05695" in card


def test_the_hub_reads_the_card():
    card = ModelCard(model_card({**RECIPE, "model": {"init_from": "EleutherAI/pythia-70m"}}, SUMMARY))
    assert card.data.base_model == "EleutherAI/pythia-70m"
    assert card.data.pipeline_tag == "text-generation"
    assert "continued from `EleutherAI/pythia-70m`" in card.text


def test_folders_of_this_machine_are_not_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    card = model_card({**RECIPE, "model": {"init_from": "models/mine"}}, SUMMARY)
    assert "/home/me" not in card
    assert "`corpus.txt`" in card
    assert "base_model" not in front_matter(card)
    assert "base_model" not in front_matter(
        model_card({**RECIPE, "model": {"init_from": "/home/me/x"}}, SUMMARY)
    )


def test_a_dataset_of_the_hub_is_named():
    card = model_card({"data": {"source": "hub", "path": "HuggingFaceFW/fineweb-edu"}}, {})
    assert front_matter(card)["datasets"] == ["HuggingFaceFW/fineweb-edu"]


def test_nothing_known_still_makes_a_card():
    assert front_matter(model_card({}, {}))["tags"] == ["relora"]


HOSTILE = [
    "x\n---\nlicense: mit",
    "`</code><script>alert(1)</script>",
    "``` \n# heading",
    "a | b |\n| c",
    "[click](javascript:alert(1))",
    "\x00\x1b[31mred\u202egnp.exe",
    "\ud800",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_from_data_cannot_become_markup(text):
    recipe = {"run": {"name": text}, "model": {"init_from": text}, "data": {"path": text, text: text}}
    card = model_card(recipe, {"method": text, "sample": text, "versions": {text: text}})
    card.encode("utf-8")
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", card)
    outside = without_code(card)
    for mark in ("<script", "javascript:", "license", "heading", "gnp.exe"):
        assert mark not in outside


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_tables_keep_their_columns(text):
    card = model_card({"data": {"path": text, "more": [text, 1]}}, {})
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_a_long_sample_is_cut():
    assert len(model_card({}, {"sample": "ab" * 10_000})) < 6000


def without_code(card: str) -> str:
    """Return what a Markdown reader would not take for code: fenced blocks go first, then code spans."""
    kept, fence = [], ""
    for line in card.splitlines():
        opening = re.match(r"`{3,}", line)
        if fence and line.strip() == fence:
            fence = ""
        elif not fence and opening and "`" not in line[opening.end() :]:
            fence = opening[0]
        elif not fence:
            kept.append(line)
    assert not fence
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(kept))
