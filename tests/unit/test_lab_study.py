"""Studies as values: reading them strictly, what they come to, what wins, and the statistics of a table."""

import math
import os
import statistics
import tomllib
from pathlib import Path

import pytest

from relora.errors import ConfigError
from relora.lab.cell_files import CellFiles
from relora.lab.choice import Tried, beyond, choose
from relora.lab.compare import dry_run
from relora.lab.gather import thinned
from relora.lab.plan import Outcome, Planner, predicted, wanted_cells
from relora.lab.processes import Launcher, start
from relora.lab.results import arm_results
from relora.lab.statistics import paired_difference, spread, t_quantile
from relora.lab.study import Budget, recipe_fields
from relora.lab.study_file import build_study, read_study
from relora.lab.table import cautions, markdown
from relora.lab.values import like, settled

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

SMALL = """
[study]
name = "small"
steps = 100
seeds = [0, 1, 2]
references = ["full"]

[set]
train.precision = "fp32"
relora.rank = 4
relora.warm_start_steps = "25%"
relora.restart_every = "10%"
schedule.warmup_steps = "10%"
schedule.rewarmup_steps = 2

[methods.full.grid]
optim.lr = [1e-3, 2e-3, 4e-3]

[methods.low]
method = "relora"
inherit = "full"
set = { optim.low_rank_lr = "0.5x" }
grid = { optim.factor_lr = ["1x", "2x"] }
vary = { relora.rank = [4, 8] }
"""


def study_of(text: str, **changes: str):
    for old, new in changes.items():
        text = text.replace(old, new)
    return build_study(tomllib.loads(text), source=text, subject="study", beside=Path())


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        study_of(text)
    return str(caught.value)


def test_precision_that_each_cell_would_measure_for_itself_is_refused():
    said = complaint(SMALL.replace('train.precision = "fp32"', ""))
    assert 'train.precision must be "fp32" or "bf16" in a study, not "auto"' in said


# Statistics

# Student's t table, two-sided 95 %: as printed in every textbook.
T_TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423}


@pytest.mark.parametrize("degrees", T_TABLE)
def test_t_quantiles_are_those_of_the_printed_table(degrees):
    assert t_quantile(0.975, degrees) == pytest.approx(T_TABLE[degrees], abs=6e-5)


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
def test_t_quantiles_have_their_closed_forms_for_one_and_two_degrees(probability):
    centred = 2 * probability - 1
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * centred / 2), rel=1e-9)
    assert t_quantile(probability, 2) == pytest.approx(centred * math.sqrt(2 / (1 - centred**2)), rel=1e-9)
    assert t_quantile(probability, 10**6) == pytest.approx(
        statistics.NormalDist().inv_cdf(probability), rel=1e-4
    )


