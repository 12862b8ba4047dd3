"""Ranks and spectra of what training changed, against matrices whose rank is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from loops import tiny_model
from relora import ConfigError, ReLoRAConfig, fold, inject
from relora.method.spectrum import function_weights, spectra, spectrum


def matrix_of_rank(rank, shape=(13, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [0, 1, 4, 12, 13])
def test_rank_of_a_known_matrix(rank):
    assert spectrum(matrix_of_rank(rank)).rank == rank


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float32_rounding_of_many_merges_adds_no_rank(size):
    start = size * matrix_of_rank(13).float()
    weight = start.clone()
    for cycle in range(5):
        weight += (0.01 * size * matrix_of_rank(2, seed=1 + cycle)).float()
    assert spectrum(weight.double() - start.double(), like=weight).rank == 10


def test_bf16_rounding_of_a_folded_layer_adds_no_rank():
    start = matrix_of_rank(13).bfloat16()
    weight = (start.double() + matrix_of_rank(3, seed=1)).bfloat16()
    change = spectrum(weight.double() - start.double(), like=weight)
    assert change.rank == 3
    assert change.num_above(0.0) == 13


def test_singular_values_are_numpys_largest_first():
    delta = matrix_of_rank(6)
    expected = torch.from_numpy(np.linalg.svd(delta.numpy(), compute_uv=False))
    torch.testing.assert_close(spectrum(delta).singular_values, expected, rtol=1e-9, atol=1e-9)


def test_summaries_of_a_diagonal_matrix():
    change = spectrum(torch.diag(torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)))
    assert change.stable_rank == pytest.approx((64 + 16 + 4 + 4) / 64)
    shares = [0.5, 0.25, 0.125, 0.125]
    assert change.effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    assert change.condition_number == pytest.approx(4.0)
    assert change.num_above(2.0) == 2
    assert change.num_above(0.1) == 4


def test_equal_singular_values_give_full_effective_and_stable_rank():
    change = spectrum(3 * torch.eye(5))
    assert (change.rank, change.effective_rank, change.stable_rank) == (5, pytest.approx(5), pytest.approx(5))


def test_condition_number_of_a_deficient_change_is_infinite():
    assert spectrum(matrix_of_rank(12)).condition_number == math.inf
    assert math.isfinite(spectrum(matrix_of_rank(13)).condition_number)


def test_no_change_has_rank_zero_and_no_nan():
    change = spectrum(torch.zeros(4, 6), like=torch.ones(4, 6))
    summaries = (change.rank, change.effective_rank, change.stable_rank, change.condition_number)
    assert summaries == (0, 0.0, 0.0, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_weights_are_what_the_forward_pass_applies(dtype):
    model = tiny_model(dtype)
    plain = function_weights(model)
    assert set(plain) == {"up", "down"}
    assert plain["up"].shape == (11, 7)
    inject(model, ReLoRAConfig(rank=3, alpha=6))
    injected = function_weights(model)
    assert all(torch.equal(injected[name], plain[name].double()) for name in plain)
    with torch.no_grad():
        model.up.lora_B.normal_()
    moved = function_weights(model)["up"]
    expected = model.up.weight.double() + 2.0 * model.up.lora_B.double() @ model.up.lora_A.double()
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_function_weights_are_copies_that_training_does_not_move():
    model = tiny_model()
    before = function_weights(model)
    with torch.no_grad():
        model.up.weight.add_(1)
    assert torch.equal(function_weights(model)["up"], before["up"] + 1)


def test_change_can_be_followed_through_inject_and_fold():
    model = tiny_model()
    before = function_weights(model)
    inject(model, ReLoRAConfig(rank=3))
    with torch.no_grad():
        model.down.lora_B.normal_()
    assert {name: change.rank for name, change in spectra(before, function_weights(model)).items()} == {
        "up": 0,
        "down": 3,
    }
    fold(model)
    assert spectra(before, function_weights(model))["down"].rank == 3


def test_transposed_layers_are_compared_as_out_by_in():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    model = nn.Sequential(conv1d(5, 8))
    before = function_weights(model)
    assert before["0"].shape == (5, 8)
    inject(model, ReLoRAConfig(rank=2))
    assert torch.equal(function_weights(model)["0"], before["0"].double())


def test_names_survive_a_compile_wrapper():
    model = tiny_model()
    wrapped = torch.compile(model, backend="eager")
    assert function_weights(wrapped).keys() == function_weights(model).keys() == {"up", "down"}
    inject(model, ReLoRAConfig(rank=2))
    assert function_weights(wrapped).keys() == {"up", "down"}


def test_models_without_a_common_layer_are_refused():
    with pytest.raises(ConfigError, match="no layer in common"):
        spectra(function_weights(tiny_model()), function_weights(nn.Sequential(nn.Linear(2, 3))))
