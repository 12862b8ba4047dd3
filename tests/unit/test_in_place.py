"""Full rank without a gradient of the weight: the right step, nothing else kept, ranks alike."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import relora.lab.methods  # noqa: F401 - their names
from loops import batch, tiny_model
from method_samples import LAYER_KINDS, as_rows
from ranks import on_two_ranks
from reference.beyond import majority, newton_schulz, unit_columns
from relora import ConfigError
from relora.method.in_place import InPlace
from relora.train.fit import fit
from relora.train.in_place_optimizer import InPlaceOptimizer
from relora.train.methods import load_method
from relora.train.phase import Plan
from tiny_run import tiny_recipe
from tiny_sizes import SIZES, VOCAB_SIZE

KINDS = ("sign", "column", "muon")
SIZE = 1e-2
SHAPES = {"up": (11, 7), "down": (9, 11)}


def backward(model, step, parts=1, *, chosen=slice(None)):
    x, y = batch(step)
    for part, target in list(zip(x.chunk(parts), y.chunk(parts), strict=True))[chosen]:
        ((model(part.double()) - target).square().mean() / parts).backward()


def gradients(model, step, parts):
    """Each micro batch's gradients by autograd."""
    found = []
    for part in range(parts):
        plain = copy.deepcopy(model)
        backward(plain, step, parts, chosen=slice(part, part + 1))
        found.append({name: as_rows_of_grad(plain.get_submodule(name)) for name in ("up", "down")})
    return found


def as_rows_of_grad(layer):
    holder = copy.copy(layer)
    holder._parameters = dict(layer._parameters, weight=nn.Parameter(layer.weight.grad))
    return as_rows(holder)