def test_paired_difference_goes_by_seed_and_has_the_textbook_interval():
    mine, reference = {0: 3.10, 1: 3.32, 2: 3.18, 7: 9.0}, {2: 3.00, 1: 3.20, 0: 3.00, 5: 1.0}
    found = paired_difference(mine, reference)
    differences = [0.10, 0.12, 0.18]
    mean, sd = statistics.mean(differences), statistics.stdev(differences)
    half = 4.302653 * sd / math.sqrt(3)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(mean), pytest.approx(sd))
    assert (found.low, found.high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert found.is_clear


def test_a_single_pair_has_no_interval_and_no_pair_no_difference():
    single = paired_difference({0: 2.0}, {0: 1.5})
    assert (single.mean, single.low, single.is_clear) == (0.5, None, False)
    assert paired_difference({0: 2.0}, {1: 1.5}) is None
    assert spread([2.0]).sd is None


# Values and choices


def test_multiples_of_the_rate_and_shares_of_the_length_are_settled():
    given = {"optim.factor_lr": "4x", "relora.warm_start_steps": "12.5%", "run.name": "4x", "optim.lr": 2}
    assert settled(given, lr=0.002, steps=200) == {
        "optim.factor_lr": 0.008,
        "relora.warm_start_steps": 25,
        "run.name": "4x",
        "optim.lr": 2,
    }


def test_extensions_keep_the_form_of_the_value():
    assert like("2x", 8) == "8x" and like("25%", 50) == "50%"
    assert like(3, 5.6) == 6 and like(0.1, 0.2) == 0.2
    assert like([16.0, 16.0], 32) == [32.0, 32.0]


def tried(axis: str, losses: dict) -> list[Tried]:
    return [Tried(settings={axis: value}, loss=loss) for value, loss in losses.items()]


def test_winner_inside_its_grid_is_no_edge():
    choice = choose(tried("optim.lr", {1e-3: 3.0, 2e-3: 2.9, 4e-3: 3.1}))
    assert choice.winner.settings == {"optim.lr": 2e-3} and choice.edges == ()


@pytest.mark.parametrize(
    ("losses", "further"),
    [({1e-3: 3.0, 2e-3: 2.9}, 4e-3), ({1e-3: 2.8, 2e-3: 2.9}, 5e-4), ({"1x": 3.0, "4x": 2.0}, "16x")],
)
def test_winner_on_the_edge_is_told_and_extended_as_far_again(losses, further):
    points = tried("optim.lr", losses)
    choice = choose(points)
    assert choice.edges == ("optim.lr",)
    assert beyond(choice, points, axes={"optim.lr"}) == [{"optim.lr": further}]
    assert beyond(choice, points, axes=set()) == []


def test_three_multiples_that_are_one_number_are_extended_together_and_others_are_no_scale():
    axis = "optim.rest_lr_multiples"
    points = [Tried(settings={axis: [value] * 3}, loss=1 / value) for value in (16.0, 32.0)]
    assert beyond(choose(points), points, axes={axis}) == [{axis: [64.0] * 3}]
    points.append(Tried(settings={axis: [16.0, 32.0, 1.0]}, loss=0.0))
    assert choose(points).edges == ()


def test_a_diverged_neighbour_bounds_the_grid_and_all_diverged_have_no_winner():
    assert choose(tried("optim.lr", {1e-3: 3.0, 2e-3: 2.9, 4e-3: math.inf})).edges == ()
    assert choose(tried("optim.lr", {1e-3: math.inf})) is None


def test_values_without_an_order_have_no_edge_and_zero_is_a_natural_one():
    assert choose(tried("relora.reset", {"zero": 3.0, "none": 2.0})).edges == ()
    points = tried("schedule.rewarmup_steps", {0: 2.0, 10: 3.0})
    assert choose(points).edges == ()
    points = tried("schedule.rewarmup_steps", {0: 3.0, 10: 2.0})
    assert choose(points).edges and beyond(choose(points), points, axes={"schedule.rewarmup_steps"}) == []


# Reading


def test_study_becomes_arms_in_order_with_their_references():
    study = study_of(SMALL)
    assert [arm.name for arm in study.arms] == ["full", "low rank=4", "low rank=8"]
    assert study.arms[2].references == {"full": "full"} and study.arms[2].inherit == "full"
    assert study.budgets == (Budget(steps=100),) and study.tuning_fraction == 0.05


def test_reference_that_varies_is_matched_by_what_both_vary_and_left_out_elsewhere():
    study = study_of(SMALL.replace('["full"]', '["low"]'))
    assert [arm.references for arm in study.arms] == [{}, {"low": "low rank=4"}, {"low": "low rank=8"}]


def test_everything_that_is_wrong_is_said_at_once_with_hints():
    text = complaint(
        """
        [study]
        seeeds = [1]
        steps = 10
        tokens = 10
        [tunning]
        [set]
        relora.rnk = 3
        optm.lr = 3
        run.seed = 4
        [methods.galor]
        [methods.full]
        inherit = "nobody"
        grid = { optim.lr = 3 }
        """
    )
    for wanted in (
        "study.seeeds is not a known key (did you mean 'seeds'?)",
        "study.steps or study.tokens must be given, and not both",
        "[tunning] is not a known table (did you mean 'tuning'?)",
        "set.optm is not a section of a recipe (did you mean 'optim'?)",
        "run.seed must be left out: study.seeds decides",
        "method must be one of",
        "(did you mean 'galore'?)",
        "'nobody' is no method of the study",
        "optim.lr must be a list of values, not 3",
    ):
        assert wanted in text


def test_a_recipe_that_cannot_work_is_refused_before_anything_runs():
    assert "relora.rnk is not a known key (did you mean 'relora.rank'?)" in complaint(
        SMALL.replace("relora.rank = 4\n", "relora.rnk = 4\n")
    )
    assert "relora.rank must be less than 128" in complaint(SMALL.replace("[4, 8]", "[4, 800]"))


def test_circles_of_inheritance_are_refused():
    circle = SMALL.replace(
        "[methods.full.grid]", '[methods.full]\ninherit = "low rank=4"\n[methods.full.grid]'
    )
    assert "inherit goes in a circle" in complaint(circle)


@pytest.mark.parametrize(
    ("names", "tuned", "trained"),
    [
        ((), {"full", "low rank=4", "low rank=8"}, {"full", "low rank=4", "low rank=8"}),
        (("full",), {"full"}, {"full"}),
        (("low rank=8",), {"full", "low rank=8"}, {"low rank=8"}),
        (("low",), {"full", "low rank=4", "low rank=8"}, {"low rank=4", "low rank=8"}),
    ],
)
def test_arms_are_run_with_the_tuning_of_those_they_inherit_from(names, tuned, trained):
    study = study_of(SMALL)
    is_wanted = wanted_cells(study, names)
    cells = [cell for cell in predicted(study, Path("cells")) if is_wanted(cell)]
    assert {cell.arm for cell in cells if cell.stage == "tuning"} == tuned
    assert {cell.arm for cell in cells if cell.stage == "final"} == trained


def test_arms_that_are_not_there_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"study small has no arm 'ful' \(did you mean 'full'\?\)"):
        wanted_cells(study_of(SMALL), ["low", "ful"])


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/study*.toml")), ids=lambda path: path.parent.name)
def test_committed_study_is_valid_and_has_three_seeds(path):
    study = read_study(path)
    assert len(study.seeds) >= 3 or study.name == "smoke"
    assert predicted(study, Path("cells"))


