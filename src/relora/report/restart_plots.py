"""The figures of a run's restarts: how exact each merge was, how large, and what state it cleared."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from relora.log.restarts import cleared_entries
from relora.log.units import percent, scientific
from relora.report.kinds import delta_norms
from relora.report.palette import KIND_COLOURS, TRAIN, light
from relora.report.run import Record
from relora.report.svg import (
    LEGEND,
    Floats,
    Picture,
    axis_number,
    drawing_style,
    floats,
    new_axes,
    to_svg,
    use_log_scale,
)

_MARKERS = "osD^vPX*"


def merge_error_picture(restarts: Sequence[Record]) -> Picture:
    """Draw the relative merge error of each restart, on a logarithmic scale."""
    index, error = _restart_column(restarts, "relative_merge_error")
    with drawing_style(narrow=True):
        axes = new_axes(width=460, height=290, left=74)
        axes.plot(index, error, color=light(TRAIN), marker="o", markersize=7)
        if (error > 0).any():
            use_log_scale(axes)
        axes.set_ylabel("relative merge error")
        _finish_restarts(axes, index)
        worst = scientific(float(np.nanmax(error))) if np.isfinite(error).any() else "not recorded"
        svg = to_svg(
            axes,
            name="merge-error",
            title="Relative merge error at each restart",
            description=f"{len(index)} restarts; the largest error is {worst}.",
        )
    exact = int((error == 0).sum())
    note = f" {exact} merges were exact, and are not drawn." if exact and (error > 0).any() else ""
    return Picture(
        svg=svg, caption=f"Share of the delta that the weight did not take, the largest of any layer.{note}"
    )


def delta_picture(restarts: Sequence[Record]) -> Picture | None:
    """Draw the norm of the merged delta at each restart by kind of layer; None where it is not recorded."""
    index, norms = delta_norms(restarts, most=len(KIND_COLOURS))
    if not norms:
        return None
    with drawing_style(narrow=True):
        axes = new_axes(width=460, height=610, top=22 + 18 * ((len(norms) - 1) // 3 + 1))
        for position, (kind, values) in enumerate(norms.items()):
            axes.plot(
                index,
                values,
                color=light(KIND_COLOURS[position]),
                marker=_MARKERS[position],
                markersize=7,
                label=kind.lstrip("_"),  # a label that begins with "_" is left out of a legend
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel("norm of the delta")
        _finish_restarts(axes, np.asarray(index))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, **LEGEND)
        last = ", ".join(f"{kind} {values[-1]:.3g}" for kind, values in norms.items())
        svg = to_svg(
            axes,
            name="delta",
            title="Norm of the merged delta by kind of layer",
            description=f"At the last restart: {last}.",
        )
    return Picture(svg=svg, caption="Frobenius norm of the merged delta, mean over the layers of a kind.")


def cleared_picture(restarts: Sequence[Record]) -> Picture:
    """Draw the fraction of the factors' optimizer entries that each restart zeroed."""
    index = floats(restarts, "restart_index")
    cleared = [cleared_entries(restart) for restart in restarts]
    fraction = np.array([zeroed / entries if entries else 0.0 for zeroed, entries in cleared])
    mean = percent(sum(zeroed for zeroed, _ in cleared), sum(entries for _, entries in cleared))
    with drawing_style(narrow=True):
        axes = new_axes(width=460, height=290, left=74)
        axes.bar(index, fraction, color=light(TRAIN), width=0.6)
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        axes.set_ylabel("entries zeroed")
        _finish_restarts(axes, index)
        svg = to_svg(
            axes,
            name="cleared",
            title="Optimizer entries zeroed at each restart",
            description=f"{len(index)} restarts; {mean} on average.",
        )
    return Picture(svg=svg, caption="Share of the factors' optimizer state that a restart set to zero.")


def _finish_restarts(axes: Axes, index: Floats) -> None:
    known = index[np.isfinite(index)]
    if known.size:
        middle, reach = (known.min() + known.max()) / 2, max(2.0, (known.max() - known.min()) / 2 + 0.6)
        axes.set_xlim(middle - reach, middle + reach)
    axes.set_xlabel("restart")
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(FixedLocator(list(np.unique(known)[:: len(known) // 10 + 1])))
    axes.xaxis.set_major_formatter(FuncFormatter(axis_number))


def _restart_column(restarts: Sequence[Record], key: str) -> tuple[Floats, Floats]:
    return floats(restarts, "restart_index"), floats(restarts, key)
