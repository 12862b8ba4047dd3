"""The figures of a run in words, from its summary, or from its metrics while there is none."""

from collections.abc import Callable, Mapping, Sequence

from relora.log.restarts import cleared_entries
from relora.log.units import count, duration, number, percent, perplexity, scientific, size
from relora.report.run import Record, Run

RESTART_COLUMNS = (
    "restart",
    "step",
    "layers merged",
    "merge error",
    "function change",
    "state entries",
    "zeroed",
    "loss after re-warm",
)


def subtitle(run: Run) -> str:
    """Say in a line what run this is and how far it came."""
    model = run.section("model").get("preset") or run.section("model").get("init_from")
    method = (run.summary or {}).get("method") or run.section("run").get("method")
    last = _last(run)
    tokens = number(last.get("tokens"))
    return " \N{MIDDLE DOT} ".join(
        filter(
            None,
            [
                str(method or ""),
                str(model or ""),
                _progress(run),
                "" if tokens is None else f"{count(tokens)} tokens",
            ],
        )
    )


def headline(run: Run) -> list[tuple[str, str, str]]:
    """List the figures that matter most, as (name, figure, remark)."""
    last = _last(run)
    trainable, total = number(last.get("parameters_trainable")), number(last.get("parameters_total"))
    ranks = _part(last, "ranks")
    learned, one_cycle, largest = (number(ranks.get(key)) for key in ("learned", "one_cycle", "largest"))
    heldout = number(last.get("eval/perplexity"))
    before = number(_part(last, "switch").get("eval/perplexity"))
    bound = "" if largest is None else f", {largest:,.0f} the largest possible"
    return [
        (
            "Held-out perplexity",
            "" if heldout is None else perplexity(heldout),
            _evaluated_at(run) if before is None else f"{perplexity(before)} at the switch",
        ),
        (
            "Trainable parameters",
            "" if trainable is None else count(trainable),
            "" if trainable is None or total is None else f"{percent(trainable, total)} of {count(total)}",
        ),
        (
            "Rank learned",
            "" if learned is None else f"{learned:,.0f}",
            "" if one_cycle is None else f"{one_cycle:,.0f} in one cycle{bound}",
        ),
        ("Restarts", f"{len(run.restarts)}" if run.restarts else "", _cycle(run)),
    ]


def summary_rows(run: Run) -> list[tuple[str, str]]:
    """List all figures of the run by name; those that are not there are empty."""
    last = _last(run)
    switch = _part(last, "switch")
    trainable, total = number(last.get("parameters_trainable")), number(last.get("parameters_total"))
    rows = [
        ("Method", str(last.get("method") or run.section("run").get("method") or "")),
        ("Seed", _whole(run.section("run").get("seed"))),
        ("Steps", _progress(run)),
        ("Tokens", _whole(last.get("tokens"))),
        ("Parameters", _whole(total)),
        ("Trainable", "" if not total else f"{_whole(trainable)} ({percent(trainable or 0.0, total)})"),
        ("Held-out loss", _digits(last.get("eval/loss"), 4, " nats per token")),
        ("Held-out perplexity", _digits(last.get("eval/perplexity"), 3)),
        ("Held-out bits per byte", _digits(last.get("eval/bits_per_byte"), 4)),
        ("At the switch", _at_switch(switch)),
        ("Rank of what was learned", _ranks(_part(last, "ranks"))),
        ("Restarts", _whole(last.get("restarts"))),
        ("Time", _worded(last.get("wall_s"), duration)),
        ("Speed", _worded(last.get("tokens_per_s"), count, " tokens/s")),
        ("Peak memory", _worded(last.get("peak_memory_bytes"), size)),
        ("Optimizer state", _worded(last.get("optimizer_bytes"), size)),
        ("Processes", _whole(last.get("world_size"))),
        ("Strategy", str(last.get("strategy") or "")),
        ("Device", str(last.get("device") or "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in _part(last, "versions").items())),
    ]
    return [(name, value) for name, value in rows if value]


def restart_rows(restarts: Sequence[Record]) -> list[list[str]]:
    """List the restarts, a row each, under RESTART_COLUMNS."""
    return [_restart_row(restart) for restart in restarts]


def _restart_row(restart: Record) -> list[str]:
    zeroed, entries = cleared_entries(restart)
    return [
        _whole(restart.get("restart_index")),
        _whole(restart.get("step")),
        _whole(restart.get("num_layers")),
        _worded(restart.get("relative_merge_error"), scientific),
        _worded(restart.get("max_function_change"), scientific),
        _whole(entries),
        f"{_whole(zeroed)} ({percent(zeroed, entries)})",
        _effect(restart),
    ]


def _effect(restart: Record) -> str:
    """Word what became of the loss at a restart; nothing where it was not measured."""
    before, after = number(restart.get("loss_before")), number(restart.get("loss_after"))
    if before is None or after is None:
        return ""
    return f"{after - before:+.4f} nat{', hurt' if restart.get('hurt') is True else ''}"


def _last(run: Run) -> Record:
    """Return the summary, or the last known value of each metric while there is none."""
    if run.summary is not None:
        return run.summary
    known: dict[str, object] = {}
    for record in run.metrics:
        known.update({key: value for key, value in record.items() if value is not None})
    return known


def _progress(run: Run) -> str:
    if run.summary is not None:
        return f"{_whole(run.summary.get('steps'))} steps"
    planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
    return f"not finished: step {run.last_step:,}{planned}"


def _evaluated_at(run: Run) -> str:
    if run.summary is not None:
        return "at the end"
    steps = [record.get("step") for record in run.metrics if number(record.get("eval/perplexity"))]
    return f"at step {_whole(steps[-1])}" if steps else ""


def _cycle(run: Run) -> str:
    every = _whole(run.section("relora").get("restart_every"))
    return f"a cycle lasts {every} steps" if every else ""


def _at_switch(switch: Record) -> str:
    parts = [
        f"step {_whole(switch.get('step'))}" if switch else "",
        _digits(switch.get("eval/loss"), 4, " nats per token"),
        _digits(switch.get("eval/perplexity"), 3, " perplexity"),
    ]
    return ", ".join(filter(None, parts))


def _ranks(ranks: Record) -> str:
    named = (
        ("learned", ""),
        ("effective", "effective "),
        ("one_cycle", "one cycle "),
        ("largest", "largest "),
    )
    known = [(words, number(ranks.get(key))) for key, words in named]
    told = [f"{words}{value:,.4g}" for words, value in known if value is not None]
    return f"{', '.join(told)} (medians over layers)" if told else ""


def _part(record: Record, key: str) -> Record:
    part = record.get(key)
    return part if isinstance(part, Mapping) else {}


def _whole(value: object) -> str:
    known = number(value)
    return "" if known is None else f"{known:,.0f}"


def _digits(value: object, digits: int, unit: str = "") -> str:
    known = number(value)
    return "" if known is None else f"{known:.{digits}f}{unit}"


def _worded(value: object, words: Callable[[float], str], unit: str = "") -> str:
    known = number(value)
    return "" if known is None else f"{words(known)}{unit}"
