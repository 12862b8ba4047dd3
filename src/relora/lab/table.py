"""Results in words: the Markdown table, and the rows that the page shows too."""

from collections.abc import Mapping, Sequence
from typing import Any

from relora.lab.results import ArmResult, arm_results
from relora.lab.statistics import Difference, Spread
from relora.lab.values import magnitude, shown

AS_SET = "as set"
"""Stands for the value that a recipe has where no value of an axis beat it."""
_MEGA = 1e6


def columns(references: Sequence[str]) -> list[str]:
    """Return the heads of the main table."""
    return [
        "arm",
        "perplexity, mean \u00b1 sd (n)",
        "loss, mean \u00b1 sd",
        *(f"loss minus {label} [95 % CI]" for label in references),
        "trained parameters",
        "weights",
        "optimizer",
        "peak memory",
        "tokens/s",
        "swept, winner in brackets",
    ]


def rows(lines: Sequence[ArmResult], references: Sequence[str]) -> list[list[str]]:
    """Return the main table's cells, a row an arm."""
    return [
        [
            line.arm,
            _perplexity(line),
            _plus_minus(line.loss, digits=4),
            *(_difference(line, label) for label in references),
            _each(line, "parameters_trainable", 1 / _MEGA, "{:.3f} M"),
            _each(line, "weight_bytes", 1 / _MEGA, "{:.1f} MB"),
            _each(line, "optimizer_bytes", 1 / _MEGA, "{:.1f} MB"),
            _each(line, "peak_memory_bytes", 1 / _MEGA, "{:.0f} MB"),
            _each(line, "tokens_per_s", 1.0, "{:,.0f}"),
            swept(line),
        ]
        for line in lines
    ]


def swept(line: ArmResult) -> str:
    """Say what was tuned, which won, and whether it lies on the edge of its grid."""
    if not line.tried:
        return "not swept"
    words = []
    for axis in line.axes:
        points = [point.settings[axis] for point in line.tried if axis in point.settings]
        values = list(dict.fromkeys(map(shown, sorted(points, key=lambda value: magnitude(value) or 0.0))))
        won = None if line.choice is None else shown(line.choice.winner.settings.get(axis, AS_SET))
        if won == AS_SET:
            values.append(AS_SET)
        listed = ", ".join(f"[{value}]" if value == won else value for value in values)
        edge = " (edge of grid)" if line.choice is not None and axis in line.choice.edges else ""
        words.append(f"{axis}: {listed}{edge}")
    return "; ".join(words)


def cautions(results: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before trusting the table."""
    lines = arm_results(results)
    found = list(results["notes"])
    edges = [
        f"{line.arm} ({', '.join(line.choice.edges)})" for line in lines if line.choice and line.choice.edges
    ]
    if edges:
        found.append(f"edge of grid, so perhaps not the best setting: {'; '.join(edges)}")
    earlier = sum(bool(cell.get("earlier")) for cell in results["cells"])
    if earlier:
        found.append(f"{earlier} cells were kept from earlier starts, perhaps elsewhere: compare no speeds")
    if len(devices := _devices(results)) > 1:
        found.append(
            f"cells ran on different devices ({', '.join(devices)}): compare no speeds and no memory, and no "
            "losses closer than a few thousandths"
        )
    few = sorted({line.arm for line in lines if 0 < len(line.cells) < 3})
    if few:
        found.append(f"fewer than 3 seeds: {', '.join(few)}")
    missing = [f"{line.arm} ({line.num_missing})" for line in lines if line.num_missing]
    if missing:
        found.append(f"final runs not there yet: {', '.join(missing)}")
    found += [failure for line in lines for failure in line.failures]
    found += [
        f"{cell['name']}: {cell['failure']}"
        for cell in results["cells"]
        if cell["stage"] == "tuning" and cell.get("failure")
    ]
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Return the study as a Markdown page: question, how it was made, a table a length, notes."""
    study = results["study"]
    lines = arm_results(results)
    heads = columns(study["references"])
    parts = [f"# {study['name']}", study["question"], how_made(results)]
    for budget in study["budgets"]:
        body = rows([line for line in lines if line.budget == budget], study["references"])
        table = [heads, ["---"] * len(heads), *body]
        parts.append(f"## {budget}")
        parts.append("\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in table))
    noted = cautions(results)
    if noted:
        parts.append("Notes:\n" + "\n".join(f"- {_escaped(note)}" for note in noted))
    return "\n\n".join(part for part in parts if part) + "\n"


def how_made(results: Mapping[str, Any]) -> str:
    """Say how the numbers came about, in a paragraph."""
    study, machine = results["study"], results["machine"]
    cells = results["cells"]
    tuned = sum(cell["stage"] == "tuning" and cell["status"] != "missing" for cell in cells)
    final = sum(cell["stage"] == "final" and cell["status"] == "finished" for cell in cells)
    tokens = sum(map(_tokens_trained, cells))
    at = f" at {study['tuning_budget']}" if study["tuning_budget"] else ""
    by = ", one axis after the other" if study["search"] == "axes" else ""
    tuning = (
        f"Settings were chosen by {tuned} runs{at} with seed {study['tuning_seed']} on the tuning split{by}. "
        if tuned
        else "No setting was swept. "
    )
    return (
        f"{tuning}{final} final runs with seeds {', '.join(map(str, study['seeds']))}, measured on the "
        f"held-out split; {tokens / 1e6:.1f} M tokens in all, {machine['threads_per_cell']} threads a run"
        f"{''.join(f', {name}' for name in _devices(results))}, torch {_torch(results)}. "
        "Differences are paired by seed; their intervals are Student's t."
    )


def _devices(results: Mapping[str, Any]) -> list[str]:
    """Return what the finished cells ran on; nothing where none of them tells."""
    finished = [cell for cell in results["cells"] if cell["status"] == "finished"]
    found = {cell.get("device") for cell in finished}
    return sorted(name or "not recorded" for name in found) if any(found) else []


def _torch(results: Mapping[str, Any]) -> str:
    """Return the versions of torch that the cells ran with, or where none tells that of the study."""
    told = {cell["versions"]["torch"] for cell in results["cells"] if cell.get("versions")}
    return " and ".join(sorted(told)) or str(results["versions"]["torch"])


def _tokens_trained(cell: Mapping[str, Any]) -> int:
    """Return the tokens of a cell without those of a warm start that another cell trained."""
    tokens = int(cell.get("tokens") or 0)
    if not tokens or not cell.get("warm_start_from"):
        return tokens
    recipe = cell["recipe"]
    per_step = recipe["train.batch_size"] * recipe["data.seq_len"]
    return tokens - int(recipe["relora.warm_start_steps"] * per_step)


def _perplexity(line: ArmResult) -> str:
    found = line.over("perplexity")
    return "" if found is None else f"{_plus_minus(found, digits=3)} ({found.n})"


def _plus_minus(found: Spread | None, *, digits: int) -> str:
    if found is None:
        return ""
    return f"{found.mean:.{digits}f}" + ("" if found.sd is None else f" \u00b1 {found.sd:.{digits}f}")


def _difference(line: ArmResult, label: str) -> str:
    if label in line.stands_for:
        return "itself"
    found: Difference | None = line.differences.get(label)
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f} (n = 1)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _each(line: ArmResult, key: str, scale: float, form: str) -> str:
    found = line.over(key)
    return "" if found is None else form.format(found.mean * scale)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