# Planning


def cells_of(plan, stage):
    return [cell for cell in plan.cells if cell.stage == stage]


def test_plan_grows_with_what_is_known_and_inherits_the_winner():
    planner = Planner(study_of(SMALL), Path("cells"))
    first = planner.plan({})
    assert [cell.swept["optim.lr"] for cell in first.cells] == [1e-3, 2e-3, 4e-3]
    assert {cell.stage for cell in first.cells} == {"tuning"} and {cell.seed for cell in first.cells} == {
        1000
    }
    outcomes = {
        cell.name: Outcome(loss=loss) for cell, loss in zip(first.cells, (3.0, 2.0, 2.5), strict=True)
    }
    second = planner.plan(outcomes)
    low = [cell for cell in cells_of(second, "tuning") if cell.arm == "low rank=8"]
    assert [cell.recipe.optim.factor_lr for cell in low] == [2e-3, 4e-3]
    assert all(cell.recipe.optim.low_rank_lr == 1e-3 and cell.recipe.relora.rank == 8 for cell in low)
    assert all(cell.recipe.eval.split == "tuning" for cell in cells_of(second, "tuning"))
    final = cells_of(second, "final")
    assert [cell.seed for cell in final] == [0, 1, 2] and {cell.recipe.optim.lr for cell in final} == {2e-3}
    assert all(cell.recipe.eval.split == "heldout" for cell in final)
    assert all(cell.recipe.data.tuning_fraction == 0.05 for cell in second.cells)


def test_grids_are_extended_as_often_as_asked():
    planner = Planner(study_of(SMALL + "[tuning]\nextend = 2\n"), Path("cells"))
    outcomes: dict[str, Outcome] = {}
    rates = []
    for _ in range(4):
        full = [
            cell for cell in planner.plan(outcomes).cells if cell.arm == "full" and cell.stage == "tuning"
        ]
        rates.append(max(cell.swept["optim.lr"] for cell in full))
        outcomes |= {cell.name: Outcome(loss=1 / cell.swept["optim.lr"]) for cell in full}
    assert rates == [4e-3, 8e-3, 1.6e-2, 1.6e-2]


