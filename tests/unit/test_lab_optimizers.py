"""The laboratory's optimizers against independent ones, and the invariants of the methods they serve."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import relora.lab.methods  # noqa: F401
from loops import tiny_model
from reference.subspace_adam import galore_run
from relora import ReLoRAConfig, inject
from relora.lab.methods.control import control_sizes
from relora.lab.methods.galore import GaLoreAdam, leading_directions
from relora.lab.methods.scale import NormalisedSGD
from relora.lab.methods.switchlora import SwitchLoRA, VectorAdam
from relora.method.linear import lora_layers
from relora.train.architecture import ModelConfig, llama_config
from relora.train.joint import JointOptimizer
from relora.train.methods import MethodOptions, MethodSpec, load_method, register_method
from relora.train.phase import Plan
from tiny_run import tiny_recipe

SETTINGS = {"rank": 2, "refresh_every": 3, "scale": 0.3, "lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-9}


def gradients(shape: tuple[int, int], count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_galore_follows_the_published_algorithm(shape):
    grads = [grad.float() for grad in gradients(shape)]
    weight = nn.Parameter(torch.ones(shape))
    stepped(GaLoreAdam([weight], names={weight: "w"}, **SETTINGS), weight, grads)
    wanted = galore_run(np.ones(shape), [g.double().numpy() for g in grads], **SETTINGS)
    # float32 against float64 over eight steps of size 0.05.
    np.testing.assert_allclose(weight.detach().numpy(), wanted, atol=2e-5)


def public_projector():
    """The public package's projector, without the rest of it, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("optional: galore-torch is not installed")
    path = Path(spec.submodule_search_locations[0], "galore_projector.py")
    spec = importlib.util.spec_from_file_location("galore_projector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GaLoreProjector


def test_galore_agrees_with_the_public_package():
    GaLoreProjector = public_projector()
    for shape in ((7, 5), (5, 7)):
        grads = [grad.float() for grad in gradients(shape)]
        weight = nn.Parameter(torch.ones(shape))
        stepped(GaLoreAdam([weight], names={weight: "w"}, **SETTINGS), weight, grads)
        projector = GaLoreProjector(2, update_proj_gap=3, scale=0.3, proj_type="std")
        other = torch.ones(shape)
        first = second = 0.0
        for done, grad in enumerate(grads):
            low = projector.project(grad, done)
            first = 0.8 * first + 0.2 * low
            second = 0.9 * second + 0.1 * low**2
            root = (second / (1 - 0.9 ** (done + 1))).sqrt() + 1e-9
            other -= 0.05 * projector.project_back(first / (1 - 0.8 ** (done + 1)) / root)
        torch.testing.assert_close(weight.detach(), other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_randomised_directions_span_the_leading_singular_space(shape):
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    grad = 5 * strong + 0.01 * torch.randn(*shape, generator=generator)
    exact = leading_directions(grad, 3)
    found = leading_directions(grad, 3, generator=torch.Generator().manual_seed(9))
    assert found.shape == exact.shape == ((3, 24) if shape[0] > shape[1] else (24, 3))
    overlap = exact @ found.T if shape[0] > shape[1] else exact.T @ found
    torch.testing.assert_close(torch.linalg.svdvals(overlap), torch.ones(3), atol=1e-4, rtol=0)


def test_vector_adam_without_switches_is_adam():
    grads = [grad.float() for grad in gradients((3, 7))]
    mine, theirs = nn.Parameter(torch.ones(3, 7)), nn.Parameter(torch.ones(3, 7))
    stepped(VectorAdam([mine], lr=0.05, betas=(0.8, 0.9)), mine, grads)
    stepped(torch.optim.Adam([theirs], lr=0.05, betas=(0.8, 0.9)), theirs, grads)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_normalised_sgd_steps_by_rms_one_along_its_dimension(dim, momentum):
    grads = [grad.float() for grad in gradients((4, 6), count=3)]
    for grad in grads:
        grad[1], grad[:, 2] = 0, 0  # no gradient, no step: not 0 / 0
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = NormalisedSGD([weight], lr=0.05, dim=dim, momentum=momentum, weight_decay=0.1)
    stepped(optimizer, weight, grads)
    wanted, mean = np.ones((4, 6)), np.zeros((4, 6))
    for grad in grads:
        mean = momentum * mean + (1 - momentum) * grad.numpy()
        rms = np.sqrt((mean**2).mean(dim, keepdims=True))
        wanted = wanted * (1 - 0.05 * 0.1) - 0.05 * np.divide(
            mean, rms, out=np.zeros_like(mean), where=rms > 0
        )
    np.testing.assert_allclose(weight.detach().numpy(), wanted, atol=1e-5)
    assert len(optimizer.state) == (momentum > 0)


def test_full_scale_keeps_the_heads_momentum_alone_and_normalises_embeddings_by_column(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"method": "full-scale"}, optim={"rest_lr_multiples": [0.5, 2.0, 1.0]})
    model = LlamaForCausalLM(llama_config(recipe.model, vocab_size=300))
    optimizer = load_method("full-scale")(Plan(recipe=recipe)).build_optimizer(model, "full")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.adamw.step()
    held = {names[p]: set(state) for p, state in optimizer.adamw.state.items()}
    assert held.pop("lm_head.weight") == {"exp_avg"}
    assert all(name.endswith("norm.weight") for name in held)
    groups = {names[p]: group for group in optimizer.adamw.param_groups for p in group["params"]}
    assert (groups["model.embed_tokens.weight"]["dim"], groups["lm_head.weight"]["dim"]) == (0, 1)
    assert groups["model.embed_tokens.weight"]["lr"] == 0.5 * recipe.optim.lr
    assert groups["lm_head.weight"]["lr"] == 2 * recipe.optim.lr
    assert optimizer.lr == recipe.optim.lr


@pytest.mark.parametrize("along", [0, 1])
def test_a_switched_vector_waits_and_then_steps_as_in_its_first_step(along):
    grads = [grad.float() for grad in gradients((3, 7))]
    factor = nn.Parameter(torch.ones(3, 7))
    optimizer = VectorAdam([{"params": [factor], "vectors": along}], lr=0.05, betas=(0.8, 0.9))
    stepped(optimizer, factor, grads[:4])
    state = optimizer.state[factor]
    state["updates"][1], state["waits"][1] = 0, 2
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment].select(along, 1).zero_()
    before = factor.detach().clone()
    stepped(optimizer, factor, grads[4:6])
    assert torch.equal(factor.select(along, 1), before.select(along, 1))
    assert not torch.equal(factor.select(along, 2), before.select(along, 2))
    stepped(optimizer, factor, grads[6:7])
    moved = factor.detach().select(along, 1) - before.select(along, 1)
    torch.testing.assert_close(moved, -0.05 * grads[6].select(along, 1).sign(), atol=1e-5, rtol=0)


