"""A restart in words, from its RestartReport as a mapping."""

from collections.abc import Mapping, Sequence

from relora.log.units import count, number, percent, scientific


def restart_line(report: Mapping[str, object]) -> str:
    """Word a restart: what was merged, how exactly, and how much optimizer state was cleared."""
    error = number(report.get("relative_merge_error"))
    zeroed, entries = cleared_entries(report)
    parts = [
        f"{report.get('num_layers')} layers merged",
        "error not known" if error is None else f"error {scientific(error)}",
        f"{percent(zeroed, entries)} of {count(entries)} state entries cleared"
        if zeroed
        else "optimizer state kept",
        *_remark(report, "unmoved_layers", "layer", "had not moved"),
        *_remark(report, "without_state", "factor", "had no state yet"),
    ]
    return f"restart {report.get('restart_index')} at step {report.get('step')}: {', '.join(parts)}"


def cleared_entries(report: Mapping[str, object]) -> tuple[float, float]:
    """Return how many entries of the factors' optimizer state a restart zeroed, and of how many.

    The whole is what "parameters" add up to. "entries_targeted" is not: it counts what was to be zeroed,
    all of which is, and stands in only where the parameters are not listed.
    """
    zeroed = number(report.get("entries_zeroed")) or 0.0
    parameters = report.get("parameters")
    listed = parameters if isinstance(parameters, Sequence) and not isinstance(parameters, str) else ()
    entries = sum(number(each.get("entries")) or 0.0 for each in listed if isinstance(each, Mapping))
    return zeroed, entries or number(report.get("entries_targeted")) or 0.0


def _remark(report: Mapping[str, object], key: str, noun: str, words: str) -> list[str]:
    names = report.get(key)
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        return []
    return [f"{len(names)} {noun}{'s' if len(names) > 1 else ''} {words}"]