def test_axes_are_swept_one_after_the_other_at_what_won_before():
    grid = 'grid = { optim.factor_lr = ["1x", "2x", "4x"], optim.low_rank_lr = ["0.5x", "2x"] }'
    text = SMALL.replace('grid = { optim.factor_lr = ["1x", "2x"] }', grid)
    text = text.replace('set = { optim.low_rank_lr = "0.5x" }', "").replace(
        "relora.rank = [4, 8]", "relora.rank = [4]"
    )
    planner = Planner(study_of(text + '[tuning]\nsearch = "axes"\nextend = 1\n'), Path("cells"))

    def loss(cell) -> float:
        """Least at a factor rate of 2x, and at a rest rate of 4x, where the sweep has to be extended to."""
        factor, rest = (cell.swept.get(f"optim.{name}", "1x") for name in ("factor_lr", "low_rank_lr"))
        return abs(math.log2(float(factor[:-1])) - 1) + abs(math.log2(float(rest[:-1])) - 2) / 4

    outcomes: dict[str, Outcome] = {}
    order = []
    while new := [cell for cell in planner.plan(outcomes).cells if cell.name not in outcomes]:
        outcomes |= {cell.name: Outcome(loss=loss(cell)) for cell in new}
        order.append([cell.swept for cell in new if cell.arm == "low rank=4"])
    axes = [
        [(point.get("optim.factor_lr"), point.get("optim.low_rank_lr")) for point in step] for step in order
    ]
    assert [step for step in axes if step] == [
        [("1x", None), ("2x", None), ("4x", None)],
        [("2x", "0.5x"), ("2x", "2x")],
        [("2x", "8x")],
        [("2x", "2x")] * 3,  # the final runs: 8x is as far from the optimum, and was tried later
    ]


def test_axis_with_one_value_is_a_setting_of_every_run_of_the_arm():
    text = SMALL.replace(
        'grid = { optim.factor_lr = ["1x", "2x"] }',
        'grid = { optim.factor_lr = ["1x", "4x"], relora.alpha = [2.0] }',
    )
    planner = Planner(study_of(text + '[tuning]\nsearch = "axes"\n'), Path("cells"))
    first = planner.plan({})
    outcomes = {cell.name: Outcome(loss=1.0) for cell in first.cells}
    low = [
        cell for cell in planner.plan(outcomes).cells if cell.stage == "tuning" and cell.arm == "low rank=4"
    ]
    assert all(cell.recipe.relora.alpha == 2.0 for cell in low) and len(low) == 2


def test_arms_of_a_method_that_failed_are_left_out_and_said():
    planner = Planner(study_of(SMALL), Path("cells"))
    first = planner.plan({})
    plan = planner.plan({cell.name: Outcome(loss=math.inf, failure="diverged") for cell in first.cells})
    assert not cells_of(plan, "final")
    assert any("every run of its grid failed" in note for note in plan.notes)
    assert any("no run of full succeeded" in note for note in plan.notes)


def test_cells_share_a_warm_start_where_only_what_follows_the_switch_differs():
    cells = predicted(study_of(SMALL), Path("cells"))
    low = [cell for cell in cells if cell.arm != "full" and cell.stage == "final"]
    assert len(low) == 6 and len({cell.warm_start for cell in low}) == 3  # one for each seed, over both ranks
    assert all(cell.warm_start is None for cell in cells if cell.arm == "full")
    other = predicted(study_of(SMALL.replace('"25%"', '"20%"')), Path("cells"))
    assert not {cell.warm_start for cell in other} & {cell.warm_start for cell in low}


def test_several_lengths_tune_each_by_itself_or_once():
    text = SMALL.replace("steps = 100", "steps = [100, 200]")
    cells = predicted(study_of(text), Path("cells"))
    assert sum(cell.stage == "tuning" for cell in cells) == 2 * 7
    assert {cell.recipe.relora.warm_start_steps for cell in cells} == {25, 50}
    once = predicted(study_of(text + "[tuning]\nsteps = 50\n"), Path("cells"))
    assert sum(cell.stage == "tuning" for cell in once) == 7


# Tables from study.json


def final(arm: str, seed: int, loss: float) -> dict:
    return {
        **{"name": f"{arm}-{seed}", "arm": arm, "stage": "final", "budget": "100 steps", "seed": seed},
        **{"status": "finished", "loss": loss, "perplexity": math.exp(loss), "serves": ["100 steps"]},
        **{"swept": {}, "tokens": 1000, "parameters_trainable": 5_000_000},
    }


