"""The console: plain lines where no one watches, a bar on a terminal, never a control code from data."""

import io
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora.log.console import Console
from relora.log.restarts import restart_line
from relora.log.screen import last_screen
from relora.log.units import count, duration, percent, perplexity, scientific, size, visible

REPORT = {
    "restart_index": 3,
    "step": 600,
    "num_layers": 28,
    "relative_merge_error": 1.02e-7,
    "entries_targeted": 1_216_512,
    "entries_zeroed": 1_216_512,
    "unmoved_layers": [],
    "without_state": [],
    "parameters": [{"name": name, "entries": 614_400} for name in ("a.lora_A", "a.lora_B")],
}
SUMMARY = {
    "method": "relora",
    "steps": 600,
    "tokens": 4_915_200,
    "parameters_total": 4_530_176,
    "parameters_trainable": 1_705_984,
    "eval/perplexity": 25.108,
    "wall_s": 171.4,
    "tokens_per_s": 28_700.0,
    "peak_memory_bytes": 1_310_000_000,
    "restarts": 3,
    "switch": {"step": 150, "eval/perplexity": 40.666},
    "ranks": {"one_cycle": 32, "learned": 91.0, "largest": 192},
    "sample": "def main(argv=None):\n    return parser",
}


def record(step: int, **changes: object) -> dict[str, object]:
    return {
        "step": step,
        "tokens": step * 8192,
        "train/loss": 3.21987,
        "lr": 9.9e-4,
        "tokens_per_s": 12_345.0,
        "phase": "low_rank" if step > 150 else "warm_start",
    } | changes


def every_second() -> Iterator[float]:
    return itertools.count(0.0, 1.0)


def plain(**changes: object) -> tuple[Console, io.StringIO]:
    stream, clock = io.StringIO(), every_second()
    settings = {"total_steps": 600, "switch_step": 150, "restart_steps": (300, 450)} | changes
    return Console(stream=stream, clock=lambda: next(clock), **settings), stream  # type: ignore[arg-type]


def test_plain_line_says_what_happens_and_what_comes() -> None:
    console, stream = plain()
    console.log(record(50))
    console.log(record(200, **{"eval/perplexity": 38.456}))
    console.log(record(460))
    assert stream.getvalue().splitlines() == [
        "step 50/600 | warm start | loss 3.2199 | lr 9.9e-4 | 12.3 k tokens/s"
        " | switch in 100 steps | 0:11 left",
        "step 200/600 | low-rank | loss 3.2199 | held-out ppl 38.46 | lr 9.9e-4 | 12.3 k tokens/s"
        " | restart 1 in 100 steps | 0:04 left",
        "step 460/600 | low-rank | loss 3.2199 | lr 9.9e-4 | 12.3 k tokens/s | 0:01 left",
    ]


def test_time_left_of_a_resumed_run_counts_its_own_steps_only() -> None:
    console, stream = plain(start_step=500, restart_steps=())
    console.log(record(550))
    assert stream.getvalue().rstrip().endswith("0:01 left")


def test_restart_and_switch_are_lines_of_their_own() -> None:
    console, stream = plain()
    console.switch(150, heldout_perplexity=40.666)
    console.restart(REPORT)
    console.say("resumed from step 300")
    assert stream.getvalue().splitlines() == [
        "switch after step 150: low-rank from here, held-out perplexity 40.67",
        "restart 3 at step 600: 28 layers merged, error 1e-7, 99.0 % of 1.2 M state entries cleared",
        "resumed from step 300",
    ]


def test_restart_line_names_kept_and_missing_state() -> None:
    kept = REPORT | {"entries_targeted": 0, "entries_zeroed": 0, "relative_merge_error": 0.0}
    assert restart_line(kept).endswith("28 layers merged, error 0, optimizer state kept")
    assert restart_line(REPORT | {"without_state": ["a", "b"]}).endswith("2 factors had no state yet")
    assert restart_line(REPORT | {"unmoved_layers": ["a"]}).endswith("1 layer had not moved")


