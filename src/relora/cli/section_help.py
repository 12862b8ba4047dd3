"""Sections of a recipe as tyro shows them in a verb's help.

Every setting is a text to tyro, since `split_settings` reads the settings by the rules of recipe files. Its
placeholder comes from the annotation, its help from the docstring under the field, its default from the
recipe. tyro would find all that itself, in half a second: it reads each class's source anew and imports a
type checker for unions.
"""

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from relora.train.checks import field_types, options

Kind = TypeVar("Kind")

_PLACEHOLDERS: dict[Any, str] = {
    bool: "{true,false}",
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    Path: "PATH",
    NoneType: "none",
}


def with_sections(kind: type[Kind], sections: Mapping[str, object]) -> type[Kind]:
    """Return a verb's arguments with sections of a recipe beside them, as options named --section.field.

    Args:
        kind: Dataclass of the verb's own arguments.
        sections: Dataclass instances by section name; their values are shown as defaults.
    """
    hints = get_type_hints(kind, include_extras=True)
    members = [(own.name, _checked_at_once(hints[own.name]), own) for own in fields(cast("Any", kind))]
    members += [(name, *_as_texts(section)) for name, section in sections.items()]
    return make_dataclass(
        kind.__name__, members, bases=(kind,), namespace={"__doc__": kind.__doc__}, frozen=True, kw_only=True
    )


def field_docs(section: type[Any]) -> dict[str, str]:
    """Return the docstrings that stand under a dataclass's fields, inherited ones too, by field name."""
    found = {}
    for kind in reversed(section.__mro__):
        if is_dataclass(kind):
            body = _class_bodies(kind.__module__)[kind.__name__]
            found.update(_docs_under_fields(body))
    return found


def _checked_at_once(hint: Any) -> Any:
    """Return `X | None` in its older spelling, for whose defaults tyro needs no type checker."""
    return Union[get_args(hint)] if isinstance(hint, UnionType) else hint  # noqa: UP007


def _as_texts(section: Any) -> tuple[type[Any], Any]:
    """Return a dataclass with a text for each field of a section, and the field that holds it."""
    docs = field_docs(type(section))
    texts = []
    for name, annotation in field_types(type(section)).items():
        shown = _shown(annotation, docs.get(name, ""), getattr(section, name))
        texts.append((name, Annotated[str, shown], field(default="")))
    namespace = {"__doc__": type(section).__doc__}
    kind = make_dataclass(type(section).__name__, texts, namespace=namespace, frozen=True, kw_only=True)
    return kind, field(default_factory=kind)


def _shown(annotation: Any, doc: str, value: object) -> Any:
    default = f"(default: {_words(value)})"
    return tyro.conf.arg(metavar=_placeholder(annotation), help=doc, help_behavior_hint=default)


def _placeholder(annotation: Any) -> str:
    return "|".join(_placeholder_of_option(option) for option in options(annotation))


def _placeholder_of_option(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"{{{','.join(map(str, get_args(option)))}}}"
    if get_origin(option) is tuple:
        members = get_args(option)
        if members[-1] is Ellipsis:
            return f"[{_placeholder(members[0])} ...]"
        return " ".join(map(_placeholder, members))
    return _PLACEHOLDERS[option]


def _words(value: object) -> str:
    """Spell a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_words, value)) or "an empty list"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_under_fields(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for statement, after in pairwise(body):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
