"""A plan as a bar chart."""

from matplotlib.patches import Patch

from relora.lab.planner.plan import RunPlan
from relora.lab.planner.show import unit_for
from relora.report.palette import INK, KIND_COLOURS, light
from relora.report.svg import LEGEND, drawing_style, new_axes, to_svg

# kind -> its words, in the order of the bars.
KINDS = {
    "weights": "weights",
    "residual": "residual of a low-precision base",
    "host": "exact base in host memory",
    "factors": "factors",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "activations": "activations",
    "casts": "weights in the products' dtype",
    "loss": "head and loss",
    "backward": "backward pass",
    "update": "update",
    "restart": "restart",
    "other": "other",
}


def chart(plan: RunPlan) -> str:
    """Draw what each method's peak is made of, as an SVG that stands on its own."""
    unit, letters = unit_for(max(method.warm_start_peak_bytes for method in plan.methods.values()))
    with drawing_style(narrow=False):
        axes = new_axes(width=760, height=110 + 46 * len(plan.methods), left=126, top=64)
        for position, method in enumerate(plan.methods.values()):
            left, parts = 0.0, method.footprint.peak_by_kind
            for index, kind in enumerate(KINDS):
                width = parts.get(kind, 0) / unit
                colour = light(KIND_COLOURS[index % len(KIND_COLOURS)])
                axes.barh(position, width, left=left, height=0.55, color=colour, alpha=1 - 0.4 * (index > 7))
                left += width
            peak = method.warm_start_peak_bytes / unit
            axes.plot([peak, peak], [position - 0.36, position + 0.36], color=light(INK), linewidth=1.6)
        if plan.memory_bytes is not None:
            axes.axvline(plan.memory_bytes / unit, color=light(INK), linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(plan.methods)), labels=list(plan.methods))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"peak of a step, {letters}")
        shown = [
            kind for kind in KINDS if any(m.footprint.peak_by_kind.get(kind) for m in plan.methods.values())
        ]
        order = list(KINDS)
        handles = [Patch(color=light(KIND_COLOURS[order.index(k) % len(KIND_COLOURS)])) for k in shown]
        axes.legend(
            handles,
            [KINDS[k] for k in shown],
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(-0.1, 1.0),
            **LEGEND,
        )
        largest = max(plan.methods, key=lambda name: plan.methods[name].footprint.peak_bytes)
        return to_svg(
            axes,
            name="plan",
            title=f"Memory of {plan.recipe.run.name} by method",
            description=f"A bar for each method by kind of memory, the largest for {largest}; a mark where "
            "a warm start's peak is"
            + ("." if plan.memory_bytes is None else "; a dashed line at the memory given."),
        )
