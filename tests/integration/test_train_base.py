"""Runs whose device holds the base in fewer bits: resumed bit for bit, exported with the exact weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import _Death, _fit_until, assert_same_run

from relora.checkpoint.store import load_checkpoint
from relora.train.export import export_run
from relora.train.fit import fit
from relora.train.saved import load_saved
from tiny_run import tiny_recipe

STORES = [
    {"base_dtype": "bf16"},
    {"base_dtype": "bf16", "master": "host"},
    {"base_dtype": "int8", "master": "host"},
]


@pytest.mark.parametrize("store", STORES, ids=lambda store: "-".join(store.values()))
def test_a_run_resumes_bit_for_bit_and_exports_its_exact_weights(
    tmp_path: Path, store: dict[str, str]
) -> None:
    whole = fit(tiny_recipe(tmp_path, relora=store))
    assert whole.exit_code == 0
    recipe = tiny_recipe(tmp_path, run={"out": str(tmp_path / "again")}, relora=store)
    with pytest.raises(_Death):
        _fit_until(recipe, 7)
    resumed = fit(recipe)
    assert_same_run(resumed.folder, whole.folder)

    saved = load_saved(whole.folder)
    name = "model.layers.1.mlp.up_proj"
    layer = saved.model.get_submodule(name)
    exported = load_file(next(export_run(whole.folder, tmp_path / "exported").glob("*.safetensors")))
    last = sorted((whole.folder / "checkpoints").iterdir())[-1]
    tensors = load_checkpoint(last).tensors["model"]
    assert exported[f"{name}.weight"].dtype == torch.float32
    assert exported[f"{name}.weight"].shape == (layer.out_features, layer.in_features)
    if store["base_dtype"] == "int8":
        exact = tensors[f"{name}.weight"].double() + saved_delta(tensors, name)
        torch.testing.assert_close(exported[f"{name}.weight"], exact.float(), rtol=1e-6, atol=1e-8)


def saved_delta(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    lora_A, lora_B = (tensors[f"{name}.lora_{side}"].double() for side in "AB")
    # "matched" with orthonormal rows: sqrt(in / rank).
    return (lora_A.shape[1] / lora_A.shape[0]) ** 0.5 * lora_B @ lora_A
