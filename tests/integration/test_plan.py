"""The planner: what it foretells is what training holds, and what it advises fits."""

import gc
import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

import relora.lab.methods  # noqa: F401 - makes them known
from relora.cli.main import main
from relora.cli.plan import memory_bytes
from relora.errors import ConfigError
from relora.lab.planner.chart import chart
from relora.lab.planner.footprint import footprint
from relora.lab.planner.plan import METHODS, plan_run, with_settings
from relora.train.architecture import llama_config
from relora.train.config import Recipe
from relora.train.loss import TokenLoss
from relora.train.methods import load_method
from relora.train.parallel import Processes
from relora.train.phase import Plan, inject_factors
from relora.train.recipe_io import load_recipe, resolve, write_recipe
from relora.train.setup import enable_checkpointing_
from relora.train.step import train_step_

V, T = 300, 48
PLAIN, CHECKPOINTING = {}, {"gradient_checkpointing": True}


def recipe(**changes: Mapping[str, object]) -> Recipe:
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "planned", "method": "relora"},
        "model": {
            "preset": None,
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "data": {"vocab_size": V, "seq_len": T},
        "relora": {"rank": 3, "restart_every": 5, "warm_start_steps": 4},
        "schedule": {"warmup_steps": 2, "rewarmup_steps": 1},
        "train": {"steps": 20, "batch_size": 12, "micro_batch_size": 12, "precision": "fp32"},
    }
    return resolve(base, changes)


