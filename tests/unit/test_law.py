"""The law of the gap: what it was made of comes out again, and what it cannot say is said."""

import numpy as np
import pytest

from experiment_scripts import experiment_script

SIZES, LENGTHS = (2.6e5, 1e6, 3.1e6), (2.5e6, 7.5e6)
TRUE = {0: (-0.1, 0.02, -0.03), 1: (-0.12, 0.01, -0.02), 2: (-0.11, 0.03, -0.04)}


@pytest.fixture(scope="module")
def law():
    return experiment_script("law")


def made(law, *, bend=0.0):
    return [
        law.Point(
            size,
            tokens,
            {
                seed: float(np.dot(law.terms(size, tokens), abc)) + bend * (size == 1e6)
                for seed, abc in TRUE.items()
            },
        )
        for size in SIZES
        for tokens in LENGTHS
    ]


def test_the_coefficients_of_each_seed_come_out_again(law):
    measured = made(law)
    found = law.fitted(measured)
    for seed, abc in TRUE.items():
        np.testing.assert_allclose(found[seed], abc, atol=1e-12)
    assert law.largest_residual(measured, found) == pytest.approx(0, abs=1e-12)
    # At the units both logarithms are 0.
    at_units = law.foretold(found, law.UNIT_PARAMETERS, law.UNIT_TOKENS)
    assert at_units == pytest.approx({seed: abc[0] for seed, abc in TRUE.items()})
    larger = law.foretold(found, np.e * law.UNIT_PARAMETERS, law.UNIT_TOKENS)
    assert {seed: larger[seed] - at_units[seed] for seed in TRUE} == pytest.approx(
        {seed: abc[1] for seed, abc in TRUE.items()}
    )


def test_the_end_of_a_lead_is_where_its_law_puts_it(law):
    shrinking = {seed: np.array([-0.1, -0.02, 0.05 + 0.01 * seed]) for seed in range(3)}
    # -0.1 + c ln(D / 5e6) = 0, by the mean of 0.1 / c over the seeds.
    mean = np.exp(np.mean([0.1 / 0.05, 0.1 / 0.06, 0.1 / 0.07])) * 5
    assert law.end_of_lead(shrinking, 1e6).startswith(f"at {mean:.0f} M tokens (")
    assert law.end_of_lead(TRUE, 1e6) == "nowhere by every seed"


def test_what_is_no_such_law_is_seen_in_the_residual(law):
    measured = made(law, bend=0.3)
    assert law.largest_residual(measured, law.fitted(measured)) > 0.1


def test_only_seeds_that_every_point_has_are_fitted(law):
    measured = made(law)
    measured[0] = law.Point(SIZES[0], LENGTHS[0], {1: measured[0].gaps[1]})
    assert list(law.fitted(measured)) == [1]


def test_gaps_and_sizes_are_those_of_a_committed_study(law):
    # 5 layers of 224 with 608 between, of LLaMA, and their norms.
    assert law.outside("main-3x-prose") == 5 * (4 * 224**2 + 3 * 224 * 608) + 11 * 224
    table = (law.Path(law.__file__).parent / "main-3x-prose" / "results" / "table.md").read_text()
    for length in law.LENGTHS:
        told = table.partition(f"## {length}")[2]
        (row,) = [line for line in told.partition("\n## ")[0].splitlines() if line.startswith("| beyond |")]
        found = law.over_seeds(law.gaps("main-3x-prose", "beyond", length))
        assert f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" in row


def test_an_arm_is_whole_with_three_of_full_ranks_seeds(law, monkeypatch):
    assert law.is_whole("main-3x-prose", "beyond", law.LENGTHS[0])
    assert not law.is_whole("main-3x-prose", "nobody", law.LENGTHS[0])
    assert not law.is_whole("no-such-study", "beyond", law.LENGTHS[0])
    monkeypatch.setattr(law, "STUDIES", ("law-64", "main-3x-prose"))
    assert "beyond" in law.fitted_arms()
    monkeypatch.setitem(law.NAMES, ("law-64", "beyond"), "nobody")
    assert law.whole_studies("beyond") == ["main-3x-prose"] and "beyond" not in law.fitted_arms()


def test_the_picture_has_a_line_for_each_size(law, tmp_path, monkeypatch):
    monkeypatch.setattr(law, "fitted_arms", lambda: ["beyond"])
    monkeypatch.setattr(law, "points", lambda arm: made(law))
    law.draw(tmp_path / "law.svg")
    drawn = (tmp_path / "law.svg").read_text()
    assert all(f"{size / 1e6:.2f} M<" in drawn for size in SIZES)