def sweep(arm: str, rate: float, loss: float) -> dict:
    return final(arm, 1000, loss) | {"name": f"{arm}-{rate}", "stage": "tuning", "swept": {"optim.lr": rate}}


def results_of(cells: list[dict]) -> dict:
    arms = [
        {"name": "full", "method": "full", "grid": {"optim.lr": [1, 2]}, "references": {"full": "full"}},
        {"name": "low", "method": "relora", "grid": {}, "references": {"full": "full"}},
    ]
    study = {
        **{"name": "s", "question": "q", "seeds": [0, 1], "tuning_seed": 1000, "references": ["full"]},
        **{"search": "grid"},
        **{"budgets": ["100 steps"], "tuning_budget": None, "arms": arms, "source": ""},
    }
    machine = {"threads_per_cell": 1}
    return {"study": study, "machine": machine, "versions": {"torch": "2"}, "notes": [], "cells": cells}


def test_table_says_mean_spread_difference_and_edge():
    cells = [sweep("full", 1, 3.0), sweep("full", 2, 2.5)]
    cells += [final("full", 0, 2.0), final("full", 1, 2.2), final("low", 0, 2.1), final("low", 1, 2.5)]
    results = results_of(cells)
    full, low = arm_results(results)
    assert full.choice.winner.settings == {"optim.lr": 2} and full.choice.edges == ("optim.lr",)
    assert low.differences["full"].mean == pytest.approx(0.2) and full.differences == {}
    table = markdown(results)
    assert "optim.lr: 1, [2] (edge of grid)" in table
    assert "2.1000 \u00b1 0.1414" in table and "+0.2000 [-1.0706, +1.4706]" in table
    assert "8.207 \u00b1 1.157 (2)" in table  # the mean of perplexities, not the perplexity of the mean
    assert any("fewer than 3 seeds: full, low" in caution for caution in cautions(results))


def test_tokens_of_the_table_count_a_shared_warm_start_once_as_the_dry_run_does():
    study = study_of(SMALL)
    trained: dict[str | None, str] = {}
    rows = []
    for cell in predicted(study, Path("cells")):
        row = final(cell.arm, cell.seed, 2.0) | {"tokens": cell.tokens, "recipe": recipe_fields(cell.recipe)}
        rows.append(row | {"warm_start_from": cell.warm_start and trained.get(cell.warm_start)})
        trained.setdefault(cell.warm_start, cell.name)
    listed = dry_run(study, Path("cells"), cores=1, threads_per_cell=1)
    assert listed["tokens"] < sum(row["tokens"] for row in rows) - 1e5  # which the table would show
    assert f"; {listed['tokens'] / 1e6:.1f} M tokens in all" in markdown(results_of(rows))


def test_devices_and_versions_of_the_cells_are_said_and_a_mixture_is_cautioned():
    here = {"device": "cpu", "versions": {"torch": "2.13"}}
    there = {"device": "GPU X", "versions": {"torch": "2.11"}}
    alike = results_of([final("full", 0, 2.0) | here, final("full", 1, 2.2) | here])
    assert ", cpu, torch 2.13. " in markdown(alike)
    assert not any("different devices" in caution for caution in cautions(alike))
    mixed = results_of([final("full", 0, 2.0) | here, final("full", 1, 2.2) | there])
    assert ", GPU X, cpu, torch 2.11 and 2.13. " in markdown(mixed)
    assert any("different devices (GPU X, cpu)" in caution for caution in cautions(mixed))
    untold = results_of([final("full", 0, 2.0), final("full", 1, 2.2) | there])
    assert any("different devices (GPU X, not recorded)" in caution for caution in cautions(untold))
    silent = results_of([final("full", 0, 2.0), final("full", 1, 2.2)])
    assert ", torch 2. " in markdown(silent)


def test_axis_that_the_recipe_won_is_told_as_such():
    axes = {"optim.lr": [1, 2], "relora.alpha": [4.0, 16.0]}
    cells = [sweep("full", 1, 3.0), sweep("full", 2, 2.5)]
    cells += [
        sweep("full", 2, 2.6) | {"name": f"full-{alpha}", "swept": {"optim.lr": 2, "relora.alpha": alpha}}
        for alpha in axes["relora.alpha"]
    ]
    results = results_of(cells)
    results["study"]["arms"][0]["grid"] = axes
    results["study"]["search"] = "axes"
    table = markdown(results)
    assert "relora.alpha: 4, 16, [as set]" in table and "one axis after the other" in table


