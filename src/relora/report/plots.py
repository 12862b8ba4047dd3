"""The figures against tokens: what a run learned, at which rate, how fast, with its phases drawn in."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from relora.log.units import number, perplexity
from relora.report.palette import HELDOUT, LOGGED, RESTART, SWITCH, TRAIN, WARM, light
from relora.report.run import Run
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

_WIDE_MARGINS = {"left": 58, "right": 64}  # shared, so that what lies under another has its x axis
_SMOOTHED_FROM = 150  # records; fewer are read better as they are


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Tokens along the x axis, in thousands, millions or billions."""

    tokens: Floats
    steps: Floats
    scale: float
    unit: str

    def of_step(self, step: float) -> float:
        """Return the place of a step, between those that were logged."""
        return float(np.interp(step, [0.0, *self.steps], [0.0, *self.tokens])) / self.scale

    @property
    def values(self) -> Floats:
        return self.tokens / self.scale


def loss_picture(run: Run, *, narrow: bool) -> Picture:
    """Draw training and held-out loss against tokens, with the phases of the run."""
    axis = _token_axis(run)
    train, heldout = _column(run, "train/loss"), _column(run, "eval/loss")
    smooth, window = _smoothed(run, train)
    measured = np.isfinite(heldout)
    bottom, top, above = _loss_window(train, heldout)
    with drawing_style(narrow=narrow):
        axes = (
            new_axes(width=460, height=350, top=58, right=58)
            if narrow
            else new_axes(width=940, height=400, top=38, **_WIDE_MARGINS)
        )
        _draw_phases(axes, run, axis)
        _draw_training(axes, axis, train, smooth)
        axes.plot(
            axis.values[measured],
            heldout[measured],
            color=light(HELDOUT),
            marker="o",
            markersize=6 if measured.sum() <= 60 else 0,
        )
        axes.set_ylim(bottom, top)
        axes.set_ylabel("loss (nats per token)")
        _finish(axes, axis)
        _draw_perplexity_scale(axes, bottom, top)
        _draw_legend(axes, run, has_heldout=bool(measured.any()), columns=3 if narrow else 5)
        svg = to_svg(
            axes,
            name="loss-narrow" if narrow else "loss",
            title="Loss against tokens",
            description=_loss_words(run, train, heldout),
        )
    caption = ["Loss against tokens; the scale on the right gives the same as perplexity."]
    if window:
        caption.append(f"Thin: as logged; thick: centred mean of up to {window} logged lines.")
    if above:
        first = "first logged line lies" if above == 1 else f"first {above} logged lines lie"
        caption.append(f"The {first} above the frame.")
    return Picture(svg=svg, caption=" ".join(caption))


def rate_picture(run: Run, *, narrow: bool) -> Picture:
    """Draw the learning rate against tokens; wide, it lies exactly under the loss."""
    caption = "Learning rate of the logged steps."
    return _curve(run, "lr", "learning rate", caption, narrow=narrow)


def speed_picture(run: Run) -> Picture:
    """Draw the tokens a second against tokens."""
    return _curve(run, "tokens_per_s", "tokens/s", "Speed, over all devices.")


def gradient_picture(run: Run) -> Picture:
    """Draw the norm of the gradient against tokens, on a logarithmic scale."""
    caption = "Norm of the gradient before clipping, on a logarithmic scale."
    return _curve(run, "grad_norm", "gradient norm", caption, logarithmic=True)


def _curve(
    run: Run, key: str, label: str, caption: str, *, logarithmic: bool = False, narrow: bool = True
) -> Picture:
    axis, values = _token_axis(run), _column(run, key)
    with drawing_style(narrow=narrow):
        axes = (
            new_axes(width=460, height=260, left=74)
            if narrow
            else new_axes(width=940, height=210, **_WIDE_MARGINS)
        )
        _draw_phases(axes, run, axis)
        _draw_training(axes, axis, values, values if key == "lr" else _smoothed(run, values)[0])
        finite = values[np.isfinite(values)]
        if logarithmic and (finite > 0).any():
            use_log_scale(axes)
        elif finite.size:
            axes.set_ylim(0, 1.08 * finite.max() if finite.max() > 0 else 1.0)
            axes.yaxis.set_major_formatter(FuncFormatter(axis_number))
        axes.set_ylabel(label)
        _finish(axes, axis)
        words = f"From {finite[0]:.3g} to {finite[-1]:.3g}." if finite.size else "Nothing recorded."
        svg = to_svg(
            axes, name=key if narrow else f"{key}-wide", title=f"{label} against tokens", description=words
        )
    return Picture(svg=svg, caption=caption)


def _token_axis(run: Run) -> _Axis:
    tokens, steps = _column(run, "tokens"), _column(run, "step")
    largest = float(np.nanmax(tokens)) if np.isfinite(tokens).any() else 0.0
    scale, unit = next(
        ((scale, unit) for scale, unit in [(1e9, "billions"), (1e6, "millions")] if largest >= scale),
        (1e3, "thousands"),
    )
    known = np.isfinite(tokens)
    return _Axis(tokens=tokens[known], steps=steps[known], scale=scale, unit=unit)


def _column(run: Run, key: str) -> Floats:
    """Return a value of each record that has its tokens, NaN where it is missing or not finite."""
    rows = [record for record in run.metrics if number(record.get("tokens")) is not None]
    return floats(rows, key)


