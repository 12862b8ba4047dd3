"""study.toml -> its tables, laid over those of the study it is like.

[study] like = "../main-python" takes everything from that study but its name: keys of [study], [tuning] and
[set] stand one by one unless they are given anew, a method of [methods] as a whole. A length given anew, in
steps or tokens, replaces the other kind too.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.errors import ConfigError

Table = Mapping[str, Any]

STUDY_FILE = "study.toml"
_LENGTHS = ("steps", "tokens")
_BY_KEY = ("study", "tuning", "set")


def study_file(given: Path) -> Path:
    """Return the file of a study: given, or study.toml in a folder.

    Raises:
        ConfigError: if there is none.
    """
    path = given / STUDY_FILE if given.is_dir() else given
    if not path.is_file():
        raise ConfigError(f"{given} is no study: give a {STUDY_FILE}, or a folder that holds one")
    return path


@dataclass(frozen=True, kw_only=True)
class StudyTables:
    """What a study file says, with what it takes from others."""

    tables: dict[str, Any]
    source: str
    """The text of all files, its own first."""
    files: tuple[Path, ...]
    """Itself, and those it is like."""


def read_tables(path: Path) -> StudyTables:
    """Read a study file and the studies it is like.

    Raises:
        ConfigError: if one cannot be read, or a study is like itself.
    """
    found = _read(path, ())
    if path.name != STUDY_FILE and isinstance(head := found.tables.get("study"), dict):
        head.setdefault("name", path.stem)
    return found


def _read(path: Path, readers: tuple[Path, ...]) -> StudyTables:
    try:
        source = path.read_bytes().decode("utf-8")
        tables = tomllib.loads(source)
    except OSError as error:
        raise ConfigError(f"study {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"study {path} is not valid TOML: {error}") from error
    alone = StudyTables(tables=tables, source=source, files=(path,))
    head = tables.get("study")
    if not isinstance(head, dict):
        return alone  # for the reader of studies to refuse
    if isinstance(base := head.get("base"), str) and (path.parent / base).is_file():
        head["base"] = str((path.parent / base).resolve())
    like = head.pop("like", None)
    if like is None:
        return alone
    if not isinstance(like, str):
        raise ConfigError(f"study {path}: study.like must be the file or folder of a study, not {like!r}")
    chain = (*readers, path.resolve())
    try:
        other = study_file(path.parent / like)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"study {path}: study.like: {error}") from error
    if other.resolve() in chain:
        raise ConfigError(f"study {path}: study.like leads back to {other}: a study cannot be like itself")
    older = _read(other, chain)
    if not isinstance(older.tables.get("study"), dict):
        raise ConfigError(f"study {path}: study.like: {other} has no table [study]")
    older.tables["study"].pop("name", None)
    return StudyTables(
        tables=_laid_over(older.tables, tables),
        source=f"{source.rstrip()}\n\n# like = {like!r}:\n\n{older.source}",
        files=(path, *older.files),
    )


def _laid_over(older: Table, newer: Table) -> dict[str, Any]:
    """Return both, the newer where both say something."""
    merged = {**older, **newer}
    for name in (*_BY_KEY, "methods"):
        old, new = older.get(name), newer.get(name)
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            continue
        if name in ("study", "tuning") and any(length in new for length in _LENGTHS):
            old = {key: value for key, value in old.items() if key not in _LENGTHS}
        merged[name] = _by_key(old, new) if name in _BY_KEY else {**old, **new}
    return merged


def _by_key(old: Table, new: Table) -> dict[str, Any]:
    """Return both key by key, at any depth."""
    deeper = {
        key: _by_key(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **deeper}
