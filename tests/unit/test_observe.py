"""Observed gradients are the base's, each once, and looking changes nothing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from loops import Loop
from method_samples import LAYER_KINDS, layers_of, mlp
from relora import ConfigError, ReLoRA, ReLoRAConfig, fold, inject
from relora.method.observe import Observers, observed

CONFIG = ReLoRAConfig(rank=3, factors="B", restart_every=100)
WATCHING = ReLoRAConfig(rank=3, factors="B", restart_every=3, residual="sign", scaling_rule="matched")


class Recorder:
    forms_product = False

    def __init__(self):
        self.gradients = []

    def observe(self, x, gradient):
        assert not torch.is_grad_enabled() and x.dtype == gradient.dtype
        self.gradients.append(gradient.T.double() @ x.double())


def watched(model):
    inject(model, CONFIG)
    recorders = {}
    for name, layer in layers_of(model).items():
        recorders[name] = Recorder()
        layer.observers = Observers([recorders[name]])
    return recorders


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 5, 9)])
def test_what_is_observed_is_the_gradient_that_the_plain_weight_would_get(kind, shape):
    model = nn.Sequential(LAYER_KINDS[kind](9, 7), nn.Tanh()).double()
    plain = copy.deepcopy(model)
    recorders = watched(model)
    x = torch.randn(shape, dtype=torch.float64)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    wanted = plain[0].weight.grad.T if kind == "conv1d" else plain[0].weight.grad
    (gradient,) = recorders["0"].gradients
    torch.testing.assert_close(gradient, wanted)


def test_looking_changes_neither_outputs_nor_gradients():
    bare, model = mlp(), mlp()
    inject(bare, CONFIG)
    watched(model)
    x = torch.randn(5, 9, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    left, right = bare(x), model(y)
    assert torch.equal(left, right)
    left.square().sum().backward()
    right.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for ours, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_an_activation_may_work_in_place_on_an_observed_output():
    model, plain = (nn.Sequential(nn.Linear(9, 7), nn.ReLU(inplace=True), nn.Linear(7, 5)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    recorders = watched(model)
    x = torch.randn(4, 9)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(recorders["0"].gradients[0], plain[0].weight.grad.double())


def test_an_output_that_is_a_view_made_inside_another_node_is_observed_too():
    class Reshaping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return (x.reshape(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return None, gradient.flatten(0, -2).T @ x.flatten(0, -2)

    recorder, weight = Recorder(), torch.randn(5, 4, requires_grad=True)
    x = torch.randn(2, 3, 4)
    output = observed(Reshaping.apply(x, weight), x, Observers([recorder]))
    torch.relu(output).square().sum().backward()
    torch.testing.assert_close(recorder.gradients[0].float(), weight.grad)


def test_nothing_is_kept_for_a_layer_without_observers_nor_where_no_gradient_is_wanted():
    def saved_bytes(model, x):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x).sum()
        return sum(sizes)

    model = nn.Sequential(nn.Linear(9, 7))
    recorders = watched(model)
    x = torch.randn(50, 9)
    with_observer = saved_bytes(model, x)
    model[0].observers = ()
    without = saved_bytes(model, x)
    assert with_observer == without + x.numel()
    model[0].observers = Observers([recorders["0"]])
    with torch.no_grad():
        assert model(x).grad_fn is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_shows_every_gradient_once(use_reentrant):
    plain, model = mlp(), mlp()
    recorders = watched(model)
    x = torch.randn(5, 9, requires_grad=True)
    for parts in range(1, 4):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        assert [len(r.gradients) for r in recorders.values()] == [parts, parts]
    plain(x).square().sum().backward()
    for name, recorder in recorders.items():
        torch.testing.assert_close(recorder.gradients[-1].float(), plain.get_submodule(name).weight.grad)


def test_under_autocast_the_gradient_is_that_of_full_rank_under_autocast():
    plain, model = mlp(), mlp()
    recorders = watched(model)
    x = torch.randn(5, 9)
    for each in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(x).float().square().sum()
        loss.backward()
    for name, recorder in recorders.items():
        # Full rank rounds its sum over rows to bf16; ours here does not.
        wanted = plain.get_submodule(name).weight.grad.double()
        torch.testing.assert_close(
            recorder.gradients[0], wanted, rtol=2**-8, atol=2**-8 * float(wanted.abs().max())
        )


def test_a_copy_of_a_model_is_not_observed():
    loop = Loop(WATCHING)
    assert loop.model.up.observers
    for copied in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
        assert copied.up.observers == ()
        copied(torch.randn(3, 7)).sum().backward()


def test_a_folded_model_has_no_observers_left():
    loop = Loop(WATCHING)
    fold(loop.model)
    assert not hasattr(loop.model.up, "observers")


@pytest.mark.parametrize("policy", [{"residual": "sign"}, {"residual": "column"}, {"init": "gradient"}])
def test_a_compiled_model_is_refused_in_words(policy):
    config = ReLoRAConfig(rank=3, factors="B", **policy)
    for compile_ in (lambda m: torch.compile(m, backend="eager"), compiled_in_place, compiled_inside):
        with pytest.raises(ConfigError, match=r"eager mode only, but .* is compiled"):
            Loop(config, wrap=compile_)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_inside(model):
    return nn.Sequential(torch.compile(model, backend="eager"))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, of a broken graph
def test_compiled_afterwards_the_layers_run_eagerly_and_right_or_are_refused():
    torch._dynamo.reset()
    eager, later = Loop(WATCHING), Loop(WATCHING)
    later.called = torch.compile(later.model, backend="aot_eager")
    for loop in (eager, later):
        loop.run(1, 7)
    assert later.relora.complement_report.moved_fraction == 1
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(value, later.model.state_dict()[name])
    torch._dynamo.reset()
    whole = Loop(WATCHING)
    whole.called = torch.compile(whole.model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ConfigError"):
        whole.run(1, 1)


def test_observers_of_a_second_relora_take_the_place_of_the_first_ones():
    loop = Loop(WATCHING)
    first = loop.model.up.observers
    ReLoRA(loop.model, loop.optimizers[0], WATCHING)
    assert len(loop.model.up.observers) == 1 and loop.model.up.observers is not first


def test_functional_and_shared_use_of_a_layer_is_observed_call_by_call():
    model = nn.Sequential(nn.Linear(6, 6))
    plain = copy.deepcopy(model).double()
    recorders = watched(model.double())
    x = torch.randn(4, 6, dtype=torch.float64)
    F.silu(model(F.silu(model(x)))).sum().backward()
    F.silu(plain(F.silu(plain(x)))).sum().backward()
    first, second = recorders["0"].gradients
    torch.testing.assert_close(first + second, plain[0].weight.grad)
