"""The figures of a study: curves of several arms, and their ends against what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from relora.report.palette import KIND_COLOURS, MUTED, light
from relora.report.svg import LEGEND, Picture, axis_number, drawing_style, new_axes, to_svg

Points = Sequence[tuple[float, float]]
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKS = "osD^vPX*"
_ROW_HEIGHT = 19
_SHOWN_FRACTION = 0.9


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The runs of one arm."""

    label: str
    runs: Sequence[Points]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where the runs of one arm ended: (cost, loss) of each."""

    label: str
    points: Points


def style(index: int) -> tuple[str, object, str]:
    """Return colour, dashes and marker of the arm at a place in the study: the same in every figure."""
    colour = light(KIND_COLOURS[index % len(KIND_COLOURS)])
    return colour, _DASHES[index // len(KIND_COLOURS) % len(_DASHES)], _MARKS[index % len(_MARKS)]


def curves_picture(arms: Sequence[Curves], *, name: str, xlabel: str, title: str) -> Picture | None:
    """Draw the loss of every run against something that grows; None where there is nothing to draw.

    The first fall is cut: the frame shows what lies below the loss that nine tenths of the points reach.
    """
    values = sorted(y for arm in arms for run in arm.runs for _, y in run)
    if not values:
        return None
    with drawing_style(narrow=False):
        axes = _axes(len(arms))
        for index, arm in enumerate(arms):
            colour, dashes, _ = style(index)
            for run in arm.runs:
                xs, ys = zip(*run, strict=True) if run else ((), ())
                axes.plot(xs, ys, color=colour, ls=dashes, lw=1.3, marker="o", markersize=2.5, alpha=0.85)
        low, high = values[0], values[min(len(values) - 1, round(_SHOWN_FRACTION * len(values)))]
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(left=0)
        _finish(axes, xlabel)
        _legend(axes, [arm.label if any(arm.runs) else None for arm in arms], lines=True)
        ends = [
            f"{arm.label} ends at {_mean([run[-1][1] for run in arm.runs if run]):.4f}"
            for arm in arms
            if any(arm.runs)
        ]
        svg = to_svg(axes, name=name, title=title, description="; ".join(ends) + ".")
    return Picture(svg=svg, caption=f"{title}, a line for each seed.")


def gaps_picture(arms: Sequence[Curves], *, name: str, xlabel: str, reference: str) -> Picture | None:
    """Draw how far each arm lies from a reference: the mean over seeds, and their range.

    Args:
        arms: With runs of (place, loss over the reference's of the same seed); none of the reference itself.
        name: Unique in the page.
        xlabel: What the places are.
        reference: Its name.

    Returns:
        The figure, whose frame is that of the last three quarters; None where there is nothing to draw.
    """
    found = [_by_place(arm.runs) for arm in arms]
    last = max((place for gaps in found for place in gaps), default=None)
    if last is None:
        return None
    with drawing_style(narrow=False):
        axes = _axes(len(arms))
        axes.axhline(0, color=light(MUTED), lw=1.2)
        for index, gaps in enumerate(found):
            colour, dashes, _ = style(index)
            places = sorted(gaps)
            axes.plot(
                places, [_mean(gaps[x]) for x in places], color=colour, ls=dashes, marker="o", markersize=2.5
            )
            bounds = ([min(gaps[x]) for x in places], [max(gaps[x]) for x in places])
            axes.fill_between(places, *bounds, color=colour, alpha=0.13, lw=0)
        late = [gap for gaps in found for x, values in gaps.items() if x >= last / 4 for gap in values]
        margin = 0.05 * (max(*late, 0.0) - min(*late, 0.0)) or 0.05
        axes.set_ylim(min(*late, 0.0) - margin, max(*late, 0.0) + margin)
        axes.set_xlim(left=0)
        _finish(axes, xlabel, ylabel=f"loss over {_short(reference)} (nats per token)")
        _legend(
            axes, [arm.label if gaps else None for arm, gaps in zip(arms, found, strict=True)], lines=True
        )
        words = [
            f"{arm.label} ends {_mean(gaps[max(gaps)]):+.4f}"
            for arm, gaps in zip(arms, found, strict=True)
            if gaps
        ]
        title = f"Held-out loss over that of {reference} against tokens"
        svg = to_svg(axes, name=name, title=title, description="; ".join(words) + ".")
    return Picture(svg=svg, caption=f"{title}, paired by seed: mean and range of the seeds.")


def _by_place(runs: Sequence[Points]) -> dict[float, list[float]]:
    """Return the values of all runs at the places that all of them have."""
    by_place = [dict(run) for run in runs]
    common = set.intersection(*map(set, by_place)) if by_place else set()
    return {place: [values[place] for values in by_place] for place in common}


def ends_picture(
    arms: Sequence[Ends], *, name: str, xlabel: str, title: str, joined: bool = False
) -> Picture | None:
    """Draw where runs ended against what they cost; a sweep is `joined` by lines, on a logarithmic axis."""
    if not any(arm.points for arm in arms):
        return None
    with drawing_style(narrow=False):
        axes = _axes(len(arms))
        for index, arm in enumerate(arms):
            colour, dashes, mark = style(index)
            points = sorted(arm.points)
            if points:
                xs, ys = zip(*points, strict=True)
                line = dashes if joined else "none"
                axes.plot(xs, ys, color=colour, ls=line, marker=mark, markersize=7, lw=1.3)
        if joined:
            axes.set_xscale("log")
            ticks = sorted({x for arm in arms for x, _ in arm.points})
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(FixedLocator([]))
        _finish(axes, xlabel)
        _legend(axes, [arm.label if arm.points else None for arm in arms], lines=joined)
        words = [f"{arm.label}: {_mean([y for _, y in arm.points]):.4f}" for arm in arms if arm.points]
        svg = to_svg(axes, name=name, title=title, description="Mean loss of " + "; ".join(words) + ".")
    return Picture(svg=svg, caption=title + ".")


def _axes(num_arms: int) -> Axes:
    legend = _ROW_HEIGHT * ((num_arms + 2) // 3)
    return new_axes(width=940, height=380 + legend, left=64, top=16 + legend)


def _finish(axes: Axes, xlabel: str, *, ylabel: str = "loss (nats per token)") -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(axis_number))
    axes.yaxis.set_major_formatter(FuncFormatter(axis_number))


def _legend(axes: Axes, labels: Sequence[str | None], *, lines: bool) -> None:
    handles = []
    for index, label in enumerate(labels):
        if label is None:  # nothing was drawn of it
            continue
        colour, dashes, mark = style(index)
        look = {"ls": dashes, "marker": ""} if lines else {"ls": "none", "marker": mark}
        handles.append(Line2D([], [], color=colour, label=_short(label), **look))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, **LEGEND)


def _short(label: str) -> str:
    plain = label.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= 40 else f"{plain[:37]}..."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
