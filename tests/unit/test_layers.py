"""The arrows of DESIGN.md section 3: which package may import which, imports inside functions included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import relora

SOURCE = Path(relora.__file__).parent

# package -> the packages of ours it may import; `relora.errors` and itself always.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "method": set(),
    "data": set(),
    "log": set(),
    "checkpoint": {"method"},
    "integrations": {"method"},
    "report": {"log", "method"},
    "train": {"data", "checkpoint", "log", "method"},
    "lab": {"train", "report"},
    "cli": {"lab", "train", "report", "integrations"},
    "__main__": {"cli"},
    "__init__": {"method"},
}
FOREIGN_TO_METHOD = {"torch", "relora"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[tuple[int, str]]:
    return imports_of(file.read_text(encoding="utf-8"), file)


def imports_of(source: str, file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything a module imports, at any depth and under any condition."""
    here = ["relora", *file.relative_to(SOURCE).with_suffix("").parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in {
            "import_module",
            "__import__",
        }:
            arguments = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in arguments)


def our_package(name: str) -> str | None:
    """Return the package of ours that a dotted name lies in; a public name stands for its home."""
    parts = name.split(".")
    if parts[0] != "relora" or len(parts) == 1:
        return None
    if parts[1] in relora._HOMES:
        parts = relora._HOMES[parts[1]].split(".")
    return None if parts[1].startswith("__") else parts[1]


@pytest.mark.parametrize("package", sorted({package_of(file) for file in modules()}))
def test_a_package_imports_only_what_its_arrows_allow(package: str) -> None:
    assert package in ARROWS, f"relora.{package} has no place in DESIGN.md section 3"
    allowed = {"errors", package} | ARROWS[package]
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {name}"
        for file in modules()
        if package_of(file) == package
        for line, name in imported(file)
        if (ours := our_package(name)) is not None and ours not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_method_needs_torch_and_the_standard_library_alone() -> None:
    allowed = FOREIGN_TO_METHOD | set(sys.stdlib_module_names)
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {name}"
        for file in modules()
        if package_of(file) in {"method", "errors", "__init__"}
        for line, name in imported(file)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_parser_sees_imports_inside_functions_and_relative_ones() -> None:
    source = (
        "def f():\n"
        "    from ..train import loop\n"
        "    import transformers.models\n"
        "    importlib.import_module('relora.cli')\n"
    )
    names = [name for _, name in sorted(imports_of(source, SOURCE / "method" / "imaginary.py"))]
    assert names == ["relora.train.loop", "transformers.models", "relora.cli"]
    assert our_package("relora.train.loop") == "train"
    assert our_package("relora.inject") == "method" and our_package("relora.__version__") is None


def test_importing_relora_and_its_config_does_not_import_torch() -> None:
    program = (
        "import sys, relora, relora.errors, relora.method.config\n"
        "from relora import ReLoRAConfig, ConfigError\n"
        "ReLoRAConfig.paper(); assert set(dir(relora)) >= {'inject', 'fold', 'ReLoRA'}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_public_name_resolves_and_an_unknown_one_does_not() -> None:
    for name in relora.__all__:
        assert getattr(relora, name) is not None
    assert set(relora._HOMES) | {"__version__"} == set(relora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'injekt'"):
        relora.injekt  # noqa: B018
