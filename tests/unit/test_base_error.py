"""carry_base_error: what a base of codes lacks goes into lora_B as far as lora_A sees it; nothing is lost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from loops import Loop, differing
from method_samples import LAYER_KINDS, layers_of, numpy64
from relora import ConfigError, ReLoRAConfig, fold, inject
from relora.method.base_error import carry_base_error_

CONFIG = ReLoRAConfig(
    rank=3,
    factors="B",
    scaling_rule="matched",
    reset="none",
    restart_every=3,
    base_dtype="int8",
    master="host",
    carry_base_error=True,
)
WIDTHS = (96, 80)


def wide(dtype, kind="linear"):
    """A layer large enough for its rounding errors to have no structure."""
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
        import relora.integrations.bitsandbytes  # noqa: F401
    return nn.Sequential(LAYER_KINDS[kind](*WIDTHS))


def function_error(layer, exact):
    """What the forward pass lacks of the exact weight, (out, in)."""
    return exact - numpy64(layer.weight_rows(slice(None))) - numpy64(layer.delta())


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("settings", [{}, {"factors": "both"}, {"scaling_rule": "learned", "alpha": 48.0}])
def test_lora_b_cancels_the_error_within_the_rows_of_lora_a(dtype, kind, settings):
    config = replace(CONFIG, rank=24, base_dtype=dtype, **settings)
    model = wide(dtype, kind)
    inject(model, config)
    (layer,) = layers_of(model).values()
    exact = numpy64(layer.master_rows(slice(None)).clone())
    before = function_error(layer, exact)
    report = carry_base_error_([layer])
    after = function_error(layer, exact)
    (told,) = report.layers
    assert told.norm_before == pytest.approx(np.linalg.norm(before), rel=1e-6)
    assert told.norm_after == pytest.approx(np.linalg.norm(after), rel=1e-4)
    assert report.cancelled_fraction == pytest.approx(1 - (after**2).sum() / (before**2).sum(), abs=1e-4)
    # An error without structure lies in 24 of 96 directions by a quarter of its energy; codes chosen anew for
    # what one fit leaves let the next take more.
    assert 0.25 < report.cancelled_fraction < 0.6
    rows = np.linalg.qr(numpy64(layer.lora_A).T)[0]
    # Not 0: the last codes follow the last fit.
    assert ((after @ rows) ** 2).sum() < 0.4 * ((before @ rows) ** 2).sum()
    # The exact base and the delta are the exact weight as before, to float32's rounding.
    whole = numpy64(layer.master_rows(slice(None))) + numpy64(layer.delta())
    np.testing.assert_allclose(whole, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("residual", ["none", "sign"])
def test_restarts_report_it_and_a_resumed_run_is_bit_equal(residual):
    config = replace(CONFIG, residual=residual)
    whole, cut = Loop(config), Loop(config)
    whole.run(1, 10)
    cut.run(1, 5)
    resumed = Loop(config)
    resumed.model.load_state_dict(cut.model.state_dict())
    resumed.optimizers[0].load_state_dict(cut.optimizers[0].state_dict())
    resumed.relora.load_state_dict(cut.relora.state_dict())
    resumed.run(6, 10)
    assert differing(resumed.everything(), whole.everything()) == []
    for report in whole.reports:
        told = json.loads(json.dumps(report.as_dict()))["base_error"]
        assert 0 < told["cancelled_fraction"] <= 1
        assert [layer["name"] for layer in told["layers"]] == ["up", "down"]
        assert "of the base's error cancelled" in str(report)
        assert report.relative_merge_error < 1e-5


def test_a_restart_changes_no_exact_weight_and_the_folded_model_is_it():
    loop = Loop(CONFIG)
    loop.run(1, 2)
    loop.update(3)
    wanted = {
        name: numpy64(layer.master_rows(slice(None))) + numpy64(layer.delta())
        for name, layer in layers_of(loop.model).items()
    }
    loop.relora.after_step(3)
    for name, layer in layers_of(loop.model).items():
        assert layer.lora_B.detach().any()
        whole = numpy64(layer.master_rows(slice(None))) + numpy64(layer.delta())
        np.testing.assert_allclose(whole, wanted[name], rtol=0, atol=1e-6)
    fold(loop.model)
    for name, weight in wanted.items():
        np.testing.assert_allclose(numpy64(loop.model.get_submodule(name).weight), weight, rtol=0, atol=1e-6)


def test_without_it_lora_b_starts_at_zero_and_the_report_has_none():
    loop = Loop(replace(CONFIG, carry_base_error=False))
    loop.run(1, 3)
    assert loop.reports[0].base_error is None and loop.reports[0].as_dict()["base_error"] is None
    assert not any(layer.lora_B.detach().any() for layer in layers_of(loop.model).values())


def test_a_learned_scaling_of_zero_carries_nothing():
    model = wide("int8")
    inject(model, replace(CONFIG, scaling_rule="learned", alpha=3.0))
    (layer,) = layers_of(model).values()
    with torch.no_grad():
        layer.lora_scaling.zero_()
    before = layer.weight.clone()
    report = carry_base_error_([layer])
    assert report.cancelled_fraction == 0 and report.layers[0].norm_after == report.layers[0].norm_before
    assert torch.equal(layer.weight, before) and not layer.lora_B.detach().any()


@pytest.mark.parametrize("base_dtype", ["keep", "bf16"])
def test_a_base_without_codes_has_no_error_to_carry(base_dtype):
    with pytest.raises(ConfigError, match="carry_base_error must be false with base_dtype"):
        ReLoRAConfig(base_dtype=base_dtype, carry_base_error=True)
