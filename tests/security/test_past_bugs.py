"""One test for each class of bug that public ReLoRA code had (and its neighbours): none of them is here.

Numbers like "3.6.1" are of the list this project keeps of the bugs found in the authors' code and its ports.
Bugs of files, pickles and archives are in test_hostile_files.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from relora import ReLoRA, ReLoRAConfig, fold, inject, merge_and_reinit_, reset_optimizer_state_
from relora.errors import ReLoRAError
from relora.method.linear import LoRALinear
from relora.method.seeds import derived_seed
from relora.train.fit import fit
from relora.train.phase import Plan
from relora.train.recipe_io import resolve
from tiny_run import tiny_recipe


def injected(**changes: object) -> tuple[nn.Sequential, ReLoRAConfig]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    config = ReLoRAConfig(**{"rank": 3, "restart_every": 2, "targets": ("*",), **changes})
    inject(model, config, seed=0)
    return model, config


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    model(torch.randn(11, 7, generator=generator)).square().mean().backward()


def trained(model: nn.Module) -> AdamW:
    return AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)


def test_the_first_cycle_is_not_dead_and_no_later_one():
    """3.6.1: A and B both zero, so that no factor ever got a gradient."""
    model, _ = injected()
    for index in (1, 2):
        backward(model)
        assert all(layer.lora_B.grad.abs().sum() > 0 for layer in layers(model))
        merge_and_reinit_(model, seed=0, restart_index=index)
        model.zero_grad()
    backward(model)
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in layers(model))


def test_a_learned_scaling_lives_through_restarts():
    """3.6.2: the merge set the scaling to 0, and every gradient with it, for ever."""
    model, config = injected(scaling_rule="learned", alpha=6)
    optimizer = trained(model)
    relora = ReLoRA(model, optimizer, config)
    for step in range(1, 7):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        relora.after_step(step)
    backward(model)
    for layer in layers(model):
        assert float(layer.lora_scaling.detach()) != 0 and layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["lora", "relora", "full"])
def test_every_method_begins_with_its_defaults(tmp_path, method):
    """3.6.3, 3.6.4, 3.6.6: LoRA alone, the layer's own default, and the flagship recipe all raised."""
    assert fit(tiny_recipe(tmp_path, run={"method": method}, train={"steps": 6})).exit_code == 0


def test_tokens_are_divided_by_tokens():
    """3.6.7: a budget of tokens was divided by sequences, and the run became seq_len times too long."""
    recipe = resolve(
        {"train": {"tokens": 1_000_000, "batch_size": 8, "micro_batch_size": 8}, "data": {"seq_len": 64}}
    )
    assert recipe.total_steps == 1_000_000 // (8 * 64)


@pytest.mark.parametrize("warm_start", [0, 7, 20])
def test_the_learning_rate_drops_where_the_restarts_are(tmp_path, warm_start):
    """3.6.8: an offset moved the dips of the learning rate away from the merges."""
    recipe = tiny_recipe(
        tmp_path,
        relora={"restart_every": 9, "warm_start_steps": warm_start},
        schedule={"warmup_steps": 3, "rewarmup_steps": 2},
        train={"steps": 60},
    )
    plan = Plan(recipe=recipe)
    dips = [step - 1 for step in range(2, 61) if plan.multiplier(step) == 0]
    assert dips == sorted({*plan.restart_steps, *([warm_start] if warm_start else [])})


def test_what_is_exported_needs_no_setting_to_be_loaded():
    """3.6.10: a saved config left out fields, so that another module was built on loading."""
    model, _ = injected(alpha=6)
    backward(model)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B.add_(layer.lora_B.grad)
    inputs = torch.randn(4, 7)
    before = model(inputs)
    fold(model)
    plain = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(plain(inputs), before, atol=1e-6)


def test_ranks_draw_the_same_factors_and_other_dropout_masks():
    """3.6.12: factors were drawn from each rank's own stream, and dropout masks were the same on all."""
    first, _ = injected()
    torch.manual_seed(99)
    second, _ = injected()
    for model, noise in ((first, 1), (second, 2)):
        torch.manual_seed(noise)
        merge_and_reinit_(model, seed=5, restart_index=1)
    assert all(torch.equal(a.lora_A, b.lora_A) for a, b in zip(layers(first), layers(second), strict=True))
    assert derived_seed(0, "dropout", 3, 0) != derived_seed(0, "dropout", 3, 1)


