"""What a restart refuses, and that a refusal leaves every weight, state and counter as it was."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from loops import Loop, adamw, differing, tiny_model
from relora import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    OptimizerResetError,
    ReLoRA,
    ReLoRAConfig,
    fold,
    inject,
    merge_and_reinit_,
)
from relora.method.adapters import OptimizerAdapter, register_optimizer_adapter

CONFIG = ReLoRAConfig(rank=3, restart_every=4)


def before_restart(config=CONFIG, **settings):
    """A loop whose next after_step(4) restarts."""
    loop = Loop(config, **settings)
    loop.run(1, 3)
    loop.update(4)
    return loop


def refused(loop, error, match, step=4):
    before = loop.everything()
    with pytest.raises(error, match=match):
        loop.relora.after_step(step)
    assert differing(before, loop.everything()) == []


@pytest.mark.parametrize("step", [0, 2, 3, 5, 6])
def test_skipped_and_repeated_steps_are_refused(step):
    refused(before_restart(), ConfigError, rf"after_step\({step}\) follows step 3.*4 was expected", step)


def test_a_refused_step_can_be_corrected():
    loop = before_restart()
    refused(loop, ConfigError, "in order", 5)
    assert loop.relora.after_step(4).restart_index == 1


def test_steps_past_the_end_are_refused():
    loop = before_restart(end=4)
    assert loop.relora.after_step(4) is None
    refused(loop, ConfigError, "past end=4, the last step.*ReLoRA with", 5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["up.lora_A", "down.lora_B"])
def test_factors_that_are_not_finite_are_refused(leaf, poison):
    loop = before_restart()
    with torch.no_grad():
        loop.model.get_parameter(leaf)[1, 2] = poison
    refused(loop, NonFiniteError, leaf.partition(".")[0])


def test_a_delta_that_overflows_the_base_is_refused():
    loop = before_restart(model=tiny_model(torch.float16).float().half())
    with torch.no_grad():
        loop.model.up.lora_B.fill_(1e4)
        loop.model.up.lora_A.fill_(1e4)
    refused(loop, NonFiniteError, "up")


@pytest.mark.parametrize("method", ["magnitude", "random", "zero"])
def test_optimizer_states_that_are_not_finite_are_refused_before_any_weight_changes(method):
    loop = before_restart(replace(CONFIG, reset=method))
    loop.optimizers[0].state[loop.model.down.lora_B]["exp_avg_sq"][0, 0] = float("nan")
    refused(loop, NonFiniteError, r"exp_avg_sq.*down\.lora_B")


def test_a_state_of_the_second_optimizer_is_checked_before_the_first_is_reset():
    def two(model):
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        return [torch.optim.AdamW(factors[:2], lr=1e-2), torch.optim.AdamW(factors[2:], lr=1e-2)]

    loop = before_restart(make_optimizers=two)
    loop.optimizers[1].state[loop.model.down.lora_A]["exp_avg"][0, 0] = float("inf")
    refused(loop, NonFiniteError, r"exp_avg.*down\.lora_A")


def test_a_repaired_state_restarts_as_if_it_had_never_been_refused():
    config = replace(CONFIG, base_weight_decay=0.5)
    untroubled, repaired = before_restart(config), before_restart(config)
    moment = repaired.optimizers[0].state[repaired.model.up.lora_A]["exp_avg"]
    good = moment[0, 0].item()
    moment[0, 0] = float("nan")
    refused(repaired, NonFiniteError, "exp_avg")
    moment[0, 0] = good
    for loop in (untroubled, repaired):
        loop.relora.after_step(4)
    assert differing(untroubled.everything(), repaired.everything()) == []


@dataclass(frozen=True, kw_only=True)
class DoesNothing(OptimizerAdapter):
    def clear_(self, state, moment, mask):
        pass


@dataclass(frozen=True, kw_only=True)
class ClearsTooMuch(OptimizerAdapter):
    def clear_(self, state, moment, mask):
        state[moment].zero_()


@pytest.mark.parametrize("broken", [DoesNothing, ClearsTooMuch])
def test_a_reset_that_did_not_do_what_it_should_raises(broken):
    class Mistreated(torch.optim.AdamW):
        pass

    register_optimizer_adapter(broken(optimizer=Mistreated, moments=("exp_avg", "exp_avg_sq"), step="step"))
    loop = before_restart(
        replace(CONFIG, reset_ratio=0.5),
        make_optimizers=lambda model: Mistreated([p for p in model.parameters() if p.requires_grad]),
    )
    with pytest.raises(OptimizerResetError, match=r"up\.lora_A.*broken"):
        loop.relora.after_step(4)
    assert loop.relora.restart_index == 0


def test_factors_no_gradient_has_reached_are_refused_before_any_weight_changes():
    loop = Loop(CONFIG)
    for step in range(1, 5):
        loop.update(step)
        if step < 4:
            loop.relora.after_step(step)
    for parameter in loop.factors().values():
        del loop.optimizers[0].state[parameter]
    refused(loop, OptimizerResetError, "touch no state of 4 parameters")


def test_an_optimizer_made_before_injection_is_refused():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inject(model, CONFIG)
    with pytest.raises(ConfigError, match=r"does not hold 4 of 4 factors.*up\.lora_A.*after inject"):
        ReLoRA(model, optimizer, CONFIG)


def test_an_optimizer_that_lacks_one_factor_is_refused():
    model = tiny_model()
    inject(model, CONFIG)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "down.lora_A"])
    with pytest.raises(ConfigError, match=r"does not hold 1 of 4 factors.*down\.lora_A"):
        ReLoRA(model, optimizer, CONFIG)


def test_an_unknown_optimizer_family_is_refused_at_once():
    model = tiny_model()
    inject(model, CONFIG)
    with pytest.raises(ConfigError, match="no optimizer reset is known for RMSprop"):
        ReLoRA(model, torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad]), CONFIG)


def test_another_config_than_that_of_injection_is_refused_with_its_fields():
    model = tiny_model()
    inject(model, CONFIG)
    other = replace(CONFIG, restart_every=5, reset="zero")
    with pytest.raises(ConfigError, match=r"restart_every 4 \(here 5\), reset 'magnitude'.*pass"):
        ReLoRA(model, adamw(model), other)


def test_a_model_without_factors_is_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match="inject"):
        ReLoRA(model, adamw(model), CONFIG)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def slices_in_place(model):
    """What FullyShardedDataParallel(use_orig_params=True) leaves of each weight where there are two ranks."""
    for parameter in model.parameters():
        parameter.data = parameter.detach().flatten()[: parameter.numel() // 2]


@pytest.mark.usefixtures("process_group")
def test_layers_that_fsdp_has_flattened_are_refused_with_nothing_changed():
    model = tiny_model()
    inject(model, CONFIG)
    with torch.no_grad():
        model.up.lora_B.fill_(0.5)
    slices_in_place(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for use in (
        lambda: ReLoRA(model, adamw(model), CONFIG),
        lambda: merge_and_reinit_(model, seed=0, restart_index=1),
        lambda: fold(model),
    ):
        with pytest.raises(
            ConfigError, match=r"up is sharded .*cuts weights regardless of rows.*fully_shard"
        ):
            use()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("process_group")
def test_encoded_states_of_sharded_factors_are_refused():
    class Encoded(torch.optim.AdamW):
        pass

    class Decoding(OptimizerAdapter):
        def read(self, state, moment):
            return state[moment]

    register_optimizer_adapter(Decoding(optimizer=Encoded, moments=("exp_avg", "exp_avg_sq"), step="step"))
    model = tiny_model()
    inject(model, CONFIG)
    fully_shard(model)
    with pytest.raises(ConfigError, match="factors are sharded, and Encoded encodes its states"):
        ReLoRA(model, Encoded(p for p in model.parameters() if p.requires_grad), CONFIG)


@pytest.mark.parametrize("calendar", [{"start": -1}, {"start": 5, "end": 4}])
def test_a_calendar_out_of_range_is_refused(calendar):
    model = tiny_model()
    inject(model, CONFIG)
    with pytest.raises(ConfigError, match="restart calendar"):
        ReLoRA(model, adamw(model), CONFIG, **calendar)


def test_a_step_count_reset_without_step_counts_warns():
    model, config = tiny_model(), replace(CONFIG, reset_step_count=True)
    inject(model, config)
    factors = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="reset_step_count has no effect"):
        ReLoRA(model, torch.optim.SGD(factors, momentum=0.9), config)


def test_a_model_folded_since_is_refused():
    loop = before_restart()
    fold(loop.model)
    with pytest.raises(ConfigError, match=r"folded.*build both anew"):
        loop.relora.after_step(4)


def test_a_model_folded_and_injected_again_is_refused_until_the_optimizer_is_made_anew():
    loop = before_restart()
    fold(loop.model)
    inject(loop.model, CONFIG)
    weight = loop.model.up.weight.clone()
    with pytest.raises(ConfigError, match=r"up\.lora_A.*build both anew"):
        loop.relora.after_step(4)
    assert torch.equal(loop.model.up.weight, weight)


def test_a_state_of_another_run_is_refused_with_nothing_changed():
    loop = before_restart()
    state = loop.relora.state_dict()
    for key, other in (("seed", 1), ("start", 2), ("restart_every", 5), ("restart_growth", 2.0)):
        with pytest.raises(CheckpointError, match=rf"another run: {key} {other}"):
            loop.relora.load_state_dict(state | {key: other, "step": 9})
    assert loop.relora.state_dict() == state


@pytest.mark.parametrize("change", [{"extra": 1}, {"step": None}])
def test_an_incomplete_or_foreign_state_is_refused(change):
    loop = before_restart()
    state = loop.relora.state_dict()
    damaged = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(CheckpointError, match="must hold exactly"):
        loop.relora.load_state_dict(damaged)
    assert loop.relora.state_dict() == state