def test_nothing_but_text_goes_to_a_stream_that_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console, stream = plain()
    with console:
        console.advance(1)
        console.log(record(10, phase="\x1b[31mred"))
        console.restart(REPORT)
    last_screen(
        SUMMARY | {"sample": "\x1b[2Jgone [bold red]not markup[/] \u202e"}, Path("runs/a"), stream=stream
    )
    shown = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b[2Jgone [bold red]not markup[/] \\u202e" in shown


def test_last_step_before_a_restart_is_one_step() -> None:
    console, stream = plain()
    console.log(record(149))
    console.log(record(299))
    assert "switch in 1 step |" in stream.getvalue()
    assert "restart 1 in 1 step |" in stream.getvalue()


def test_loss_that_is_not_finite_is_said() -> None:
    console, stream = plain()
    console.log(record(10, **{"train/loss": float("nan")}))
    assert "loss not finite" in stream.getvalue()


def test_standard_output_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(total_steps=10) as console:
        console.log(record(10))
    last_screen(SUMMARY, Path("runs/a"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 10/10" in shown.err
    assert "relora eval runs/a" in shown.err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, io.TextIOWrapper]]:
    pty = pytest.importorskip("pty")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield master, stream
    os.close(master)


def seen(master: int) -> str:
    os.set_blocking(master, False)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except BlockingIOError:
            return shown.decode()


def test_terminal_shows_a_bar_with_figures_and_keeps_what_should_stay(
    terminal: tuple[int, io.TextIOWrapper],
) -> None:
    master, stream = terminal
    before = sys.stdout
    with Console(total_steps=600, switch_step=150, restart_steps=[300], stream=stream) as console:
        console.advance(199)
        assert sys.stdout is before
        console.log(record(200, **{"eval/perplexity": 38.456}))
        console.restart(REPORT)
        console.advance(201)
    console.say("report: runs/a/report.html")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen(master))
    for words in (
        "low-rank",
        "201/600",
        "loss 3.2199   held-out ppl 38.46   lr 9.9e-4   12.3 k tokens/s   restart 1 in 100 steps",
        "step 200: held-out perplexity 38.46",
        "restart 3 at step 600: 28 layers merged",
        "report: runs/a/report.html",
    ):
        assert words in shown
    assert shown.rstrip().endswith("report: runs/a/report.html")


def test_interrupted_display_gives_the_cursor_back(terminal: tuple[int, io.TextIOWrapper]) -> None:
    master, stream = terminal
    with pytest.raises(KeyboardInterrupt), Console(total_steps=600, stream=stream) as console:
        console.advance(1)
        raise KeyboardInterrupt
    shown = seen(master)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_last_screen_tells_a_newcomer_what_came_out() -> None:
    stream = io.StringIO()
    last_screen(SUMMARY, Path("runs/my run"), stream=stream)
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", stream.getvalue()).split())
    for words in (
        "my run: relora, 600 steps, 4.9 M tokens, 2:51",
        "40.67 at the switch (step 150, where full-rank training ended), 25.11 at the end",
        "1.7 M trained of 4.5 M in all (37.7 %)",
        "91 learned over all cycles, where one cycle can reach 32 (the largest possible: 192)",
        "def main(argv=None): return parser",
        "runs/my run/report.html",
        "relora eval 'runs/my run'",
        "relora generate 'runs/my run' --prompt def #",
        "relora export 'runs/my run' 'my run-exported'",
    ):
        assert words in shown


def test_last_screen_of_a_full_rank_run_leaves_out_what_it_has_not() -> None:
    stream = io.StringIO()
    told = {
        "method": "full",
        "steps": 10,
        "eval/perplexity": 99.5,
        "switch": None,
        "ranks": None,
        "sample": "",
    }
    last_screen(told, Path("runs/a"), stream=stream)
    shown = stream.getvalue()
    assert "99.50 at the end" in shown
    assert "switch" not in shown
    assert "Rank" not in shown
    assert "What the model writes" not in shown


def test_long_sample_is_cut_and_a_narrow_encoding_is_no_crash() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    last_screen(SUMMARY | {"sample": "caf\u00e9 " * 1000}, Path("runs/a"), stream=stream)
    stream.flush()
    assert b"[...]" in raw.getvalue()
    assert len(raw.getvalue()) < 8000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (812, "812"),
        (9_876, "9,876"),
        (9_999.6, "10.0 k"),
        (12_345, "12.3 k"),
        (999_949, "999.9 k"),
        (999_960, "1.0 M"),
        (1_234_567, "1.2 M"),
        (23.1e9, "23.1 B"),
        (5e15, "5,000.0 T"),
    ],
)
def test_counts_keep_a_few_digits(value: float, words: str) -> None:
    assert count(value) == words


def test_units_in_words() -> None:
    assert [duration(s) for s in (-1, 44.6, 723, 3_723, 180_240)] == [
        "0:00",
        "0:45",
        "12:03",
        "1:02:03",
        "2 d 02:04",
    ]
    assert [size(b) for b in (36_864, 2**29, 1.5 * 2**30)] == ["36 KiB", "512 MiB", "1.5 GiB"]
    assert [scientific(x) for x in (0.0, 1e-7, 9.9e-4, 2.04e-10)] == ["0", "1e-7", "9.9e-4", "2e-10"]
    assert [perplexity(x) for x in (34.456, 54_321.0)] == ["34.46", "54.3 k"]


def test_share_is_whole_or_nothing_only_when_it_is() -> None:
    shares = [percent(999_999, 1_000_000), percent(1, 10**6), percent(5, 5), percent(0, 5), percent(0, 0)]
    assert shares == ["99.9 %", "0.1 %", "100.0 %", "0.0 %", "0.0 %"]


def test_control_and_format_characters_are_spelled_out() -> None:
    assert visible("a\tb\nc\x1b\x00\u202e\x85\ud800 \u00e9\u6f22") == (
        "a\tb\nc\\x1b\\x00\\u202e\\x85\\ud800 \u00e9\u6f22"
    )
