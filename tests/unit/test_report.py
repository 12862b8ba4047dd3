"""The report: one page from a run folder in any state, with nothing loaded and all data escaped."""

import json
import math
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from relora.errors import ConfigError
from relora.log.jsonl import strict_json
from relora.report.kinds import delta_norms, layer_kind
from relora.report.page import write_report
from relora.report.palette import COLOURS

STEPS, WARM, CYCLE, REWARM, EVERY = 600, 150, 150, 12, 2
TOKENS_PER_STEP = 8192
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPE = f"""\
[run]
name = "quickstart"
method = "relora"
seed = 0

[model]
preset = "llama-quickstart"

[relora]
rank = 32
restart_every = {CYCLE}
warm_start_steps = {WARM}

[train]
steps = {STEPS}
"""


def multiplier(step: int) -> float:
    """Jagged cosine: a first ramp, a cosine to a tenth, and a short ramp after each restart."""

    def cosine(at: float) -> float:
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (at - 20) / (STEPS - 20)))

    done = step - 1
    since = done - WARM if done >= WARM else CYCLE
    into = since % CYCLE if done >= WARM else CYCLE
    if done < 20:
        return done / 20
    return into / REWARM * cosine(done - into + REWARM) if into < REWARM else cosine(done)


def true_loss(step: int) -> float:
    return 3.1 + 6.3 * math.exp(-step / 22) + 1.1 * math.exp(-step / 210)


def metric_records() -> list[dict[str, object]]:
    noise = np.random.default_rng(7).normal(size=STEPS + 1)
    records = []
    for step in range(EVERY, STEPS + 1, EVERY):
        low_rank = step > WARM
        record: dict[str, object] = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "train/loss": true_loss(step) + 0.045 * float(noise[step]),
            "lr": 2e-3 * multiplier(step),
            "grad_norm": 0.35 + 2.5 * math.exp(-step / 15) + 0.06 * abs(float(noise[step])),
            "tokens_per_s": (29_500 if low_rank else 26_200) + 420 * float(noise[-step]),
            "restart_index": max(0, (step - WARM - 1) // CYCLE),
            "phase": "low_rank" if low_rank else "warm_start",
        }
        if step % 50 == 0:
            loss = true_loss(step) + 0.06
            record |= {
                "eval/loss": loss,
                "eval/perplexity": math.exp(loss),
                "eval/bits_per_byte": 0.41 * loss,
            }
        records.append(record)
    return records


def restart_records(count: int = 2, kinds: tuple[str, ...] = KINDS) -> list[dict[str, object]]:
    records = []
    for index in range(1, count + 1):
        layers = [
            {
                "name": f"model.layers.{block}.{'mlp' if 'gate' in kind else 'self_attn'}.{kind}",
                "max_function_change": 2e-7,
                "relative_merge_error": 6e-8,
                "delta_norm": (2.4 + 0.5 * place + 0.1 * block) / index**0.6,
            }
            for block in range(4)
            for place, kind in enumerate(kinds)
        ]
        records.append(
            {
                "restart_index": index,
                "step": WARM + index * CYCLE,
                "max_function_change": 2.4e-7 * index,
                "relative_merge_error": 6.1e-8 * 1.3**index,
                "entries_targeted": 1_216_512,
                "entries_zeroed": 1_216_512,
                "num_layers": len(layers),
                "num_states": 2 * len(layers),
                "layers": layers,
                "without_state": [],
                "parameters": [
                    {
                        "name": f"{layer['name']}.{factor}",
                        "num_states": 2,
                        "entries": 1_228_800 // 2 // len(layers),
                    }
                    for layer in layers
                    for factor in ("lora_A", "lora_B")
                ],
            }
        )
    return records


def summary() -> dict[str, object]:
    end, switch = true_loss(STEPS) + 0.06, true_loss(WARM) + 0.06
    return {
        "method": "relora",
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "parameters_total": 4_530_176,
        "parameters_trainable": 1_705_984,
        "eval/loss": end,
        "eval/perplexity": math.exp(end),
        "eval/bits_per_byte": 0.41 * end,
        "wall_s": 171.4,
        "tokens_per_s": 28_700.0,
        "peak_memory_bytes": 1_310_000_000,
        "restarts": 2,
        "world_size": 1,
        "strategy": "single",
        "device": "Tensor Engine 9",
        "versions": {"relora": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "switch": {"step": WARM, "eval/loss": switch, "eval/perplexity": math.exp(switch)},
        "ranks": {"one_cycle": 32, "learned": 91.0, "effective": 40.25, "largest": 192},
        "sample": "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    return parser\n",
    }


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(strict_json(record) + "\n" for record in records))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    write_lines(folder / "metrics.jsonl", metric_records())
    write_lines(folder / "restarts.jsonl", restart_records())
    (folder / "summary.json").write_text(json.dumps(summary()))
    return folder