def measured(recipe: Recipe, *, low_rank: bool) -> dict[str, int]:
    """Train three steps and ask the allocator: the running sum of what it handed out and took back."""
    if low_rank:
        recipe = with_settings(recipe, {"relora.warm_start_steps": 0})
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = LlamaForCausalLM(llama_config(recipe.model, vocab_size=V))
        if recipe.train.gradient_checkpointing:
            enable_checkpointing_(model)
        if low_rank:
            inject_factors(model, recipe)
        method = load_method(recipe.run.method)(Plan(recipe=recipe))
        optimizer = method.build_optimizer(model, "low_rank" if low_rank else "warm_start")
        if low_rank:
            method.attach(model, optimizer.adamw)
        loss = TokenLoss(model, chunk_tokens=recipe.train.loss_chunk_tokens)
        for step in (1, 2, 3):
            train_step_(
                loss,
                optimizer,
                torch.zeros(recipe.train.batch_size, T, dtype=torch.int64),
                Processes(rank=0, world_size=1, device=torch.device("cpu")),
                step=step,
                seed=0,
                micro_batch_size=recipe.train.micro_batch_size,
                precision="bf16" if recipe.train.precision == "bf16" else "fp32",
                clip_grad_norm=1.0,
            )
            method.after_step(step)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        states = [value for state in optimizer.adamw.state.values() for value in state.values()]
        held = {"gradients": gradients, "optimizer": sum(state.nbytes for state in states)}
    kineto = profiler.profiler
    assert kineto is not None
    events, changes = list(kineto.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    return held | {"peak": max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("low_rank", "relora", "train", "precision"),
    [
        (False, {}, PLAIN, "bf16"),
        (False, {}, {"loss_chunk_tokens": 0}, "fp32"),
        (False, {"warm_start_kind": "muon"}, PLAIN, "fp32"),
        (False, {"warm_start_kind": "sign"}, {"micro_batch_size": 4}, "bf16"),
        (True, {}, {"micro_batch_size": 4}, "fp32"),
        (True, {"factors": "B"}, PLAIN, "bf16"),
        (True, {"factors": "B"}, CHECKPOINTING, "fp32"),
    ],
)
def test_what_is_foretold_is_what_training_holds(
    low_rank: bool, relora: dict[str, Any], train: dict[str, Any], precision: str
) -> None:
    planned = recipe(relora=relora, train={**train, "precision": precision})
    told = footprint(planned, low_rank=low_rank, precision="bf16" if precision == "bf16" else "fp32")
    found = measured(planned, low_rank=low_rank)
    assert told.gradients_bytes == found["gradients"] and told.optimizer_bytes == found["optimizer"]
    # Here they differ by less than a hundredth; another release's kernels may take scratch memory.
    assert told.peak_bytes == pytest.approx(found["peak"], rel=0.05)


def test_parameters_follow_the_shapes_of_a_7b_without_memory_for_it() -> None:
    wide = recipe(
        model={"preset": "llama-7b", "num_hidden_layers": 2},
        relora={"rank": 128},
        data={"vocab_size": 32_000, "seq_len": 2048},
        train={"batch_size": 1, "micro_batch_size": 1},
    )
    told = footprint(wide, low_rank=True, precision="bf16")
    h, f, layers, v, r = 4096, 11008, 2, 32_000, 128
    base = layers * (4 * h * h + 3 * h * f) + 2 * v * h + 2 * layers * h + h
    factors = layers * r * (4 * 2 * h + 3 * (h + f))
    assert told.parameters_factors == factors and told.parameters_total == base + factors
    assert told.parameters_trainable == factors + 2 * v * h + 2 * layers * h + h
    assert told.weights_bytes == pytest.approx(4 * base, rel=1e-6)  # rotary frequencies are in it
    assert told.factors_bytes == 4 * factors and told.optimizer_bytes > 8 * told.parameters_trainable


def test_full_rank_costs_six_flops_a_weight_and_attention() -> None:
    told = footprint(recipe(), low_rank=False, precision="fp32")
    h, f, layers = 40, 72, 2
    weights = layers * (4 * h * h + 3 * h * f) + V * h * (T - 1) / T  # the last token predicts nothing
    attention = layers * (4 + 10) * T * h  # two products forward, five in the fused backward
    assert told.flops_per_token == pytest.approx(6 * weights + attention, rel=1e-3)


def test_ddp_and_accumulation_hold_gradients_through_the_forward_pass() -> None:
    alone = footprint(recipe(), low_rank=True, precision="fp32")
    accumulating = footprint(recipe(train={"batch_size": 24}), low_rank=True, precision="fp32")
    ddp = footprint(recipe(train={"batch_size": 24}), low_rank=True, precision="fp32", devices=2)
    assert alone.bucket_bytes == accumulating.bucket_bytes == 0
    assert ddp.bucket_bytes == ddp.gradients_bytes == alone.gradients_bytes
    assert alone.peak_bytes < accumulating.peak_bytes == ddp.peak_bytes


def test_methods_stand_side_by_side_and_a_warm_start_needs_full_ranks_memory() -> None:
    plan = plan_run(recipe(train={"micro_batch_size": 1}))
    assert list(plan.methods) == list(METHODS) and plan.restarts == 2
    full, lora, both, one_sided = plan.methods.values()
    assert lora.footprint == both.footprint
    assert one_sided.footprint.optimizer_bytes < both.footprint.optimizer_bytes
    assert one_sided.footprint.activations_bytes < both.footprint.activations_bytes
    for method in (lora, both, one_sided):
        assert method.run_peak_bytes == method.warm_start_peak_bytes >= full.footprint.peak_bytes
    cold = plan_run(recipe(relora={"warm_start_steps": 0}, train={"micro_batch_size": 1}))
    assert cold.methods["relora, one-sided"].run_peak_bytes == one_sided.footprint.peak_bytes
    assert 1 < both.run_speedup < both.speedup


def test_a_recipe_of_the_laboratorys_is_planned_by_the_trainers_own_methods() -> None:
    plan = plan_run(recipe(run={"method": "muon-in-place"}, method={"adamw_lr": 1e-3}))
    own = plan_run(recipe())
    assert {name: method.footprint for name, method in plan.methods.items()} == {
        name: method.footprint for name, method in own.methods.items()
    }
    assert "muon-in-place, which this recipe trains by" in plan.notes[0] and own.notes == ()


def test_what_is_shipped_is_planned_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    plan = plan_run(load_recipe("quickstart"), vocab_size=V)
    assert list(plan.methods) == list(METHODS) and not recwarn.list


def test_a_rank_too_large_leaves_full_rank_planned() -> None:
    plan = plan_run(recipe(run={"method": "full"}, relora={"rank": 40}))
    assert list(plan.methods) == ["full"]
    assert "relora.rank must be less than 40" in plan.unavailable["relora"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("share", [0.85, 0.3])
def test_settings_that_are_said_to_fit_do(share: float) -> None:
    planned = recipe(relora={"rank": 16})
    most = plan_run(planned).methods["full"].footprint.peak_bytes
    memory = int(most * share)
    plan = plan_run(planned, memory_bytes=memory)
    for name, method in plan.methods.items():
        assert method.fits == (method.run_peak_bytes <= memory)
        assert method.settings is not None and method.least_peak_bytes is None, name
        variant = with_settings(with_settings(planned, METHODS[name]), method.settings)
        for low_rank in {variant.switch_step is not None, (variant.switch_step or 0) == 0 and name != "full"}:
            assert footprint(variant, low_rank=low_rank, precision="fp32").peak_bytes <= memory


@pytest.mark.parametrize(
    ("relora", "train"),
    [
        ({"factors": "B", "init": "orthonormal", "residual": "muon"}, PLAIN),
        ({"base_dtype": "bf16", "master": "host"}, CHECKPOINTING),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_two_shadows_tell_what_the_whole_model_holds(
    relora: dict[str, Any], train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 7}
    deep = recipe(model=sizes, relora={**relora, "warm_start_steps": 0}, train=train)
    shadowed = footprint(deep, low_rank=True, precision="bf16")
    monkeypatch.setattr("relora.lab.planner.footprint.SHADOW_DEPTHS", (7, 7))
    whole = footprint(deep, low_rank=True, precision="bf16")
    # Exact but for the blocks that layers are worked on in, which are larger in a shadow.
    assert shadowed.moments == pytest.approx(whole.moments, rel=0.02)
    for name in ("parameters_total", "weights_bytes", "host_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(shadowed, name) == getattr(whole, name)
    assert shadowed.flops_per_token == whole.flops_per_token


def test_what_the_host_holds_is_not_on_the_device_but_where_the_host_is_the_device() -> None:
    coded = recipe(relora={"base_dtype": "int8", "master": "host", "warm_start_steps": 0})
    cpu = footprint(coded, low_rank=True, precision="fp32")
    cuda = footprint(
        with_settings(coded, {"train.loss_chunk_tokens": 256}), low_rank=True, precision="fp32", device="cuda"
    )
    base = 2 * (4 * 40 * 40 + 3 * 40 * 72)
    assert cpu.host_bytes == cuda.host_bytes == 4 * base
    assert cpu.peak_bytes - cuda.peak_bytes == 4 * base
    # 64 weights to a code block with a float32 scale: rows of 40 take one, rows of 72 take two.
    codes = 2 * ((4 * 40 + 2 * 72) * (64 + 4) + 40 * 2 * (64 + 4))
    plain = footprint(recipe(), low_rank=False, precision="fp32").weights_bytes
    assert cuda.weights_bytes == plain - 4 * base + codes


def test_the_complements_votes_are_planned_and_both_factors_without_them() -> None:
    planned = recipe(relora={"factors": "B", "init": "orthonormal", "residual": "sign"})
    plan = plan_run(planned)
    assert not plan.unavailable
    base = 2 * (4 * 40 * 40 + 3 * 40 * 72)
    assert plan.methods["relora, one-sided"].footprint.observed_bytes == pytest.approx(base, abs=256)
    assert plan.methods["relora"].footprint.observed_bytes < 64


def test_the_complements_momentum_is_planned_as_optimizer_state() -> None:
    footprints = [
        footprint(
            recipe(relora={"factors": "B", "residual": kind, "warm_start_steps": 0}),
            low_rank=True,
            precision="fp32",
        )
        for kind in ("none", "muon")
    ]
    without, with_it = footprints
    base = 2 * (4 * 40 * 40 + 3 * 40 * 72)
    assert with_it.optimizer_bytes - without.optimizer_bytes == 2 * base
    assert with_it.checkpoint_bytes - without.checkpoint_bytes == 2 * base
    assert (with_it.weights_bytes, with_it.residual_bytes) == (without.weights_bytes, without.residual_bytes)


def test_a_warm_start_by_muon_in_place_needs_less_than_adamws_and_the_plan_says_so() -> None:
    usual, in_place = (
        plan_run(recipe(relora={"warm_start_kind": kind}), device="cpu") for kind in ("adamw", "muon")
    )
    base = 2 * (4 * 40 * 40 + 3 * 40 * 72)
    told = footprint(recipe(relora={"warm_start_kind": "muon"}), low_rank=False, precision="fp32")
    full = usual.methods["full"].footprint
    assert told.parameters_trainable == full.parameters_trainable == full.parameters_total
    assert full.gradients_bytes - told.gradients_bytes == 4 * base
    assert full.optimizer_bytes - told.optimizer_bytes == pytest.approx(6 * base, abs=4 * 14)  # step counts
    assert in_place.methods["full"] == usual.methods["full"]
    for name in ("lora", "relora", "relora, one-sided"):
        mine, theirs = in_place.methods[name], usual.methods[name]
        assert mine.footprint == theirs.footprint
        assert mine.run_peak_bytes < theirs.run_peak_bytes == usual.methods["full"].run_peak_bytes
        assert mine.warm_start_peak_bytes == mine.run_peak_bytes
        assert mine.run_speedup < theirs.run_speedup  # the iterations of its update


@pytest.mark.parametrize(
    ("relora", "low_rank"),
    [
        ({"warm_start_kind": "sign"}, False),
        ({"warm_start_kind": "column"}, False),
        ({"warm_start_kind": "muon"}, False),
        ({"factors": "B", "residual": "column", "warm_start_steps": 0}, True),
    ],
)
def test_what_passes_leave_is_held_from_micro_batch_to_micro_batch(
    relora: dict[str, Any], low_rank: bool
) -> None:
    # So wide and with so few tokens that votes and sums are a large part of the peak.
    wide = {"hidden_size": 256, "intermediate_size": 512}
    train = {"batch_size": 3, "micro_batch_size": 1, "precision": "fp32"}
    planned = recipe(model=wide, relora=relora, train=train)
    told = footprint(planned, low_rank=low_rank, precision="fp32")
    assert told.peak_bytes == pytest.approx(measured(planned, low_rank=low_rank)["peak"], rel=0.03)


def test_a_start_in_place_is_planned_whatever_restarts_the_recipe_asks_for_in_vain() -> None:
    relora = {"warm_start_steps": 8, "restart_every": 15}
    idle = recipe(run={"method": "lora"}, relora={**relora, "warm_start_kind": "muon"})
    usual = recipe(run={"method": "lora"}, relora=relora)
    mine, theirs = (plan_run(each).methods["lora"] for each in (idle, usual))
    assert mine.run_peak_bytes < theirs.run_peak_bytes


def test_a_start_in_place_is_offered_before_a_cold_one() -> None:
    planned = recipe(model={"hidden_size": 256, "intermediate_size": 512}, train={"micro_batch_size": 1})
    in_place = with_settings(planned, {"relora.warm_start_kind": "muon"})
    memory = plan_run(in_place).methods["relora, one-sided"].run_peak_bytes
    found = plan_run(planned, memory_bytes=memory).methods["relora, one-sided"]
    assert found.fits is False and found.settings is not None
    assert found.settings["relora.warm_start_kind"] == "muon"
    assert "relora.warm_start_steps" not in found.settings
    already = plan_run(in_place, memory_bytes=memory).methods["relora, one-sided"]
    assert already.fits is True and already.settings == {}


def test_what_an_update_costs_is_shared_by_the_tokens_of_all_its_micro_batches() -> None:
    relora = {"factors": "B", "residual": "muon", "warm_start_steps": 0}
    once, twice = (
        footprint(recipe(relora=relora, train={"batch_size": n}), low_rank=True, precision="fp32")
        for n in (12, 24)
    )
    iterations = 2 * 5 * 2 * (4 * 40**2 * (2 * 40 + 40) + 3 * 40**2 * (2 * 72 + 40))
    projections = 2 * 2 * 4 * 3 * (4 * 40 * 40 + 3 * 40 * 72)  # of the momentum, and of what comes of it
    update = (once.flops_per_token - twice.flops_per_token) * 24 * T
    assert update == pytest.approx(iterations + projections, rel=1e-6)


def test_doubts_are_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, {"model_type": "starcoder2", **TINY_SIZES})
    assert main(["plan", str(path)]) == 0
    assert "starcoder2 is an architecture that no benchmark here has measured" in capsys.readouterr().out


def test_nothing_helps_where_not_even_the_states_fit() -> None:
    plan = plan_run(recipe(), memory_bytes=1000)
    for method in plan.methods.values():
        assert method.fits is False and method.settings is None
        assert method.least_peak_bytes is not None and 1000 < method.least_peak_bytes <= method.run_peak_bytes


def test_other_architectures_are_planned_from_their_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "vocab_size": 50,
                "n_positions": 64,
            }
        )
    )
    model = {"preset": None, "init_from": str(tmp_path)}
    sizes = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), None
    )
    planned = recipe(model={**sizes, **model}, data={"tokenizer": str(tmp_path)})
    plan = plan_run(planned)
    assert plan.methods["full"].footprint.parameters_total == 50 * 16 + 64 * 16 + 2 * 3280 + 32
    assert isinstance(chart(plan), str)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.init_from .* has no configuration"):
        plan_run(planned)