def test_a_small_delta_is_not_lost_in_a_bf16_weight():
    """3.6.13: merges were added in bf16, which loses most of a small delta."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    before = model[0].weight.float()
    inject(model, ReLoRAConfig(rank=4, targets=("*",)), seed=0)
    total = torch.zeros(64, 64)
    for index in range(1, 21):
        with torch.no_grad():
            model[0].lora_B.fill_(1e-4)
        total += model[0].delta().float()
        merge_and_reinit_(model, seed=0, restart_index=index)
    change = model[0].master_rows(slice(None)).float() - before
    assert (change - total).norm() / total.norm() < 1e-2


def test_states_of_any_size_are_reset_by_count():
    """3.6.14: torch.quantile refused more than 16 million entries, and ties were all zeroed."""
    parameter = nn.Parameter(torch.zeros(2**24 + 8))
    optimizer = AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)  # every entry ties with every other
    optimizer.step()
    report = reset_optimizer_state_(optimizer, [("w", parameter)], method="magnitude", ratio=0.9)
    kept = int(optimizer.state[parameter]["exp_avg"].count_nonzero())
    assert kept == parameter.numel() - round(0.9 * parameter.numel()) and report.entries_zeroed > 0


def test_a_reset_to_zero_leaves_nothing_and_no_moment_outlives_the_other():
    """3a.5: the full reset kept one entry in a thousand, drawn anew for each moment, so that m outlived v."""
    for method in ("zero", "random", "magnitude"):
        model, _ = injected()
        optimizer = trained(model)
        backward(model)
        optimizer.step()
        factors = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
        reset_optimizer_state_(optimizer, factors, method=method, ratio=0.5)
        for _, parameter in factors:
            state = optimizer.state[parameter]
            assert method != "zero" or (not state["exp_avg"].any() and not state["exp_avg_sq"].any())
            assert not (state["exp_avg"].ne(0) & state["exp_avg_sq"].eq(0)).any()


def test_a_reset_that_does_nothing_is_an_error():
    """Axolotl #1414: "Percent of optimizer states zeroed: 0.00", and training went on."""
    model, config = injected()

    class Unknown(SGD):
        pass

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Unknown(parameters, lr=0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    for state in optimizer.state.values():
        state["strange"] = state.pop("momentum_buffer")
    with pytest.raises(ReLoRAError):
        ReLoRA(model, optimizer, config)
        reset_optimizer_state_(optimizer, [("w", parameters[0])], method="zero")


def test_frozen_weights_hold_no_gradient_and_no_state(tmp_path, monkeypatch):
    """LMFlow #768, #778, #801: what was frozen kept its gradients and moments, and no memory was saved."""
    from relora.train import trainer

    seen = []
    real = trainer.Trainer._finish

    def look(self):
        frozen = [p for p in self.state.model.parameters() if not p.requires_grad]
        seen.append(
            (len(frozen), [p.grad is None and p not in self.state.optimizer.adamw.state for p in frozen])
        )
        return real(self)

    monkeypatch.setattr(trainer.Trainer, "_finish", look)
    fit(tiny_recipe(tmp_path, train={"steps": 7}))
    ((count, clean),) = seen
    assert count == 14 and all(clean)


def test_accumulation_and_logged_norms_are_right(tmp_path):
    """Axolotl #1448: with accumulation the gradient norm was logged as 0, and the loss was flat."""
    whole = tiny_recipe(tmp_path, train={"steps": 6, "micro_batch_size": 8})
    parts = replace(whole, run=replace(whole.run, name="p"), train=replace(whole.train, micro_batch_size=2))
    logs = []
    for recipe in (whole, parts):
        text = (fit(recipe).folder / "metrics.jsonl").read_text()
        logs.append([json.loads(line) for line in text.splitlines()])
    for one, other in zip(*logs, strict=True):
        assert one["grad_norm"] > 0
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)


def test_evaluation_weighs_by_tokens(tmp_path):
    """3.6.11: the loss was a mean of means over batches of different size."""
    from relora.train.evaluate import evaluate_path

    folder = fit(tiny_recipe(tmp_path, train={"steps": 6}, eval={"every": 2, "sequences": 7})).folder
    recipe_losses = [
        json.loads(line).get("eval/loss") for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert recipe_losses[-1] is not None and math.isfinite(recipe_losses[-1])
    assert evaluate_path(folder, sequences=7)["eval/loss"] == pytest.approx(recipe_losses[-1], abs=1e-5)


def test_everything_a_run_writes_is_text_or_safetensors(tmp_path: Path):
    """GaLore #35, ms-swift #10161: optimizer states were Python objects in pickles."""
    folder = fit(tiny_recipe(tmp_path, train={"steps": 6})).folder
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), (
                path
            )
            assert path.suffix == ".safetensors" or data.decode("utf-8") is not None
