"""Figures that are part of a page: matplotlib's SVG without its globals, ids, fonts and fixed colours.

Drawn through the object-oriented API under settings of our own, whatever a matplotlibrc says, and
the same bytes for the same data: a fixed hash salt, no date.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from relora.log.units import number, scientific
from relora.report.palette import INK, MUTED, PAPER, RULE, follow_theme, forget_theme, light
from relora.report.run import Record

Floats = NDArray[np.float64]

LEGEND = {"handlelength": 1.6, "columnspacing": 1.4, "borderaxespad": 0.2, "handletextpad": 0.5}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_POINTS_PER_INCH = 72  # one unit of the viewBox is one point
_FONT = re.compile(r"font: (?:[\w-]+ )*?([\d.]+px)[^;]*")
_DECIMALS = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"#(\w+)")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and what stands under it."""

    svg: str
    caption: str


@contextmanager
def drawing_style(*, narrow: bool) -> Iterator[None]:
    """Draw under our settings alone; those in force before come back afterwards.

    Args:
        narrow: Larger text, for figures that a page shows at half its width, or a phone at its whole.
    """
    font_size = 13.0 if narrow else 11.5
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "relora",
                "text.parse_math": False,
                "path.simplify_threshold": 0.25,
                "font.size": font_size,
                "axes.labelsize": font_size,
                "xtick.labelsize": font_size,
                "ytick.labelsize": font_size,
                "legend.fontsize": font_size,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "legend.frameon": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.linewidth": 0.8,
                "axes.edgecolor": light(MUTED),
                "axes.labelcolor": light(INK),
                "xtick.color": light(MUTED),
                "ytick.color": light(MUTED),
                "xtick.labelcolor": light(INK),
                "ytick.labelcolor": light(INK),
                "text.color": light(INK),
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": light(RULE),
                "grid.linewidth": 0.7,
                "lines.linewidth": 1.6,
                "lines.markeredgecolor": light(PAPER),
                "axes.formatter.useoffset": False,
                "axes.formatter.limits": (-4, 7),
                "axes.unicode_minus": True,
            }
        )
        yield


def new_axes(*, width: int, height: int, left: int = 58, right: int = 14, top: int = 14) -> Axes:
    """Return the axes of a figure of so many points, with fixed margins: no layout that measures text."""
    figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH), dpi=_POINTS_PER_INCH)
    FigureCanvasSVG(figure)
    bottom = 46
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def floats(records: Sequence[Record], key: str) -> Floats:
    """Return a value of each record, NaN where it is missing or not finite."""
    values = [number(record.get(key)) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def use_log_scale(axes: Axes) -> None:
    """Give the y axis a logarithmic scale with plain labels; what is not positive is not drawn."""
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    digits = (
        (1.0,) if high > 1e4 * low else (1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2, 3, 4, 5, 6, 8)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(axis_number))


def axis_number(value: float, _: int | None = None) -> str:
    """Label a tick."""
    if value and not 0.01 <= abs(value) < 1e7:
        return scientific(value)
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:.4g}"


def to_svg(axes: Axes, *, name: str, title: str, description: str) -> str:
    """Write the figure of `axes` as an SVG element for a page.

    Args:
        axes: Made by `new_axes`.
        name: Unique in the page; the ids inside are told apart by it.
        title: What the figure shows, read out first.
        description: What one sees in it, for those who do not.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    used = {match for element in root.iter() for match in _references(element)}
    for element in root.iter():
        _adapt(element, name, used)
    _describe(root, name, title, description)
    return _serialized(root)


def standing_alone(svg: str) -> str:
    """Return a page's figure as a file's: in fixed colours, which every reader of SVG knows, and on paper."""
    paper = f'<rect width="100%" height="100%" style="fill: {light(PAPER)}" />'
    return forget_theme(svg).replace("</desc>", f"</desc>{paper}", 1) + "\n"


def _references(element: ElementTree.Element) -> list[str]:
    values = [element.get(key, "") for key in (f"{{{_XLINK}}}href", "clip-path")]
    return [match for value in values for match in _REFERENCE.findall(value)]


def _adapt(element: ElementTree.Element, name: str, used: set[str]) -> None:
    identifier = element.attrib.pop("id", None)
    if identifier in used:
        element.set("id", f"{name}-{identifier}")
    for key in (f"{{{_XLINK}}}href", "clip-path"):
        if key in element.attrib:
            element.set(key, _REFERENCE.sub(rf"#{name}-\1", element.attrib[key]))
    if "style" in element.attrib:  # the page's font, our colours
        element.set("style", follow_theme(_FONT.sub(r"font-size: \1", element.attrib["style"])))
    if "d" in element.attrib:  # a hundredth of a point is finer than any screen
        element.set("d", " ".join(_DECIMALS.sub(_shorter, element.attrib["d"]).split()))


def _shorter(decimal: re.Match[str]) -> str:
    return f"{float(decimal[0]):.2f}".rstrip("0").rstrip(".")


def _describe(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for position, (tag, text) in enumerate([("title", title), ("desc", description)]):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}")
        element.set("id", f"{name}-{'title' if tag == 'title' else 'description'}")
        element.text = text
        root.insert(position, element)


def _serialized(root: ElementTree.Element) -> str:
    # A parser of HTML knows `svg` and `xlink:href` by name: without prefixes, there is nothing to declare.
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        reference = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if reference is not None:
            element.set("href", reference)
    root.set("xmlns", _SVG)
    return ElementTree.tostring(root, encoding="unicode")