TINY_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write a configuration to begin from, and a recipe that does; return the recipe's path."""
    (folder / "config.json").write_text(json.dumps(config))
    sizes = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), None
    )
    model = {**sizes, "preset": None, "init_from": str(folder)}
    write_recipe(
        recipe(model=model, data={"tokenizer": str(folder)}, train={"micro_batch_size": 1}),
        folder / "recipe.toml",
    )
    return folder / "recipe.toml"


def test_the_verb_prints_json_a_table_and_a_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, svg = tmp_path / "planned.toml", tmp_path / "plan.svg"
    write_recipe(recipe(train={"micro_batch_size": 2}), path)
    assert main(["plan", str(path), "--json", "--memory", "24GiB", "--svg", str(svg)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 20 and shown["memory_bytes"] == 24 * 2**30
    assert shown["methods"]["full"]["fits"] is True and shown["methods"]["full"]["settings"] == {}
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert main(["plan", str(path), "--memory", "200K", "--train.micro_batch_size", "1"]) == 0
    table = capsys.readouterr().out
    assert "relora, one-sided" in table and "fits 200.00 KiB" in table
    assert "no setting known here makes it fit; the least found is" in table
    assert "relora *" in table and "reached in" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "plenty"], "--memory must be an amount such as 24GiB"),
        (["--memory", "0GiB"], "--memory must be an amount"),
        (["--devices", "0"], "devices must be at least 1, not 0"),
        (["--devices", "5"], "multiple of train.micro_batch_size times the 5 devices"),
        (["--svg", "/nonexistent/plan.svg", "--model.num_hidden_layers", "1"], "cannot be written"),
        (["--train.micro_batch_size", "5"], "batch_size must be a multiple"),
    ],
)
def test_mistakes_are_said_in_words(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(recipe(), tmp_path / "planned.toml")
    assert main(["plan", str(tmp_path / "planned.toml"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("1.5g", 3 << 29), ("512M", 512 << 20), ("4096", 4096)],
)
def test_amounts_of_memory_are_read(text: str, amount: int) -> None:
    assert memory_bytes(text) == amount


def test_planning_leaves_no_patch_behind() -> None:
    from transformers import masking_utils

    before: Any = masking_utils.is_tracing
    footprint(recipe(), low_rank=False, precision="fp32")
    assert masking_utils.is_tracing is before
    assert not isinstance(nn.Linear(2, 2).weight, torch._subclasses.fake_tensor.FakeTensor)
