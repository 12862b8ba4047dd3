"""The model card of an export: README.md with YAML front matter, written from a run's recipe and summary.

What comes from data (names, paths, generated text) is shown as code, fenced by more backticks than it holds,
so that none of it can become markup, a link, HTML, or a key of the front matter. Of a path only its last part
is shown.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECTIONS = ("model", "data", "relora", "optim", "schedule", "train")
_RESULTS = {
    "eval/loss": "held-out loss (nats per token)",
    "eval/perplexity": "held-out perplexity",
    "eval/bits_per_byte": "held-out bits per byte",
    "steps": "steps",
    "tokens": "tokens",
    "restarts": "restarts",
    "parameters_total": "parameters",
    "parameters_trainable": "trainable parameters in the last phase",
    "wall_s": "training time (s)",
    "tokens_per_s": "tokens per second",
    "world_size": "processes",
}
_METHODS = {
    "full": "at full rank",
    "lora": "with one low-rank update (LoRA)",
    "relora": "at high rank through a sequence of low-rank updates (ReLoRA)",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TURNS_TEXT_AROUND = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SAMPLE_LENGTH = 2000

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""

_LIMITS = """\
A language model that continues text. Nothing but its loss on held-out text of its own training data was
measured; it follows no instructions, and it repeats what its data says, true or not."""

_CITATION = """\
```bibtex
@inproceedings{lialin2024relora,
  title     = {{ReLoRA}: High-Rank Training Through Low-Rank Updates},
  author    = {Lialin, Vladislav and Muckatira, Sherin and Shivagunde, Namrata and Rumshisky, Anna},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2307.05695}
}
```"""


def model_card(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return the text of a model card.

    Args:
        recipe: The run's recipe, by section and field; what is missing is left out.
        summary: The run's summary (summary.json); what is missing is left out.

    Returns:
        Markdown with YAML front matter, as the Hugging Face hub reads it.
    """
    run, model = _section(recipe, "run"), _section(recipe, "model")
    method = str(summary.get("method", run.get("method", "")))
    origin = (
        f"continued from {_code(model['init_from'])}" if model.get("init_from") else "trained from scratch"
    )
    how = _METHODS.get(method, f"with the method {_code(method)}" if method else "")
    parts = [
        _front_matter(recipe, method),
        f"# {_code(run['name'])}" if run.get("name") else "# A language model",
        f"A causal language model, {origin} {how}".rstrip() + ", written by the trainer of `relora`.",
        "## Use",
        _USE,
        "## Results",
        _table(("measure", "value"), _results(summary)),
        *_sample(summary),
        "## Recipe",
        _table(("field", "value"), _recipe_rows(recipe)),
        *_versions(summary),
        "## Limits",
        _LIMITS,
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name, {})
    return section if isinstance(section, Mapping) else {}


def _front_matter(recipe: Mapping[str, Any], method: str) -> str:
    from huggingface_hub import ModelCardData

    data = _section(recipe, "data")
    base = _hub_id(_section(recipe, "model").get("init_from"))
    dataset = _hub_id(data.get("path")) if data.get("source") == "hub" else None
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["relora", *([method] if method in _METHODS and method != "relora" else [])],
        base_model=base,
        datasets=[dataset] if dataset else None,
    )
    return f"---\n{metadata.to_yaml(line_break=chr(10)).strip()}\n---"


def _hub_id(value: object) -> str | None:
    """Return a value that is the id of something on the hub, and not the path of a folder here."""
    if isinstance(value, str) and _HUB_ID.fullmatch(value) and not Path(value).exists():
        return value
    return None


def _results(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (words, summary[key]) for key, words in _RESULTS.items() if key in summary
    ]
    switch = summary.get("switch")
    if isinstance(switch, Mapping) and "eval/perplexity" in switch:
        rows.append(("held-out perplexity at the end of the warm start", switch["eval/perplexity"]))
    return rows


def _recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, object]]:
    return [
        (_code(f"{name}.{field}"), value)
        for name in _SECTIONS
        for field, value in _section(recipe, name).items()
        if value is not None
    ]


def _sample(summary: Mapping[str, Any]) -> list[str]:
    sample = summary.get("sample")
    if not isinstance(sample, str) or not sample.strip():
        return []
    text = _printable(sample[:_SAMPLE_LENGTH].replace("\r\n", "\n"), keep="\n\t")
    fence = "`" * max(3, _longest_run(text) + 1)
    return ["## Sample", f"{fence}text\n{text}\n{fence}"]


def _versions(summary: Mapping[str, Any]) -> list[str]:
    versions = summary.get("versions")
    if not isinstance(versions, Mapping) or not versions:
        return []
    return [
        "Trained with " + ", ".join(_code(f"{name} {version}") for name, version in versions.items()) + "."
    ]


def _table(head: Sequence[str], rows: Sequence[tuple[str, object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {words} | {_value(value)} |" for words, value in rows)])


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return ""
    return _code(value)


def _code(value: object) -> str:
    """Return a value as a code span that holds in a table too."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        value = Path(value).name
    text = _printable(" ".join(str(value).split()), keep="")
    fence = "`" * (_longest_run(text) + 1)
    # A space keeps a backtick of the text apart from the fence; Markdown takes it off again.
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _printable(text: str, *, keep: str) -> str:
    """Replace what is no text: control characters, lone surrogates, and marks that turn the text around."""
    return "".join("\ufffd" if _is_hidden(character, keep) else character for character in text)


def _is_hidden(character: str, keep: str) -> bool:
    if character in keep:
        return False
    return character in _TURNS_TEXT_AROUND or unicodedata.category(character) in ("Cc", "Cs")
