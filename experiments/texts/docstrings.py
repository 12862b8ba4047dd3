"""Write the docstrings of installed packages as JSON lines: English prose that every installation has.

    python experiments/texts/docstrings.py experiments/texts/docstrings.jsonl [PACKAGE ...]

One document a module: its docstrings in the order of the source, dedented, without code around them. Packages
are those that relora itself needs, unless named. Nothing is imported or downloaded; the files are parsed. The
text depends on the versions installed. docstrings.versions.json, beside this script, has those of the
committed studies; what differs from them is said, since their cells cannot be trained again on another text.
"""

import argparse
import ast
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "numpy", "matplotlib", "datasets", "pyarrow", "tokenizers", "safetensors"),
    *("huggingface_hub", "pandas", "sympy", "networkx", "fsspec", "rich", "aiohttp", "jinja2", "httpx"),
)
RECORD = Path(__file__).with_suffix(".versions.json")
_LEAST_CHARACTERS = 200
_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its own first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, _NODES) and (text := ast.get_docstring(node)):
            yield text


def documents(packages: tuple[str, ...]) -> Iterator[str]:
    """Yield a text for each module that says enough, none of them twice."""
    seen: set[str] = set()
    for package in packages:
        spec = find_spec(package)
        for root in sorted(map(Path, (spec.submodule_search_locations or []) if spec else [])):
            for path in sorted(root.rglob("*.py")):
                parts = dict.fromkeys(docstrings(path.read_text(encoding="utf-8", errors="ignore")))
                fresh = [part for part in parts if part not in seen]
                seen.update(part for part in fresh if len(part) > 80)
                text = "\n\n".join(fresh)
                if len(text) >= _LEAST_CHARACTERS:
                    yield text + "\n"


def main() -> None:
    """Write the file, and say what it was made from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    arguments = parser.parse_args()
    digest, count, size = hashlib.sha256(), 0, 0
    with arguments.out.open("w", encoding="utf-8") as file:
        for text in documents(tuple(arguments.packages)):
            line = json.dumps({"text": text})
            file.write(line + "\n")
            digest.update(line.encode())
            count, size = count + 1, size + len(text.encode())
    versions = {name: metadata.version(name) for name in arguments.packages if find_spec(name)}
    facts = {"documents": count, "bytes": size, "sha256": digest.hexdigest(), "versions": versions}
    print(json.dumps(facts, indent=1))
    print(beside_the_record(facts))


def beside_the_record(facts: Mapping[str, Any]) -> str:
    """Say whether a text is that of the committed studies, and if not, which packages would make it so."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if facts["sha256"] == record["sha256"]:
        return "the text of the committed studies"
    others = {
        name: version
        for name, version in record["versions"].items()
        if facts["versions"].get(name, "").partition("+")[0] != version.partition("+")[0]
    }
    wanted = [f"{name}=={version.partition('+')[0]}" for name, version in others.items()]
    wanted += [f"no {name}" for name in facts["versions"] if name not in record["versions"]]
    return (
        f"another text than that of the committed studies, which need: {', '.join(wanted) or 'other files'}"
    )


if __name__ == "__main__":
    main()