def test_a_joint_optimizer_does_what_its_parts_do_alone():
    def parameters():
        return nn.Parameter(torch.eye(4, 6)), nn.Parameter(torch.ones(5))

    grads = [
        (torch.randn(4, 6, generator=g), torch.randn(5, generator=g)) for g in [torch.manual_seed(1)] * 4
    ]
    (matrix, vector), (other, third) = parameters(), parameters()
    joint = JointOptimizer(
        [
            ([{"params": [matrix]}], lambda groups: torch.optim.Muon(groups, lr=0.02)),
            ([{"params": [vector]}], lambda groups: torch.optim.AdamW(groups, lr=0.1)),
        ]
    )
    alone = [torch.optim.Muon([other], lr=0.02), torch.optim.AdamW([third], lr=0.1)]
    for first, second in grads:
        matrix.grad, vector.grad, other.grad, third.grad = first, second, first.clone(), second.clone()
        joint.param_groups[1]["lr"] *= 0.5
        alone[1].param_groups[0]["lr"] *= 0.5
        joint.step()
        for optimizer in alone:
            optimizer.step()
    assert torch.equal(matrix, other) and torch.equal(vector, third)
    assert set(joint.state) == {matrix, vector}


def test_switching_vectors_keeps_the_function_and_clears_their_state_alone(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"method": "switchlora"})
    method = SwitchLoRA(Plan(recipe=recipe))
    model = tiny_model()
    inject(model, ReLoRAConfig(rank=3, scaling_rule="matched"), seed=0)
    optimizer = method.build_optimizer(model, "low_rank").adamw
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    method.attach(model, optimizer)
    layer = lora_layers(model)[0]
    before = layer.weight.detach() + layer.delta().float()
    moments = optimizer.state[layer.lora_A]["exp_avg"].clone()
    method._switch_vectors_(layer, torch.tensor([2, 0]), 1)
    torch.testing.assert_close(layer.weight + layer.delta().float(), before, atol=1e-6, rtol=0)
    after = optimizer.state[layer.lora_A]["exp_avg"]
    assert not after[[0, 2]].any() and torch.equal(after[1], moments[1])
    assert optimizer.state[layer.lora_B]["updates"].tolist() == [0, 1, 0]
    assert optimizer.state[layer.lora_A]["waits"].tolist() == [5, 0, 5]
    assert not layer.lora_B[:, [0, 2]].any() and layer.lora_B[:, 1].any()


def test_switches_are_a_third_as_frequent_after_the_given_fraction(tmp_path):
    recipe = tiny_recipe(
        tmp_path, run={"method": "switchlora"}, method={"third_at": 0.5}, train={"steps": 24}
    )
    method = SwitchLoRA(Plan(recipe=recipe))
    assert method.expected_switches(4) == pytest.approx(3 / 40)
    assert method.expected_switches(14) == pytest.approx(1 / 40)


@pytest.mark.parametrize("parameters", [200_000, 1_000_000, 7_000_000])
def test_control_sizes_give_the_count_at_the_same_depth(parameters):
    from transformers import LlamaForCausalLM

    large = ModelConfig(preset="llama-20m")
    small = control_sizes(large, vocab_size=1000, parameters=parameters)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(small, vocab_size=1000))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert (small.num_hidden_layers, small.num_attention_heads) == (4, 4)
    assert 1 < small.intermediate_size / small.hidden_size < 6


def test_a_method_of_ones_own_is_registered_and_found(tmp_path):
    spec = MethodSpec(
        name="mine",
        implementation="relora.train.training_method:TrainingMethod",
        options=MethodOptions,
        has_switch=False,
    )
    register_method(spec)
    try:
        recipe = tiny_recipe(tmp_path, run={"method": "mine"})
        assert recipe.switch_step is None and load_method("mine").__name__ == "TrainingMethod"
    finally:
        from relora.train import methods

        del methods._METHODS["mine"]