@pytest.mark.parametrize("kind", ["sign", "column"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("layer_kind", LAYER_KINDS)
def test_weights_move_by_the_sign_or_the_columns_of_their_gradient(kind, parts, layer_kind):
    model = tiny_model()
    model.down = LAYER_KINDS[layer_kind](11, 9)
    model = model.double()
    plain = copy.deepcopy(model)
    trained = InPlace(model, {"up": model.up, "down": model.down}, kind=kind)
    backward(model, 1, parts)
    report = trained.step_(1, size=SIZE, keep=0.9)
    seen = gradients(plain, 1, parts)
    for name in ("up", "down"):
        own = [each[name] for each in seen]
        direction = majority(own) if kind == "sign" else unit_columns(sum(own))
        wanted = 0.9 * as_rows(plain.get_submodule(name)) - SIZE * direction
        # "column" keeps its sums in bf16.
        atol = 1e-12 if kind == "sign" else 2**-6 * SIZE
        np.testing.assert_allclose(as_rows(model.get_submodule(name)), wanted, rtol=0, atol=atol)
        assert model.get_submodule(name).weight.grad is None
        assert model.get_submodule(name).bias.grad is not None
    weights = 7 * 11 + 11 * 9
    assert (report.num_layers, report.moved_fraction) == (2, 1.0)
    assert report.held_bytes == weights * (1 if kind == "sign" else 2)
    assert report.flops == 2 * weights * 16


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("layer_kind", LAYER_KINDS)
def test_weights_move_by_their_orthogonalised_momentum(parts, layer_kind):
    model = tiny_model()
    model.down = LAYER_KINDS[layer_kind](11, 9)
    model = model.double()
    plain = copy.deepcopy(model)
    momenta = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    layers = {name: model.get_submodule(name) for name in SHAPES}
    trained = InPlace(model, layers, kind="muon", momentum=lambda weight: momenta[weight.name])
    means = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in (1, 2, 3):
        before = {name: as_rows(layer).copy() for name, layer in layers.items()}
        plain.load_state_dict(model.state_dict())
        seen = gradients(plain, step, parts)
        backward(model, step, parts)
        report = trained.step_(step, size=SIZE, keep=0.9)
        for name, layer in layers.items():
            means[name] = 0.9 * means[name] + 0.1 * sum(each[name] for each in seen)
            direction = 0.2 * max(SHAPES[name]) ** 0.5 * newton_schulz(means[name])
            np.testing.assert_allclose(
                as_rows(layer), 0.9 * before[name] - SIZE * direction, rtol=0, atol=1e-9
            )
            np.testing.assert_allclose(momenta[name].numpy(), means[name], rtol=0, atol=1e-12)
            assert layer.weight.grad is None
    assert (report.num_layers, report.moved_fraction) == (2, 1.0)
    trained.drop(3)
    assert not any(momentum.any() for momentum in momenta.values())


def test_muon_in_place_counts_its_weights_and_their_two_bytes(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"method": "muon-in-place"})
    summary = fit(recipe).summary
    matrices = 2 * (4 * 24 * 24 + 3 * 24 * 40)
    rest = summary["parameters_total"] - matrices
    assert summary["parameters_trainable"] == summary["parameters_total"] > matrices
    # AdamW's two float32 moments of the rest, with a step count a tensor.
    assert summary["optimizer_bytes"] - 2 * matrices - 8 * rest in range(0, 100)


def muon_in_place(tmp_path, name="muon-in-place", **changes):
    """Return the method, a model, its optimizer, and what makes a backward pass of a step."""
    plan = Plan(recipe=tiny_recipe(tmp_path, run={"method": name}, **changes))
    config = AutoConfig.for_model("llama", **SIZES)
    torch.manual_seed(0)
    method, model = load_method(name)(plan), AutoModelForCausalLM.from_config(config)

    def look(step):
        ids = torch.randint(0, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()

    phase = "full" if plan.switch_step is None else "warm_start"
    return method, model, method.build_optimizer(model, phase).adamw, look


def momenta_of(optimizer):
    return {p: state["momentum"] for p, state in optimizer.state.items() if "momentum" in state}


def test_muon_in_place_steps_by_its_rate_and_decay(tmp_path):
    method, model, optimizer, look = muon_in_place(tmp_path, optim={"lr": 5e-3, "weight_decay": 0.5})
    for step in (1, 2):
        before = {p: p.detach().double().numpy() for p in model.parameters()}
        optimizer.zero_grad()
        look(step)
        optimizer.step()
        method.after_step(step)
        moved = momenta_of(optimizer)
        assert len(moved) == 14 and all(p.grad is None for p in moved)
        for parameter, momentum in moved.items():
            assert momentum.dtype == torch.bfloat16
            direction = 0.2 * max(momentum.shape) ** 0.5 * newton_schulz(momentum.double().numpy())
            wanted = (1 - 5e-3 * 0.5) * before[parameter] - 5e-3 * direction
            np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=0, atol=1e-6)


START = {"warm_start_steps": 4, "warm_start_kind": "muon"}


@pytest.mark.parametrize(
    ("name", "changes"), [("muon-in-place", {}), ("lora", {"relora": START}), ("relora", {"relora": START})]
)
def test_a_refused_step_costs_muon_in_place_its_momenta_and_says_so(tmp_path, name, changes):
    method, _, optimizer, look = muon_in_place(tmp_path, name, **changes)
    look(1)
    optimizer.step()
    method.after_step(1)
    assert len(momenta_of(optimizer)) == 14
    assert all(momentum.any() for momentum in momenta_of(optimizer).values())
    look(2)
    assert method.step_refused(2) == "Muon's momenta begin anew"
    method.after_step(2)
    assert not any(momentum.any() for momentum in momenta_of(optimizer).values())
    assert method.state_dict() == {"step": 2}


@pytest.mark.parametrize(("scale", "kind"), [(0.5, "sign"), (3.0, "column")])
def test_a_warm_start_decays_weights_by_the_rate_and_not_by_its_scale(tmp_path, scale, kind):
    relora = {"warm_start_steps": 4, "warm_start_kind": kind, "warm_start_scale": scale}
    method, model, optimizer, look = muon_in_place(
        tmp_path, "lora", relora=relora, optim={"lr": 5e-3, "weight_decay": 0.5}
    )
    hidden = [layer.weight for name, layer in model.named_modules() if name.endswith("_proj")]
    before = [weight.detach().clone() for weight in hidden]
    look(1)
    optimizer.step()
    moved = [weight - (1 - 5e-3 * 0.5) * old for weight, old in zip(hidden, before, strict=True)]
    for step in moved:
        size = step.abs().max() if kind == "sign" else step.square().mean().sqrt()
        assert size.item() == pytest.approx(5e-3 * scale, rel=1e-3)
    assert method.state_dict() == {"step": 1} and method.step_refused(2) == ""


@pytest.mark.parametrize("kind", ["sign", "column", "muon"])
def test_at_the_switch_nothing_of_a_warm_start_in_place_is_left(tmp_path, kind):
    relora = {"warm_start_steps": 4, "warm_start_kind": kind}
    method, model, optimizer, look = muon_in_place(tmp_path, "lora", relora=relora)
    look(1)
    optimizer.step()
    targets = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert all(layer._forward_hooks and not layer.weight.requires_grad for layer in targets)
    gc.collect()
    gc.disable()  # what is left must be nothing's, not a cycle's
    try:
        gone = [weakref.ref(part) for part in optimizer.parts if isinstance(part, InPlaceOptimizer)]
        optimizer.state.clear()
        method.switch_(model)
        optimizer = None
        assert len(gone) == 1 and gone[0]() is None
    finally:
        gc.enable()
    assert not any(layer._forward_hooks for layer in targets)
    trained = method.build_optimizer(model, "low_rank").adamw
    look(2)
    trained.step()
    assert not momenta_of(trained) and method.state_dict() is None


def test_muon_in_place_does_not_compile(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.compile must be false"):
        tiny_recipe(tmp_path, run={"method": "muon-in-place"}, train={"compile": True})


def test_after_its_release_autograd_has_the_weights_again():
    model = tiny_model(torch.float64)
    trained = InPlace(model, {"up": model.up}, kind="sign")
    assert not model.up.weight.requires_grad and model.down.weight.requires_grad
    trained.release_()
    backward(model, 1)
    assert model.up.weight.grad is not None and not model.up._forward_hooks


def test_what_was_seen_of_a_step_not_taken_is_dropped():
    model, other = tiny_model(torch.float64), tiny_model(torch.float64)
    for each, steps in ((model, (1, 2)), (other, (2,))):
        trained = InPlace(each, {"up": each.up, "down": each.down}, kind="sign")
        for step in steps:
            trained.drop(step - 1)
            backward(each, step)
        trained.step_(1, size=SIZE)
    assert torch.equal(model.up.weight, other.up.weight)


def test_entries_that_are_not_finite_move_nothing():
    model = tiny_model(torch.float64)
    before = model.up.weight.detach().clone()
    trained = InPlace(model, {"up": model.up}, kind="sign")
    x, y = batch(1)
    x[:, 3] = float("nan")
    (model(x.double()) - y).nan_to_num().square().mean().backward()
    report = trained.step_(1, size=SIZE)
    assert report.num_non_finite >= 11 and torch.equal(model.up.weight[:, 3], before[:, 3])
    assert model.up.weight.isfinite().all()


def test_what_cannot_work_is_refused_in_words():
    model = tiny_model(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"up is torch\.bfloat16: most of a step would be rounded away"):
        InPlace(model, {"up": model.up}, kind="sign")
    model = tiny_model()
    with pytest.raises(ConfigError, match="is compiled"):
        InPlace(torch.compile(model, backend="eager"), {"up": model.up}, kind="sign")
    trained = InPlace(model, {"up": model.up}, kind="column")
    with pytest.raises(ConfigError, match="saw no backward pass through any of 1 layers"):
        trained.step_(1, size=SIZE)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"run": {"method": "galore"}}, r"warm_start_kind must not be 'sign' with run\.method 'galore'"),
        ({"train": {"compile": True}}, r"train\.compile must be false with relora\.warm_start_kind"),
        ({"relora": {"warm_start_scale": 0.0}}, r"warm_start_scale must be above 0"),
    ],
)
def test_recipes_it_does_not_fit_are_refused(tmp_path, changes, complaint):
    relora = {"warm_start_kind": "sign", **changes.get("relora", {})}
    with pytest.raises(ConfigError, match=complaint):
        tiny_recipe(tmp_path, **{**changes, "relora": relora})


