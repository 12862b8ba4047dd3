"""Which text each [data] section of a study stands for: noted before its cells train, checked at each start.

    STUDY/data.json   {"texts": [{"section": {...}, "fingerprint": ..., "counts": ..., ...}, ...]}

A section names a text (the running Python's library, a folder), and what it names may change. Its fingerprint
tells, and a study whose cells of one section would be of different texts is refused. A section that was not
there before is new, and takes nothing from what has been trained.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError, ConfigError
from relora.lab.study import Cell, recipe_fields
from relora.report.study_page import write_file
from relora.train.prepare import prepare_recipe

TEXTS = "data.json"
_FRACTION = "tuning_fraction"

Section = dict[str, Any]
Facts = dict[str, Any]


class StudyTexts:
    """The texts of a study's cells.

    Args:
        folder: Of the study.
        earlier: What study.json held: its cells were trained on the texts in it.
    """

    def __init__(self, folder: Path, earlier: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._earlier = earlier or {}
        self._checked: list[Section] = []

    def check(self, cells: Iterable[Cell]) -> None:
        """Prepare the texts of cells, and write down those that are new.

        Raises:
            ConfigError: if cells of the study were trained on another text; nothing in its folder is changed.
            DataError: if a text cannot be prepared.
            CheckpointError: if data.json cannot be read or written.
        """
        sections = {repr(cell.recipe.data): cell for cell in cells}.values()
        unchecked = [cell for cell in sections if data_section(cell) not in self._checked]
        if not unchecked:
            return
        noted = self._noted()
        known = [(facts["section"], {facts["fingerprint"]}) for facts in noted] + self._of_results()
        for cell in unchecked:
            self._refuse_other_fraction(data_section(cell), [section for section, _ in known])
        found = [data_facts(cell) for cell in unchecked]
        for facts in found:
            self._refuse_other_text(facts, known)
        new = [facts for facts in found if facts["section"] not in [facts["section"] for facts in noted]]
        if new:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / TEXTS, json.dumps({"texts": noted + new}, indent=1) + "\n")
        self._checked += [facts["section"] for facts in found]

    def facts(self, cells: Iterable[Cell]) -> list[Facts]:
        """Return what is written down of the texts of cells."""
        wanted = [data_section(cell) for cell in cells]
        return [facts for facts in self._noted() if facts["section"] in wanted]

    def _noted(self) -> list[Facts]:
        path = self._folder / TEXTS
        if not path.is_file():
            return []
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))["texts"]
            return [
                facts | {"section": dict(facts["section"]), "fingerprint": str(facts["fingerprint"])}
                for facts in texts
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the texts of a study ({error!r}): give --out another folder, or "
                "remove that one"
            ) from error

    def _of_results(self) -> list[tuple[Section, set[str]]]:
        """Return the sections of the cells in study.json, with the fingerprints of all its texts."""
        fingerprints = {facts["fingerprint"] for facts in self._earlier.get("data", [])}
        recipes = [row["recipe"] for row in self._earlier.get("cells", []) if "recipe" in row]
        return [(_section_of(recipe), fingerprints) for recipe in recipes]

    def _refuse_other_text(self, facts: Facts, known: Iterable[tuple[Section, set[str]]]) -> None:
        for section, fingerprints in known:
            if section == facts["section"] and facts["fingerprint"] not in fingerprints:
                raise ConfigError(
                    f"{self._folder} holds cells of a study that were trained on another text than "
                    f"{facts['source']!r} is here (another version, or other files): give --out another "
                    "folder, or remove it to run them again"
                )

    def _refuse_other_fraction(self, section: Section, known: Iterable[Section]) -> None:
        for other in known:
            before, now = other.get(_FRACTION, 0.0), section[_FRACTION]
            if before != now and other | {_FRACTION: now} == section:
                grids = "" if before else ", and move grids to a study of their own, since they need more"
                raise ConfigError(
                    f"{self._folder} holds cells of a study whose tuning.fraction was {before:g}, and now it "
                    f"is {now:g} (by default 0.05 where a method has a grid, else 0): the tuning split is "
                    "taken from the text that is trained on, so every cell would be another. To go on, set "
                    f"fraction = {before:g} in [tuning]{grids}; to run all of them again, give --out another "
                    "folder, or remove it"
                )


def data_section(cell: Cell) -> Section:
    """Return a cell's [data] section as JSON values, without what is not set."""
    return _section_of(recipe_fields(cell.recipe))


def data_facts(cell: Cell) -> Facts:
    """Prepare a cell's text, and return what identifies it and how much of it there is."""
    facts = prepare_recipe(cell.recipe)
    kept = ("fingerprint", "vocab_size", "bytes_per_token", "counts")
    source = {"source": cell.recipe.data.source, "path": cell.recipe.data.path}
    return {"section": data_section(cell)} | source | {key: facts[key] for key in kept}


def _section_of(recipe: Mapping[str, Any]) -> Section:
    """Return the [data] section of a recipe's fields, without those that are not set, as a file has it."""
    found = {key.partition(".")[2]: value for key, value in recipe.items() if key.startswith("data.")}
    return {key: value for key, value in found.items() if value is not None}