def _smoothed(run: Run, values: Floats) -> tuple[Floats, int]:
    """Return a centred mean and over how many records it goes at most; 0 where there is nothing to smooth.

    No window crosses the switch, where the speed may jump. Those of a run's first records grow from one
    record, so that the steep fall there is not smeared.
    """
    if len(values) < _SMOOTHED_FROM:
        return values, 0
    reach = max(2, len(values) // 100)
    steps = _column(run, "step")
    cut = int(np.searchsorted(steps, run.switch_step, side="right")) if run.switch_step else 0
    reaches = np.minimum(np.arange(len(values)) // 10, reach)
    if cut:
        reaches[cut:] = reach
    parts = zip(np.split(values, [cut]), np.split(reaches, [cut]), strict=True)
    return np.concatenate([_centred_mean(part, part_reach) for part, part_reach in parts]), 2 * reach + 1


def _centred_mean(values: Floats, reach: NDArray[np.intp]) -> Floats:
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    smooth = np.full_like(values, np.nan)
    np.divide(sums[high] - sums[low], counts[high] - counts[low], out=smooth, where=known)
    return smooth


def _loss_window(train: Floats, heldout: Floats) -> tuple[float, float, int]:
    """Return the frame's bounds and how many of the first training losses lie above it.

    The fall from log(vocab_size) in the first steps would press all that follows flat: what lies above
    everything after the first twentieth is cut. A later divergence is after it, and is never cut.
    """
    start = len(train) // 20
    shown = np.concatenate([train[start:], heldout[start:]])
    shown = shown[np.isfinite(shown)]
    if not shown.size:
        return 0.0, 1.0, 0
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin, int(np.nansum(train[:start] > high + margin))


def _draw_training(axes: Axes, axis: _Axis, values: Floats, smooth: Floats) -> None:
    if smooth is not values:
        axes.plot(axis.values, values, color=light(LOGGED), lw=0.9)
    axes.plot(axis.values, smooth, color=light(TRAIN), lw=1.7)


def _draw_phases(axes: Axes, run: Run, axis: _Axis) -> None:
    end = run.last_step if run.is_warming else run.switch_step
    if end:
        axes.axvspan(0, axis.of_step(end), color=light(WARM), lw=0, zorder=0)
    if run.switch_step:
        axes.axvline(axis.of_step(run.switch_step), color=light(SWITCH), lw=1.3, zorder=1)
    crowded = len(run.restarts) > 60
    for restart in run.restarts:
        place = axis.of_step(number(restart.get("step")) or 0.0)
        axes.axvline(place, color=light(RESTART), lw=0.4 if crowded else 0.9, ls=(0, (4, 3)), zorder=1)


def _draw_perplexity_scale(axes: Axes, bottom: float, top: float) -> None:
    if top > 25:  # exp() of a diverged loss says nothing
        return
    scale = axes.secondary_yaxis("right")
    scale.set_ylabel("perplexity")
    ticks = _perplexity_ticks(float(np.exp(bottom)), float(np.exp(top)))
    scale.yaxis.set_major_locator(FixedLocator([float(np.log(tick)) for tick in ticks]))
    scale.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: axis_number(float(np.exp(loss)))))
    scale.spines["right"].set_visible(False)
    scale.tick_params(length=0)


def _perplexity_ticks(low: float, high: float) -> list[float]:
    for digits in [(1, 2, 3, 5), (1, 2, 5), (1,)]:
        round_ones = [digit * 10.0**power for power in range(11) for digit in digits]
        within = [tick for tick in round_ones if low <= tick <= high]
        if 3 <= len(within) <= 9:
            return within
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _draw_legend(axes: Axes, run: Run, *, has_heldout: bool, columns: int) -> None:
    entries: list[Line2D | Patch] = [Line2D([], [], color=light(TRAIN), lw=1.8, label="training")]
    if has_heldout:
        entries.append(Line2D([], [], color=light(HELDOUT), marker="o", markersize=6, label="held-out"))
    if run.is_warming or run.switch_step:
        entries.append(Patch(facecolor=light(WARM), label="warm start"))
    if run.switch_step:
        entries.append(Line2D([], [], color=light(SWITCH), lw=1.3, label="switch"))
    if run.restarts:
        entries.append(Line2D([], [], color=light(RESTART), lw=0.9, ls=(0, (4, 3)), label="restart"))
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, **LEGEND)


def _finish(axes: Axes, axis: _Axis) -> None:
    end = float(axis.values.max()) if axis.values.size else 0.0
    axes.set_xlim(0, 1.008 * end if end > 0 else 1.0)  # room for the last marker
    axes.set_xlabel(f"tokens ({axis.unit})")
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_formatter(FuncFormatter(axis_number))


def _loss_words(run: Run, train: Floats, heldout: Floats) -> str:
    parts = []
    for name, values in (("Training", train), ("Held-out", heldout)):
        known = values[np.isfinite(values)]
        if known.size:
            parts.append(f"{name} loss goes from {known[0]:.3f} to {known[-1]:.3f}.")
    known = heldout[np.isfinite(heldout)]
    if known.size and known[-1] < 25:
        parts.append(f"The last held-out perplexity is {perplexity(float(np.exp(known[-1])))}.")
    if run.switch_step:
        parts.append(f"The warm start ends after step {run.switch_step}.")
    if run.restarts:
        parts.append(f"Restarts: {len(run.restarts)}.")
    return " ".join(parts)
