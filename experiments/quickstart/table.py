"""Print the quickstart's tables from results.json, and draw its plot.

    python experiments/quickstart/table.py [--plot docs/quickstart.svg]

Ratios are of held-out perplexities, paired by seed with full rank at its best learning rate; plus or minus is
the standard deviation over seeds.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean

from relora.lab.statistics import paired_difference, spread

RESULTS = Path(__file__).parent / "results.json"
NAMES = {
    "full": "full rank",
    "lora": "LoRA after the same warm start",
    "relora-both": "ReLoRA, both factors (the paper's form)",
    "relora-B": "ReLoRA, one-sided (factors B, matched scale)",
    "relora-B-columns": "the same, lora_A selecting inputs, moments carried",
    "relora-sign": "ReLoRA, one-sided, sign step on the complement",
    "relora-cold": "ReLoRA, sign step, from cold: no warm start",
    "relora-columns": "that, lora_A selecting inputs, moments carried",
    "relora-muon": "ReLoRA, Muon's step on the complement, from cold",
    "relora-muon-warm": "the same after the warm start",
    "full-muon": "full rank by Muon",
    "muon-in-place": "full rank by Muon in place, 2 bytes a weight",
}
COLORS = {
    "lora": "#999999",
    "relora-both": "#c7781b",
    "relora-B": "#1f6fb4",
    "relora-sign": "#2a9d55",
    "relora-cold": "#7a4fa3",
    "relora-muon": "#c2255c",
    "full-muon": "#111111",
    "muon-in-place": "#5c5f66",
}


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    cells = json.loads(RESULTS.read_text())["cells"]
    print("## Sweep (seed 0)\n\n| arm | settings | held-out loss | perplexity |\n|---|---|---|---|")
    for cell in sorted((c for c in cells if c["seed"] == 0), key=lambda c: (c["arm"], c["eval/loss"])):
        settings = cell["cell"].removeprefix(f"{cell['arm']}-").removesuffix("-s0")
        print(f"| {cell['arm']} | {settings} | {cell['eval/loss']:.4f} | {cell['eval/perplexity']:.2f} |")
    best = chosen(cells)
    print("\n## At the chosen settings\n\n| arm | seeds | perplexity | over full rank |\n|---|---|---|---|")
    for arm, runs in best.items():
        perplexities = [math.exp(cell["eval/loss"]) for cell in runs]
        print(
            f"| {NAMES[arm]} | {len(runs)} | {in_words(perplexities)} | "
            f"{in_words(ratios(runs, best['full']), digits=3)} |"
        )
    print("\n## Every setting with several seeds, paired by seed\n")
    print("| settings | over full rank, by seed | mean | nat over full rank, 95 % | nat over LoRA, 95 % |")
    print("|---|---|---|---|---|")
    for name, runs in comparable(cells, best["full"]).items():
        if len(runs) > 1:
            over = ratios(runs, best["full"])
            by_seed = ", ".join(f"{ratio:.3f}" for ratio in over)
            intervals = " | ".join(interval(runs, best[base]) for base in ("full", "lora"))
            print(f"| {name} | {by_seed} | {in_words(over, digits=3)} | {intervals} |")
    if arguments.plot:
        draw(best, arguments.plot)


def chosen(cells: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each arm at its best settings, all seeds.

    Seed 0 nominates settings for more seeds; of those with the most seeds the least mean loss wins. Only
    settings at full rank's best rate of embeddings, head and norms: it outweighs the method.
    """
    best: dict[str, list[dict]] = {}
    for arm in NAMES:
        mine = [cell for cell in cells if cell["arm"] == arm]
        by_settings = comparable(mine, best.get("full", mine))
        if by_settings:
            best[arm] = min(
                by_settings.values(), key=lambda runs: (-len(runs), mean(c["eval/loss"] for c in runs))
            )
    return best


def comparable(cells: list[dict], full: list[dict]) -> dict[str, list[dict]]:
    """Return the runs of each setting, by its name; of full rank all, of others those at its rest rate."""
    found: dict[str, list[dict]] = {}
    for cell in cells:
        if cell["arm"] == "full" or rest_rate(cell) == rest_rate(full[0]):
            found.setdefault(cell["cell"].rpartition("-s")[0], []).append(cell)
    return found


def rest_rate(cell: dict) -> object:
    """Return the multiples of the learning rate for embeddings, head and norms."""
    return cell["overrides"]["optim"].get("rest_lr_multiples")


def losses(runs: list[dict]) -> dict[int, float]:
    """Return held-out losses by seed."""
    return {cell["seed"]: cell["eval/loss"] for cell in runs}


def ratios(runs: list[dict], base: list[dict]) -> list[float]:
    """Return the ratios of perplexities, of the seeds that both have, in their order."""
    mine, theirs = losses(runs), losses(base)
    return [math.exp(mine[seed] - theirs[seed]) for seed in sorted(mine) if seed in theirs]


def interval(runs: list[dict], base: list[dict]) -> str:
    """Return the mean difference of the loss and its confidence interval in words."""
    found = paired_difference(losses(runs), losses(base))
    assert found is not None and found.low is not None and found.high is not None
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def in_words(values: list[float], *, digits: int = 2) -> str:
    """Return mean and standard deviation in words."""
    found = spread(values)
    deviation = "" if found.sd is None else f" +- {found.sd:.{digits}f}"
    return f"{found.mean:.{digits}f}{deviation}"


def behind(cell: dict, full: dict) -> dict[int, float]:
    """Return by step how many nat a run's held-out loss lies above full rank's of the same seed."""
    reference = dict(full["curve"])
    return {step: loss - reference[step] for step, loss in cell["curve"] if step in reference}


def draw(best: dict[str, list[dict]], path: Path) -> None:
    """Draw against steps how far each arm lies from full rank: the mean over seeds, and their range."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    full = {cell["seed"]: cell for cell in best["full"]}
    with rc_context({"svg.hashsalt": "quickstart", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="#333333", lw=1.4, label="tuned full rank")
        for arm, color in COLORS.items():
            runs = [behind(cell, full[cell["seed"]]) for cell in best[arm]]
            steps = sorted(set.intersection(*map(set, runs)))
            ends = [[run[step] for run in runs] for step in steps]
            axes.plot(steps, [mean(end) for end in ends], color=color, lw=1.6, label=NAMES[arm])
            axes.fill_between(
                steps, [min(end) for end in ends], [max(end) for end in ends], color=color, alpha=0.13, lw=0
            )
        axes.axvline(120, color="#bbbbbb", lw=1, ls=":")
        axes.annotate("switch", (123, 0.93), xycoords=("data", "axes fraction"), color="#777777")
        axes.set(xlabel="step (4,096 tokens each)", ylabel="held-out loss over full rank's, nat")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
