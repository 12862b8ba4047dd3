"""report.html of a study, and the files beside it: one page that loads nothing, and each figure alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relora.log.files import replacing
from relora.report.markup import figure, notes, numbers_table, section, text
from relora.report.page import whole_page
from relora.report.svg import Picture, standing_alone


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under heads; the first cell of a row is its name."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of the page."""

    title: str
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, Picture]] = ()
    """Each with the name of its file."""


@dataclass(frozen=True, kw_only=True)
class StudyPage:
    """What the page says."""

    title: str
    question: str
    how: str
    """How the numbers were made."""
    cautions: Sequence[str]
    parts: Sequence[Part]
    source: str
    """The study's file."""


def write_study_page(folder: Path, page: StudyPage) -> Path:
    """Write report.html into a study's folder, and its figures into plots/.

    Returns:
        The page.

    Raises:
        CheckpointError: if the disk refuses.
    """
    listing = f'<pre tabindex="0" aria-label="study.toml">{text(page.source)}</pre>'
    body = [
        f'<header>\n<h1>{text(page.title)}</h1>\n<p class="subtitle">{text(page.question)}</p>\n</header>',
        notes(page.cautions),
        f"<p>{text(page.how)}</p>",
        *(_section(part) for part in page.parts),
        section("Study", f"<details>\n<summary>study.toml</summary>\n{listing}\n</details>"),
    ]
    content = whole_page(
        f"{page.title}: a comparison", "\n".join(filter(None, body)), "Written by relora from study.json."
    )
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for part in page.parts:
        for name, picture in part.pictures:
            write_file(plots / f"{name}.svg", standing_alone(picture.svg))
    write_file(folder / "report.html", content)
    return folder / "report.html"


def write_file(path: Path, content: str) -> None:
    """Write a text file, which appears whole or not at all.

    Raises:
        CheckpointError: if the disk refuses.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8", errors="replace"))


def _section(part: Part) -> str:
    tables = [numbers_table(table.caption, table.columns, table.rows) for table in part.tables]
    return section(part.title, *tables, *(figure(picture) for _, picture in part.pictures))
