"""Write the docstrings of installed packages as JSON lines: English prose that every installation has.

    python experiments/texts/docstrings.py experiments/texts/docstrings.jsonl [PACKAGE ...]

One document a module: its docstrings in the order of the source, dedented, without code around them. Packages
are those that relora itself needs, unless named. Nothing is imported or downloaded; the files are parsed. The
text depends on the versions installed, which are written beside it (docstrings.versions.json); study.json
holds the fingerprint of the prepared tokens, which tells whether two machines had the same.
"""

import argparse
import ast
import hashlib
import json
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    *("torch", "transformers", "numpy", "matplotlib", "datasets", "pyarrow", "tokenizers", "safetensors"),
    *("huggingface_hub", "pandas", "sympy", "networkx", "fsspec", "rich", "aiohttp", "jinja2", "httpx"),
)
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
    """Write the file, and what it was made from."""
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
    arguments.out.with_suffix(".versions.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