def trained(rank, kind, world_size=2):
    model = tiny_model(torch.float64)
    momenta = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    keeps = {"momentum": lambda weight: momenta[weight.name]} if kind == "muon" else {}
    start = InPlace(model, {"up": model.up, "down": model.down}, kind=kind, **keeps)
    called = nn.parallel.DistributedDataParallel(model) if world_size == 2 else model
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2, 3):
        sgd.zero_grad()
        x, y = (tensor.chunk(2) for tensor in batch(step))
        share = [rank] if world_size == 2 else [0, 1]
        for part in share:
            ((called(x[part].double()) - y[part]).square().mean() / len(share)).backward()
        sgd.step()
        report = start.step_(step, size=SIZE)
    assert report.shared_bytes == (report.held_bytes if world_size == 2 else 0)
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained_by_each(rank):
    """Starting ranks takes seconds, training them none."""
    return [trained(rank, kind) for kind in KINDS]


def test_two_ranks_are_one_process_with_both_micro_batches():
    both = on_two_ranks(trained_by_each)
    for kind, left, right in zip(KINDS, *both, strict=True):
        alone = trained(0, kind, world_size=1)
        for name, value in left.items():
            assert torch.equal(value, right[name])
            # DDP means gradients, which halve what one process sums: no direction feels it.
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-3 if kind == "column" else 1e-9)
