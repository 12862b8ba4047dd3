"""How the gap to full rank moves with size, tokens and rank: a law fitted to results, and its plot.

    python experiments/law.py [--plot experiments/law-128/results/law.svg]

Seed by seed, by least squares over all sizes and lengths, with P the parameters outside embeddings and
head and D the tokens:

    loss - loss of full rank = a + b ln(P / 1e6) + c ln(D / 5e6)

and at one size and length the slope in ln(rank). A coefficient is the mean of the seeds', its interval
Student's t over them (95 %). That is the uncertainty of other seeds; the largest residual of the means tells
how far three terms are from the truth, and no interval knows what lies beyond the sizes and lengths run.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from committed import HERE, final_cells, over_seeds

STUDIES = ("law-64", "law-128", "main-3x-prose")
LENGTHS = ("2.5 M tokens", "7.5 M tokens")
ARMS = ("beyond", "muon-in-place")
UNIT_PARAMETERS, UNIT_TOKENS = 1e6, 5e6
RANK_STUDY, RANKS = "law-128", (16, 32, 64)
RANK_ARMS = [f"beyond rank={rank}" for rank in RANKS]
NAMES = {(RANK_STUDY, "beyond"): RANK_ARMS[1]}
"""Arms that a study calls otherwise."""
EXTRAPOLATED = ((10e6, 7.5e6), (100e6, 2e9))
"""Parameters and tokens to which the law is drawn out, with the caution that it deserves."""

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Point:
    """One size and length."""

    parameters: float
    tokens: float
    gaps: BySeed


def named(study: str, arm: str) -> str:
    """Return what a study calls an arm."""
    return NAMES.get((study, arm), arm)


def gaps(study: str, arm: str, length: str) -> BySeed:
    """Return an arm's loss over full rank's, by seed."""
    full, mine = final_cells(study, "full", length), final_cells(study, arm, length)
    assert is_whole(study, arm, length), (study, arm, length, sorted(mine), sorted(full))
    return {seed: cell["loss"] - full[seed]["loss"] for seed, cell in mine.items()}


def is_whole(study: str, arm: str, length: str) -> bool:
    """Return whether an arm has run on full rank's seeds, three or more."""
    if not (HERE / study / "results" / "study.json").is_file():
        return False
    full, mine = final_cells(study, "full", length), final_cells(study, arm, length)
    return len(mine) >= 3 and mine.keys() == full.keys()


def whole_studies(arm: str) -> list[str]:
    """Return the studies in which an arm has run at every length."""
    return [
        study for study in STUDIES if all(is_whole(study, named(study, arm), length) for length in LENGTHS)
    ]


def fitted_arms() -> list[str]:
    """Return the arms that have run at more than one size."""
    return [arm for arm in ARMS if len(whole_studies(arm)) > 1]


def outside(study: str) -> int:
    """Return the parameters of a study's model outside embeddings and head."""
    cell = final_cells(study, "full", LENGTHS[0])[0]
    recipe = cell["recipe"]
    return int(cell["parameters_total"]) - 2 * recipe["model.hidden_size"] * recipe["data.vocab_size"]


def points(arm: str) -> list[Point]:
    """Return an arm's gaps at every length of the sizes it has run at."""
    return [
        Point(
            outside(study),
            final_cells(study, "full", length)[0]["tokens"],
            gaps(study, named(study, arm), length),
        )
        for study in whole_studies(arm)
        for length in LENGTHS
    ]


def terms(parameters: float, tokens: float) -> list[float]:
    """Return what the coefficients multiply."""
    return [1.0, math.log(parameters / UNIT_PARAMETERS), math.log(tokens / UNIT_TOKENS)]


def fitted(measured: Sequence[Point]) -> dict[int, np.ndarray]:
    """Return a, b and c of each seed."""
    design = np.array([terms(point.parameters, point.tokens) for point in measured])
    seeds = sorted(set.intersection(*(set(point.gaps) for point in measured)))
    found = {}
    for seed in seeds:
        values = np.array([point.gaps[seed] for point in measured])
        found[seed] = np.linalg.lstsq(design, values, rcond=None)[0]
    return found


def foretold(law: Mapping[int, np.ndarray], parameters: float, tokens: float) -> BySeed:
    """Return the gap by each seed's law."""
    return {seed: float(np.dot(terms(parameters, tokens), found)) for seed, found in law.items()}