def test_missing_and_failed_runs_are_said():
    failed = final("low", 1, 2.0) | {"status": "diverged", "failure": "diverged: loss nan"}
    notes = cautions(results_of([final("full", 0, 2.0), final("full", 1, 2.2), failed]))
    assert any("final runs not there yet: low (1)" in note for note in notes)
    assert any("low-1: diverged: loss nan" in note for note in notes)


def test_thinned_curves_keep_their_end_and_their_mean():
    points = [[float(n), float(n % 2)] for n in range(1000)]
    thin = thinned(points, most=50)
    assert len(thin) == 50 and thin[-1][0] == 999.0
    assert all(value == 0.5 for _, value in thin)
    assert thinned(points[:5], most=50) == points[:5]


# Cells that ended without finishing


def files_of_a_cell(out: Path) -> CellFiles:
    study = study_of(SMALL)
    return CellFiles(
        study.cell(study.arms[0], "final", study.budgets[0], seed=0, swept={"optim.lr": 1e-3}, out=out)
    )


def test_a_run_that_diverged_is_a_result_and_one_that_failed_otherwise_is_tried_again(tmp_path):
    files = files_of_a_cell(tmp_path)
    files.beside(".log").write_text("step 3\nrelora: step 4: loss nan; no weight was changed\nlast words\n")
    assert files.outcome() is None
    failed = files.note_end(3)
    assert not failed.is_final and "exit code 3: step 4: loss nan" in failed.failure
    assert files.outcome() is None
    diverged = files.note_end(5)
    assert diverged.is_final and diverged.loss == math.inf and files.outcome() == diverged


def test_a_failure_is_told_in_the_tracebacks_last_line_and_not_in_a_warning(tmp_path):
    files = files_of_a_cell(tmp_path)
    said = "relora: warning: slow\nTraceback (most recent call last):\n  here\nOSError: disk gone\n"
    files.beside(".log").write_text(said)
    assert files.note_end(1).failure == "exit code 1: OSError: disk gone"
    files.beside(".log").write_text("relora: warning: the cache is slow\n")
    assert files.note_end(1).failure == "exit code 1: nothing was said"


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-11, "SIGSEGV"), (-40, "signal 40")])
def test_a_cell_that_a_signal_ended_names_it(tmp_path, code, name):
    files = files_of_a_cell(tmp_path)
    files.beside(".log").write_text("step 3\n")
    assert files.note_end(code).failure == f"exit code {code}: ended by {name}; last in its log: step 3"


def test_a_failure_is_not_told_in_the_words_of_an_earlier_attempt(tmp_path):
    files = files_of_a_cell(tmp_path)
    files.beside(".log").write_text("relora: shard 3 is damaged\n")
    # An interpreter without its library ends at once.
    launcher = Launcher(threads=1, environment={"PYTHONHOME": str(tmp_path)})
    running = start(files.cell, launcher=launcher, donors=[])
    while (outcome := running.poll()) is None:
        os.sched_yield()
    launcher.close()
    assert "exit code" in outcome.failure and "shard 3" not in outcome.failure
    assert "shard 3" in files.beside(".log").read_text()


def test_a_summary_whose_loss_is_not_finite_counts_as_diverged(tmp_path):
    files = files_of_a_cell(tmp_path)
    files.run.mkdir()
    (files.run / "summary.json").write_text('{"eval/loss": NaN}')
    assert files.outcome().failure.startswith("diverged")


def test_a_cell_that_another_study_finished_before_the_lock_was_ours_is_not_started_again(tmp_path):
    files = files_of_a_cell(tmp_path)
    files.run.mkdir()
    (files.run / "summary.json").write_text('{"eval/loss": 2.5}')
    running = start(files.cell, launcher=Launcher(threads=1, environment={}), donors=[])
    assert not running.is_ours and not files.beside(".log").exists()
    assert running.poll() == Outcome(loss=2.5)
