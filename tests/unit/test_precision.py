"""Which precision "auto" is."""

import pytest
import torch

from relora.train import precision
from relora.train.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("speeds", "chosen", "sizes"),
    [
        ([0.02], "fp32", [128]),
        ([0.9, 1.2], "fp32", [128, 512]),
        ([0.9, 2.0], "bf16", [128, 512]),
    ],
)
def test_products_of_emulated_bf16_are_not_waited_for(
    speeds: list[float], chosen: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[int] = []

    def speed(size: int) -> float:
        raced.append(size)
        return speeds[len(raced) - 1]

    monkeypatch.setattr(precision, "_bf16_speed", speed)
    resolved, why = resolve_precision("auto", CPU)
    assert (resolved, raced) == (chosen, sizes)
    assert f"{speeds[-1]:.1f}x" in why


def test_the_race_is_run_here_and_a_recipe_has_the_last_word() -> None:
    resolved, why = resolve_precision("auto", CPU)
    assert resolved in {"fp32", "bf16"} and "measured" in why
    assert resolve_precision("bf16", CPU)[0] == "bf16"
