"""At the switch AdamW forgets the matrices that freeze, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import relora.lab.methods  # noqa: F401 - their names are known from here on
from relora.train.architecture import llama_config
from relora.train.methods import load_method
from relora.train.parallel import Processes
from relora.train.phase import Plan
from relora.train.recipe_io import resolve
from relora.train.setup import at_low_rank, build_state
from relora.train.state import RunState

HERE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
VOCABULARY = 30
REST = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} | {
    f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")
}


def trained_one_step(method: str, **optim: object) -> RunState:
    """Return a run in its warm start, after a step."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    changes: dict[str, dict[str, Any]] = {
        "run": {"method": method},
        "model": {"preset": None, **sizes},
        "relora": {"rank": 3, "restart_every": 5, "warm_start_steps": 4},
        "schedule": {"warmup_steps": 1, "rewarmup_steps": 1},
        "train": {"steps": 20, "batch_size": 1, "micro_batch_size": 1},
        "optim": optim,
    }
    recipe = resolve(changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(recipe.model, vocab_size=VOCABULARY))
    state = build_state(model, load_method(method)(Plan(recipe=recipe)), HERE, low_rank=False)
    step_(state)
    return state


def step_(state: RunState) -> None:
    tokens = torch.arange(8).remainder(VOCABULARY).view(1, 8)
    state.model(input_ids=tokens, labels=tokens).loss.backward()
    state.optimizer.adamw.step()
    state.optimizer.adamw.zero_grad()


def memory(state: RunState) -> dict[str, dict[str, Tensor]]:
    known = state.optimizer.adamw.state
    return {name: dict(known[p]) for name, p in state.model.named_parameters() if p in known}


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("relora", {}),
        ("lora", {"rest_lr_multiples": [2.0, 3.0, 4.0]}),
        ("relora", {"factor_optimizer": "muon"}),
        ("galore", {}),
        ("switchlora", {}),
    ],
)
def test_what_trains_on_keeps_its_moments_and_what_freezes_is_forgotten(
    method: str, optim: dict[str, object]
) -> None:
    state = trained_one_step(method, **optim)
    before = memory(state)
    report = at_low_rank(state)
    after = memory(state)
    assert set(after) == REST and "AdamW keeps its memory of 5 tensors" in report
    for name, kept in after.items():
        assert set(kept) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(kept[key] is before[name][key] for key in kept), name
    step_(state)
    assert all(int(memory(state)[name]["step"]) == 2 for name in REST)


def test_where_there_is_no_memory_none_is_reported() -> None:
    state = trained_one_step("relora")
    state.optimizer.adamw.state.clear()
    assert "memory" not in at_low_rank(state) and not memory(state)