def end_of_lead(law: Mapping[int, np.ndarray], parameters: float) -> str:
    """Return at how many tokens the law puts the gap at 0, by mean and interval of their logarithms over
    seeds; or that by some seed there is no such number.
    """
    by_tokens = {seed: float(found[2]) for seed, found in law.items()}
    if min(by_tokens.values()) <= 0:
        return "nowhere by every seed"
    leads = foretold(law, parameters, UNIT_TOKENS)
    found = over_seeds({seed: -leads[seed] / by_tokens[seed] for seed in law})
    mean, low, high = (math.exp(end) * UNIT_TOKENS / 1e6 for end in (found.mean, found.low, found.high))
    return f"at {mean:.0f} M tokens ({low:,.0f} to {high:,.0f})"


def largest_residual(measured: Sequence[Point], law: Mapping[int, np.ndarray]) -> float:
    """Return how far the mean of the gaps lies from the law at worst, with its sign."""
    residuals = []
    for point in measured:
        told = foretold(law, point.parameters, point.tokens)
        residuals.append(sum(point.gaps[seed] - told[seed] for seed in told) / len(told))
    return max(residuals, key=abs)


def rank_slopes() -> BySeed:
    """Return by seed how the gap moves with ln(rank)."""
    by_rank = [gaps(RANK_STUDY, arm, LENGTHS[0]) for arm in RANK_ARMS]
    logs = np.log(RANKS)
    return {seed: float(np.polyfit(logs, [found[seed] for found in by_rank], 1)[0]) for seed in by_rank[0]}


def in_words(values: BySeed) -> str:
    """Return mean and interval over seeds."""
    found = over_seeds(values)
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def draw(path: Path) -> None:
    """Draw each arm's gaps against tokens, a line of the law for each size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colors = ("#c7781b", "#1f6fb4", "#7a4fa3")
    with rc_context({"svg.hashsalt": "law", "svg.fonttype": "none", "font.size": 10}):
        arms = fitted_arms()
        figure = Figure(figsize=(1 + 3.5 * len(arms), 4), layout="constrained")
        for axes, arm in zip(figure.subplots(1, len(arms), sharey=True, squeeze=False)[0], arms, strict=True):
            measured = points(arm)
            law = fitted(measured)
            sizes = sorted({point.parameters for point in measured})
            tokens_run = [point.tokens for point in measured]
            lengths = np.geomspace(min(tokens_run), max(tokens_run), 20)
            for size, color in zip(sizes, colors, strict=True):
                told = [over_seeds(foretold(law, size, tokens)) for tokens in lengths]
                axes.plot(lengths, [t.mean for t in told], color=color, label=f"{size / 1e6:.2f} M")
                lows, highs = [t.low for t in told], [t.high for t in told]
                axes.fill_between(lengths, lows, highs, color=color, alpha=0.1, lw=0)
                for point in (p for p in measured if p.parameters == size):
                    values = list(point.gaps.values())
                    axes.plot([point.tokens] * len(values), values, "o", ms=3, color=color, alpha=0.6)
            axes.axhline(0, color="#333333", lw=1)
            axes.set_xscale("log")
            axes.set(xlabel="tokens", title=arm)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set(ylabel="held-out loss over full rank's by AdamW, nat")
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            title="parameters outside embeddings and head",
        )
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the laws, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    print("| arm | at 1 M parameters, 5 M tokens | per factor e of parameters | of tokens | worst residual |")
    print("|---|---|---|---|---|")
    arms = fitted_arms()
    for arm in arms:
        measured = points(arm)
        law = fitted(measured)
        parts = [in_words({seed: float(found[i]) for seed, found in law.items()}) for i in range(3)]
        print(f"| {arm} | {' | '.join(parts)} | {largest_residual(measured, law):+.3f} |")
        both = in_words({seed: float(found[1] + found[2]) for seed, found in law.items()})
        print(f"  per factor e of both, tokens a parameter as they are: {both}")
        print(f"  gone, at {UNIT_PARAMETERS / 1e6:g} M parameters: {end_of_lead(law, UNIT_PARAMETERS)}")
        for parameters, tokens in EXTRAPOLATED:
            told = in_words(foretold(law, parameters, tokens))
            print(f"  drawn out to {parameters / 1e6:g} M parameters, {tokens / 1e6:g} M tokens: {told}")
    for arm in ARMS:
        missing = [study for study in STUDIES if study not in whole_studies(arm)]
        if missing:
            print(f"{arm}: {', '.join(missing)} not whole yet")
    if all(is_whole(RANK_STUDY, arm, LENGTHS[0]) for arm in RANK_ARMS):
        print(f"\nbeyond, per factor e of rank ({RANK_STUDY}, {RANKS}): {in_words(rank_slopes())}")
    else:
        print(f"\nranks {RANKS} of {RANK_STUDY}: not all run yet")
    if arguments.plot:
        assert arms, "no arm has run at more than one size"
        draw(arguments.plot)


if __name__ == "__main__":
    main()
