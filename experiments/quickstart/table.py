"""Print the tables of the quickstart's older sweep, from before `relora compare`, from results.json.

    python experiments/quickstart/table.py

Its cells were trained by scripts that are gone (last at commit f671199), their settings chosen without a
tuning split: raw results for the entries of experiments/LOG.md that name them. experiments/warm-muon has
taken its place.

Ratios are of held-out perplexities, paired by seed with full rank at its best learning rate; plus or minus is
the standard deviation over seeds.
"""

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


def main() -> None:
    """Print."""
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


if __name__ == "__main__":
    main()