class Page(HTMLParser):
    """What a browser would see of a page: tags, ids, references and text."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "src", "xlink:href", "action", "data", "poster"}:
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in {"style", "script"}:
            self.words.append(data)
            if self._open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_shows_the_figures_the_phases_and_the_recipe(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = Page(path)
    assert path == run_folder / "report.html"
    assert page.headings == ["Training", "Restarts", "Summary", "What the model writes", "Recipe", "Terms"]
    assert page.tags.count("svg") == 9  # loss and learning rate twice: for wide screens and for phones
    assert f"{math.exp(true_loss(STEPS) + 0.06):.3f}" in page.text
    assert f"{math.exp(true_loss(WARM) + 0.06):.2f} at the switch" in page.text
    assert "37.7 % of 4.5 M" in page.text
    assert "91 32 in one cycle, 192 the largest possible" in page.text
    assert "warm_start_steps = 150" in page.text
    assert "91, effective 40.25, one cycle 32, largest 192 (medians over layers)" in page.text
    assert "1,228,752 1,216,512 (99.0 %)" in page.text
    assert "The warm start ends after step 150. Restarts: 2." in page.text


def test_page_loads_and_runs_nothing(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    assert set(page.tags).isdisjoint({"script", "img", "iframe", "object", "embed", "video", "audio", "form"})
    assert all(reference.startswith(("#", "data:,")) for reference in page.references)
    assert re.findall(r"url\((?!#)|@import", page.source) == []
    assert "default-src 'none'" in page.source


def test_ids_are_unique_and_references_lead_somewhere(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    assert len(set(page.ids)) == len(page.ids)
    wanted = {reference[1:] for reference in page.references if reference.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    for labels in re.findall(r'aria-labelledby="([^"]+)"', page.source):
        wanted |= set(labels.split())
    assert wanted
    assert wanted <= set(page.ids)


def test_same_files_give_the_same_bytes_and_leave_matplotlib_as_it_was(run_folder: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = write_report(run_folder).read_bytes()
    matplotlib.rcParams["lines.linewidth"] = 9.0
    try:
        assert write_report(run_folder).read_bytes() == first
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
    finally:
        matplotlib.rcParams["lines.linewidth"] = before["lines.linewidth"]
    assert dict(matplotlib.rcParams) == before


def test_figures_are_drawn_in_theme_colours_alone(run_folder: Path) -> None:
    source = write_report(run_folder).read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.S))
    named = {colour for colour, _ in COLOURS.values()}
    bare = set(re.findall(r"#[0-9a-f]{6}\b", drawings)) - named
    assert bare == set()
    assert "var(--train, " in drawings
    assert not re.search(r"(?:fill|stroke): #", drawings)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme: int) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted([luminance(COLOURS[one][theme]), luminance(COLOURS[other][theme])])
        return (high + 0.05) / (low + 0.05)

    lines = ["train", "heldout", "switch", "restart", *(name for name in COLOURS if name.startswith("kind-"))]
    assert all(contrast(name, ground) >= 4.5 for name in ("ink", "muted") for ground in ("paper", "panel"))
    assert [name for name in lines if contrast(name, "paper") < 3] == []
    assert [name for name in ("train", "heldout", "switch") if contrast(name, "warm") < 3] == []


def test_run_in_progress_says_how_far_it_came(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    write_lines(run_folder / "metrics.jsonl", metric_records()[:200])
    page = Page(write_report(run_folder))
    assert "not finished: step 400 of 600" in page.text
    assert "The warm start ends after step 150." in page.text
    assert "What the model writes" not in page.headings


def test_run_in_its_warm_start_has_no_switch_yet(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    (run_folder / "restarts.jsonl").unlink()
    write_lines(run_folder / "metrics.jsonl", metric_records()[:30])
    page = Page(write_report(run_folder))
    assert "warm start" in page.text
    assert "The warm start ends" not in page.text
    assert "Restarts" not in page.headings


def test_run_without_a_logged_step_gives_a_clear_page(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    (run_folder / "restarts.jsonl").unlink()
    (run_folder / "metrics.jsonl").write_text("")
    page = Page(write_report(run_folder))
    assert "No step has been logged yet" in page.text
    assert "not finished: step 0 of 600" in page.text
    assert "svg" not in page.tags


def test_damaged_lines_are_left_out_and_named(run_folder: Path) -> None:
    metrics = run_folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[16] = b'{"step": 34, "tok\n'
    lines[40] = b"\xff\xfe\n"
    lines[50] = b"[" * 100_000 + b"\n"
    metrics.write_bytes(b"".join(lines) + b'{"loss": 1}\n' + b'{"step": 6')
    (run_folder / "summary.json").write_text("{")
    page = Page(write_report(run_folder))
    assert "metrics.jsonl: 4 lines could not be read as JSON" in page.text
    assert "(lines 17, 41, 51, 302)" in page.text
    assert "metrics.jsonl: 1 record without a step" in page.text
    assert "summary.json: could not be read" in page.text
    assert "not finished" in page.text


def test_repeated_steps_and_non_finite_values_are_named(run_folder: Path) -> None:
    records = metric_records()
    records[100]["train/loss"] = math.nan
    records[101]["grad_norm"] = math.inf
    write_lines(run_folder / "metrics.jsonl", [*records[:150], *records[140:]])
    page = Page(write_report(run_folder))
    assert "2 records with a value that is not finite (steps 202, 204)" in page.text
    assert "10 records left out because a later line tells the same step again" in page.text


def test_restarts_that_hurt_are_named_and_others_only_listed(run_folder: Path) -> None:
    effect = {"loss_before": 3.0, "loss_after": 3.5, "loss_noise": 0.01, "hurt": True}
    first, second = restart_records(2)
    calm = {**effect, "loss_after": 2.75, "hurt": False}
    write_lines(run_folder / "restarts.jsonl", [{**first, **calm}, {**second, **effect}])
    text = Page(write_report(run_folder)).text
    assert f"Restart 2, after step {second['step']}, hurt: the loss was 3.0000 before it and 3.5000" in text
    assert "-0.2500 nat" in text and "+0.5000 nat, hurt" in text and "Restart 1, after" not in text


def test_values_of_wrong_kinds_are_taken_as_missing(run_folder: Path) -> None:
    wrong: list[object] = ["1", True, None, [1], {"a": 1}, 10**400]
    rows = [
        {"step": step, "tokens": 10 * step, "train/loss": value, "lr": value, "phase": value}
        for step, value in enumerate(wrong, start=1)
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_folder / "restarts.jsonl").write_text(
        '{"step": 3, "restart_index": "x", "layers": 5}\n{"step": 4, "layers": [1, {"name": null}]}\n'
    )
    (run_folder / "summary.json").write_text('{"switch": 3, "ranks": [], "sample": 1, "versions": "new"}')
    assert Page(write_report(run_folder)).headings[0] == "Training"


def test_data_is_escaped_everywhere(run_folder: Path) -> None:
    evil = "</pre><script>alert('x')</script><b onclick=\"y\">&\x1b[31m\u202e"
    told = summary() | {"sample": evil, "method": evil, "strategy": evil, "versions": {evil: evil}}
    (run_folder / "summary.json").write_text(json.dumps(told))
    (run_folder / "recipe.toml").write_text(RECIPE.replace('"quickstart"', json.dumps(evil)))
    write_lines(run_folder / "restarts.jsonl", restart_records(kinds=(evil, "$x_{")))
    page = Page(write_report(run_folder))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script" not in page.source
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    assert "\\x1b[31m\\u202e" in page.text


def test_lone_surrogate_in_the_sample_is_written_as_text(run_folder: Path) -> None:
    (run_folder / "summary.json").write_text(json.dumps(summary() | {"sample": "a\ud800b"}))
    assert "a\\ud800b" in Page(write_report(run_folder)).text


def test_long_run_with_many_restarts_stays_small(run_folder: Path) -> None:
    base = metric_records()
    records = [base[i % len(base)] | {"step": i + 1, "tokens": (i + 1) * 10_000} for i in range(6_000)]
    write_lines(run_folder / "metrics.jsonl", records)
    restarts = [record | {"step": 100 * record["restart_index"]} for record in restart_records(100)]
    write_lines(run_folder / "restarts.jsonl", restarts)
    assert write_report(run_folder).stat().st_size < 1_500_000


def test_figures_are_well_formed_and_described(run_folder: Path) -> None:
    source = write_report(run_folder).read_text()
    for drawing in re.findall(r"<svg.*?</svg>", source, flags=re.S):
        root = ElementTree.fromstring(drawing)
        title, description = list(root)[:2]
        assert (title.tag, description.tag) == tuple(
            f"{{http://www.w3.org/2000/svg}}{t}" for t in ("title", "desc")
        )
        assert title.text
        assert description.text


def test_replaced_as_a_whole_and_nothing_left_beside_it(run_folder: Path) -> None:
    names = {path.name for path in run_folder.iterdir()}
    write_report(run_folder)
    write_report(run_folder)
    assert {path.name for path in run_folder.iterdir()} == names | {"report.html"}


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_drawing_warns_of_nothing(run_folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(run_folder)
        bare = tmp_path / "bare"
        bare.mkdir()
        shutil.copy(run_folder / "restarts.jsonl", bare)
        (bare / "metrics.jsonl").write_text('{"step": 1, "tokens": 0}\n')
        write_report(bare)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "up_proj"),
        ("net.0", "net"),
        ("w", "w"),
        ("0", "0"),
        ("a.experts.1.w1", "w1"),
    ],
)
def test_layers_of_one_kind_share_a_name(name: str, kind: str) -> None:
    assert layer_kind(name) == kind


def test_delta_norms_are_means_by_kind_and_the_smallest_kinds_are_joined() -> None:
    restarts = [
        {
            "restart_index": 1,
            "layers": [
                {"name": f"h.{block}.w{kind}", "delta_norm": kind + block}
                for kind in range(4)
                for block in (0, 1)
            ],
        },
        {"restart_index": 2, "layers": [{"name": "h.0.w3", "delta_norm": 8.0}]},
        {"restart_index": 3},
    ]
    index, norms = delta_norms(restarts, most=3)
    assert index == [1, 2]
    assert list(norms) == ["w3", "w2", "other"]
    assert norms["w3"] == [3.5, 8.0]
    assert norms["w2"][0] == 2.5
    assert norms["other"][0] == 1.0
    assert math.isnan(norms["other"][1])
