"""Layers by kind: q_proj of every block is one kind, and its deltas are averaged."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from relora.log.units import number, visible
from relora.report.run import Record

OTHER = "other"
_LONGEST = 20


def layer_kind(name: str) -> str:
    """Return the part of a module's name that its siblings in other blocks share.

    It is the last part that is no index: "model.layers.3.mlp.up_proj" is an "up_proj". What the font of
    a figure may lack is spelled out, and a very long name is cut.
    """
    words = [part for part in name.split(".") if part and not part.isdigit()]
    kind = visible(words[-1] if words else name).encode("ascii", "backslashreplace").decode()
    return kind if len(kind) <= _LONGEST else f"{kind[: _LONGEST - 3]}..."


def delta_norms(restarts: Sequence[Record], *, most: int) -> tuple[list[float], dict[str, list[float]]]:
    """Gather the mean norm of the delta by restart and kind of layer.

    Args:
        restarts: RestartReports with "layers", each with "name" and "delta_norm".
        most: How many kinds to tell apart; beyond it the smallest are averaged as "other".

    Returns:
        The indices of the restarts that have norms, and for each kind a value at each of them
        (NaN where a restart does not tell), the largest kind first.
    """
    tables = [(number(restart.get("restart_index")), _norms(restart)) for restart in restarts]
    told = [(index, norms) for index, norms in tables if index is not None and norms]
    every: dict[str, list[float]] = defaultdict(list)
    for _, norms in told:
        for kind, values in norms.items():
            every[kind] += values
    ordered = sorted(every, key=lambda kind: (-_mean(every[kind]), kind))
    shown = ordered if len(ordered) <= most else ordered[: most - 1]
    curves = {kind: [_mean(norms.get(kind, [])) for _, norms in told] for kind in shown}
    rest = ordered[len(shown) :]
    if rest:
        curves[OTHER] = [_mean([v for kind in rest for v in norms.get(kind, [])]) for _, norms in told]
    return [index for index, _ in told], curves


def _norms(restart: Record) -> dict[str, list[float]]:
    norms: dict[str, list[float]] = defaultdict(list)
    layers = restart.get("layers")
    for layer in layers if isinstance(layers, Sequence) else ():
        if isinstance(layer, Mapping):
            norm = number(layer.get("delta_norm"))
            if norm is not None:
                norms[layer_kind(str(layer.get("name")))].append(norm)
    return norms


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
