"""ReLoRAConfig: defaults, bounds, and errors that list everything wrong at once."""

import dataclasses
import math
from typing import Any

import pytest

from relora import ConfigError, ReLoRAConfig

# DESIGN.md section 4, the table.
DEFAULTS: dict[str, Any] = {
    "rank": 128,
    "alpha": None,
    "factors": "both",
    "scaling_rule": "auto",
    "kappa": 1.0,
    "dropout": 0.0,
    "targets": "all-linear",
    "exclude": (),
    "restart_every": 1000,
    "reset": "magnitude",
    "reset_ratio": 0.99,
    "reset_mask": "coupled",
    "reset_step_count": False,
    "init": "orthonormal",
    "init_mix": 0.0,
    "residual": "none",
    "residual_scale": 1.0,
    "residual_every": 1,
    "residual_layers": None,
    "carry_base_error": False,
    "restart_growth": 1.0,
    "merge_precision": "float32",
}

OUT_OF_RANGE: list[tuple[str, Any]] = [
    *(("rank", value) for value in (0, -1, 2.5, True, "4", None)),
    *(("alpha", value) for value in (0, -1.0, math.nan, math.inf, "32", True)),
    *(("factors", value) for value in ("A", "BOTH", None, 2)),
    *(("scaling_rule", value) for value in ("alpha", "", None)),
    *(("kappa", value) for value in (0.0, -1.0, math.nan, None)),
    *(("dropout", value) for value in (-0.1, 1.0, 1.5, math.nan)),
    *(("targets", value) for value in ("q_proj", (), ["*q_proj"], ("*q_proj", 3), None)),
    *(("exclude", value) for value in ("q_proj", ["*q_proj"], (3,), None)),
    *(("restart_every", value) for value in (0, -5, 10.0, None)),
    *(("reset", value) for value in ("prune", None, True)),
    *(("reset_ratio", value) for value in (-0.01, 1.01, math.nan, "0.9")),
    *(("reset_mask", value) for value in ("joint", None)),
    *(("reset_step_count", value) for value in (1, "yes", None)),
    *(("init", value) for value in ("zero", "svd", None)),
    *(("init_mix", value) for value in (-0.1, 1.1, math.nan, "0.5")),
    *(("residual", value) for value in ("adam", None, True)),
    *(("residual_scale", value) for value in (0.0, -1.0, math.inf)),
    *(("residual_every", value) for value in (0, -1, 2.0, None)),
    *(("carry_base_error", value) for value in (1, "yes", None)),
    *(("residual_layers", value) for value in (0, -1, 2.0)),
    *(("restart_growth", value) for value in (0.0, -1.0, math.inf)),
    *(("merge_precision", value) for value in ("bfloat16", None)),
    *(("base_weight_decay", value) for value in (-0.1, math.nan)),
]


@pytest.mark.parametrize(("field", "value"), DEFAULTS.items())
def test_defaults_are_those_of_the_contract(field: str, value: Any) -> None:
    assert getattr(ReLoRAConfig(), field) == value


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_field_out_of_range_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\b{field} must ") as refusal:
        ReLoRAConfig(**{field: value})
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 1),
        ("alpha", 16),
        ("dropout", 0.0),
        ("dropout", 0.999),
        ("reset_ratio", 0.0),
        ("reset_ratio", 1),
        ("restart_every", 1),
        ("restart_growth", 0.5),
        ("targets", ("",)),
    ],
)
def test_the_ends_of_a_range_are_allowed(field: str, value: Any) -> None:
    assert getattr(ReLoRAConfig(**{field: value}), field) == value


def test_every_violation_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        ReLoRAConfig(rank=0, reset_ratio=1.5, dropout=1.0, targets="q_proj", init="svd")  # type: ignore[arg-type]
    message = str(refusal.value)
    assert "5 problems" in message
    for field in ("rank", "reset_ratio", "dropout", "targets", "init"):
        assert f"{field} must " in message


def test_a_pattern_without_its_tuple_is_answered_with_how_to_write_it() -> None:
    with pytest.raises(ConfigError, match=r"\('\*q_proj',\)"):
        ReLoRAConfig(targets="*q_proj")  # type: ignore[arg-type]


def test_it_is_frozen_keyword_only_and_compares_by_value() -> None:
    config = ReLoRAConfig(rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        ReLoRAConfig(4)  # type: ignore[misc]
    assert config == ReLoRAConfig(rank=4) and hash(config) == hash(ReLoRAConfig(rank=4))
    assert dataclasses.replace(config, rank=8).rank == 8
    with pytest.raises(ConfigError):
        dataclasses.replace(config, rank=0)


def test_the_papers_recipe_is_rank_128_alpha_32_with_magnitude_pruning() -> None:
    paper = ReLoRAConfig.paper()
    assert (paper.rank, paper.alpha, paper.factors, paper.init) == (128, 32, "both", "kaiming")
    assert (paper.reset, paper.reset_ratio, paper.scaling_rule) == ("magnitude", 0.99, "alpha/r")
    assert ReLoRAConfig.paper(restart_every=5000).restart_every == 5000
    assert ReLoRAConfig.paper(rank=64).alpha == 32
    with pytest.raises(ConfigError, match="rank"):
        ReLoRAConfig.paper(rank=0)


def test_the_preset_beyond_the_paper_is_one_sided_and_resets_nothing() -> None:
    beyond = ReLoRAConfig.beyond(rank=32)
    assert (beyond.rank, beyond.factors, beyond.scaling_rule, beyond.factor_init) == (
        *(32, "B", "matched", "orthonormal"),
    )
    assert (beyond.reset, beyond.restart_every) == ("none", 50)
    assert (beyond.residual, beyond.residual_scale) == ("muon", 5.0)
    assert ReLoRAConfig.beyond(rank=4, init="cover").init == "cover"
    with pytest.raises(ConfigError, match="residual"):
        ReLoRAConfig.beyond(rank=4, factors="both")


def test_a_frozen_lora_A_is_orthonormal_whatever_init_says() -> None:
    assert ReLoRAConfig(factors="B", init="kaiming").factor_init == "orthonormal"
    assert ReLoRAConfig(factors="both", init="kaiming").factor_init == "kaiming"
    assert ReLoRAConfig(factors="both", init="orthonormal").factor_init == "orthonormal"
    for init in ("cover", "gradient"):
        assert ReLoRAConfig(factors="B", init=init).factor_init == init


def test_settings_that_do_not_go_together_are_all_named() -> None:
    with pytest.raises(ConfigError, match="2 problems") as refusal:
        ReLoRAConfig(factors="both", residual="column", reset="transport")
    assert "residual must be 'none' unless" in str(refusal.value)
    assert "reset must not be 'transport' unless" in str(refusal.value)
