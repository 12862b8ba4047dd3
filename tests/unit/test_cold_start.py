"""A cold start makes the switch before its model is on the device."""

from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaForCausalLM

from relora.train.architecture import llama_config
from relora.train.methods import load_method
from relora.train.parallel import Processes
from relora.train.phase import Plan
from relora.train.recipe_io import resolve
from relora.train.setup import at_low_rank, build_state

META = Processes(rank=0, world_size=1, device=torch.device("meta"))


def devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


def start(warm_start_steps: int) -> Any:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = resolve(
        {
            "model": {"preset": None, **sizes},
            "relora": {
                **{"rank": 3, "restart_every": 5, "warm_start_steps": warm_start_steps},
                **{"base_dtype": "int8", "master": "host"},
            },
            "schedule": {"warmup_steps": 1, "rewarmup_steps": 1},
            "train": {"steps": 20, "batch_size": 1, "micro_batch_size": 1},
        }
    )
    model = LlamaForCausalLM(llama_config(recipe.model, vocab_size=30))
    return build_state(model, load_method("relora")(Plan(recipe=recipe)), META, low_rank=False)


def test_what_is_stored_in_fewer_bits_never_is_whole_on_the_device() -> None:
    state = start(warm_start_steps=0)
    assert devices(state.model) == {"cpu"}
    at_low_rank(state)
    assert devices(state.model) == {"meta"}
    weight = cast(Any, state.model).model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.int8
    assert all(p.is_meta for group in state.optimizer.adamw.param_groups for p in group["params"])


def test_a_warm_start_begins_on_the_device() -> None:
    assert devices(start(warm_start_steps=4).model) == {"meta"}
