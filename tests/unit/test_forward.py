"""The two forward paths: against a float64 reference, against each other, and in all that wraps them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from method_samples import LAYER_KINDS, as_rows, linear, max_difference, numpy64, train_factors_
from reference import low_rank
from relora import ConfigError, LoRALinear, ReLoRAConfig, inject, merge_and_reinit_
from relora.method.casts import InputCasts
from relora.method.flops import layer_flops, least_tokens
from relora.method.forward import effective_linear

Path = Literal["auto", "factored", "effective"]
PATHS: tuple[Path, ...] = ("factored", "effective")
SIDES = ("both", "B")
FORMS = (*SIDES, "columns")
"""`factors`, and "B" with a lora_A that selects inputs."""


def layer_of(
    path: Path,
    *,
    kind: str = "linear",
    factors: str = "both",
    learned: bool = False,
    shape: tuple[int, int] = (9, 7),
    dtype: torch.dtype = torch.float32,
    rank: int = 3,
    **settings: Any,
) -> LoRALinear:
    """Return an injected layer of (in, out) in mid-cycle."""
    layer = LAYER_KINDS[kind](*shape).to(dtype)
    if factors == "columns":
        factors, settings = "B", {"init": "columns", **settings}
    config = ReLoRAConfig(
        rank=rank,
        alpha=2.0,
        factors=factors,  # type: ignore[arg-type]
        scaling_rule="learned" if learned else "alpha/r",
        forward=path,
        **settings,
    )
    inject(layer, config)
    assert isinstance(layer, LoRALinear)
    train_factors_(layer)
    return layer


def reference_gradients(layer: LoRALinear, x: Tensor, grad: Tensor) -> dict[str, low_rank.Array]:
    scaling = layer.scaling.item() if isinstance(layer.scaling, Tensor) else layer.scaling
    factors = (numpy64(layer.lora_A), numpy64(layer.lora_B), scaling)
    return low_rank.gradients(numpy64(x), numpy64(grad), as_rows(layer), *factors)


def gradients_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


# --- values and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 5, 9), (2, 0, 9), (400, 9)])
def test_gradients_are_the_references(
    path: Path, kind: str, factors: str, learned: bool, shape: tuple[int, ...]
) -> None:
    layer = layer_of(path, kind=kind, factors=factors, learned=learned, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = reference_gradients(layer, x, grad)
    got = gradients_of(layer)
    expected = {"bias", "lora_B"} | ({"lora_A"} if factors == "both" else set())
    assert set(got) == expected | ({"lora_scaling"} if learned else set())
    assert x.grad is not None
    for name, gradient in {**got, "input": x.grad}.items():
        np.testing.assert_allclose(numpy64(gradient), wanted[name], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_gradients_are_the_references_on_either_side_of_where_the_whole_gradient_is_cheaper(
    rank: int,
) -> None:
    layer = layer_of("effective", rank=rank, dtype=torch.float64)
    x = torch.randn(300, 9, dtype=torch.float64)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    for name, gradient in gradients_of(layer).items():
        wanted = reference_gradients(layer, x, grad)[name]
        np.testing.assert_allclose(numpy64(gradient), wanted, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("learned", [False, True])
def test_first_and_second_derivatives_pass_gradcheck(kind: str, factors: str, learned: bool) -> None:
    layer = layer_of("effective", kind=kind, factors=factors, learned=learned, dtype=torch.float64)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    inputs = (x, *(layer.get_parameter(name).detach().clone().requires_grad_() for name in names))
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_the_paths_agree_under_autocast(factors: str, kind: str, base: torch.dtype) -> None:
    outs, grads = [], []
    x = torch.randn(50, 96)
    for path in PATHS:
        layer = layer_of(path, kind=kind, factors=factors, learned=True, shape=(96, 64), rank=24, dtype=base)
        source = x.to(base).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(source)
        out.float().square().mean().backward()
        assert source.grad is not None and source.grad.dtype == base
        outs.append(out.detach().float())
        grads.append({**gradients_of(layer), "input": source.grad})
        assert all(g.dtype == layer.get_parameter(n).dtype for n, g in gradients_of(layer).items())
    # bfloat16 rounds each operand and each product, by 2^-9 of its size.
    assert max_difference(*outs) <= 2**-6 * float(outs[0].abs().max())
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert max_difference(gradient, grads[1][name]) <= 2**-5 * float(gradient.abs().max()), name


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_after_injection_and_restart_the_output_is_the_bases_bit_for_bit(
    kind: str, path: Path, dtype: torch.dtype | None
) -> None:
    x = torch.randn(3, 20, 9)
    plain = LAYER_KINDS[kind](9, 7)

    def outputs(layer: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            first = layer(x)
            with torch.no_grad():
                return [first.detach(), layer(x)]

    wanted = outputs(plain)
    inject(plain, ReLoRAConfig(rank=3, forward=path))
    assert isinstance(plain, LoRALinear)
    assert all(torch.equal(*pair) for pair in zip(outputs(plain), wanted, strict=True))
    train_factors_(plain)
    assert not torch.equal(outputs(plain)[0], wanted[0])
    merge_and_reinit_(plain, seed=0, restart_index=1)
    base = LAYER_KINDS[kind](9, 7)
    base.load_state_dict({"weight": plain.weight, "bias": plain.bias})
    assert all(torch.equal(*pair) for pair in zip(outputs(plain), outputs(base), strict=True))


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("factors", FORMS)
def test_inputs_may_be_views_frozen_or_empty(kind: str, factors: str) -> None:
    layer = layer_of("effective", kind=kind, factors=factors)
    wide = torch.randn(5, 4, 18)
    for view in (wide[..., ::2], wide[..., :9].transpose(0, 1)):
        assert not view.is_contiguous()
        source = view.clone().requires_grad_()
        layer.zero_grad()
        layer(source).square().sum().backward()
        wanted = gradients_of(layer)
        layer.zero_grad()
        layer(view).square().sum().backward()
        for name, gradient in gradients_of(layer).items():
            assert max_difference(gradient, wanted[name]) <= 1e-5 * float(wanted[name].abs().max())
    layer.zero_grad()
    layer(torch.empty(0, 9)).sum().backward()
    assert all(gradient.count_nonzero() == 0 for gradient in gradients_of(layer).values())


def test_an_input_wider_than_the_base_is_computed_in_its_own_dtype() -> None:
    layer = layer_of("effective", dtype=torch.bfloat16)
    out = layer(torch.randn(40, 9))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_a_base_that_somebody_unfreezes_gets_its_gradient(path: Path) -> None:
    layer = layer_of(path, dtype=torch.float64)
    layer.weight.requires_grad_()
    x = torch.randn(30, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    grad = 2 * layer(x).detach()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, grad.T @ x)


# --- what is kept for the backward ----------------------------------------------------------------------


def kept_for_backward(layer: LoRALinear, x: Tensor, *, autocast: bool) -> dict[int, int]:
    """Return storage -> bytes of all that the forward keeps beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.sum().backward()
    return kept


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("factors", "width"), [("both", 40), ("B", 3)])
@pytest.mark.parametrize("learned", [False, True])
def test_the_effective_path_keeps_the_input_or_the_rank_wide_product_and_nothing_else(
    kind: str, autocast: bool, factors: str, width: int, learned: bool
) -> None:
    layer = layer_of("effective", kind=kind, factors=factors, learned=learned, shape=(40, 24))
    x = torch.randn(50, 40, requires_grad=True) * 1.0
    kept = kept_for_backward(layer, x, autocast=autocast)
    assert sum(kept.values()) == 50 * width * (2 if autocast else 4)


class Shared(nn.Module):
    """Three projections of one input, as in attention; the middle one may write into it."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(40, 24, bias=False) for _ in range(3))
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.q(x)
        if self.writes:
            x = x.detach()
            x.mul_(2.0)
        return q + self.k(x) + self.v(x)


@pytest.mark.parametrize("writes", [False, True])
def test_layers_that_share_an_input_share_its_cast_unless_it_is_written(writes: bool) -> None:
    x = torch.randn(50, 40)
    plain = Shared(writes=writes)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(x)
    model = Shared(writes=writes)
    inject(model, ReLoRAConfig(rank=3, forward="effective"))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == (50, 40):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = model(x.requires_grad_())
        assert torch.equal(out, wanted)
    assert sum(kept.values()) == 50 * 40 * 2 * (2 if writes else 1)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_with_a_cast_in_flight_can_be_copied(copies: Callable[[nn.Module], nn.Module]) -> None:
    model = Shared()
    inject(model, ReLoRAConfig(rank=3, forward="effective"))
    x = torch.randn(50, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert torch.equal(copies(model)(x), out)


def test_inference_mode_may_come_before_and_between_training() -> None:
    layer = layer_of("effective")
    x = torch.randn(40, 9)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            made_in_inference = torch.randn(40, 9)
            wanted = layer(x)
        out = layer(x)
        assert torch.equal(out, wanted)
        with torch.no_grad():
            assert layer(made_in_inference).shape == (40, 7)
    out.float().sum().backward()


def test_gradients_through_a_shared_cast_are_those_of_casts_apart() -> None:
    x = torch.randn(50, 40, requires_grad=True)
    gradients = []
    for shares in (True, False):
        model = Shared()
        inject(model, ReLoRAConfig(rank=3, forward="effective", scaling_rule="learned"))
        if not shares:
            for layer in (model.q, model.k, model.v):
                layer._casts = InputCasts()  # type: ignore[assignment]
        train_factors_(model)
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                model(x)  # a cast without a graph is not taken for one with
            out = model(x)
        out.float().square().sum().backward()
        assert x.grad is not None
        gradients.append({**gradients_of(model), "x": x.grad.clone()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


# --- the choice -----------------------------------------------------------------------------------------


def counted_flops(layer: LoRALinear, tokens: int) -> int:
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("factors", SIDES)
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
@pytest.mark.parametrize("tokens", [7, 200])
def test_the_flops_of_both_paths_are_what_torch_counts(
    factors: str, shape: tuple[int, int], tokens: int
) -> None:
    for path in PATHS:
        layer = layer_of(path, factors=factors, shape=shape, rank=5)
        sides = {"out_features": shape[1], "in_features": shape[0], "one_sided": factors == "B"}
        count = layer_flops(path, tokens, rank=5, **sides)  # type: ignore[arg-type]
        assert counted_flops(layer, tokens) == count, path


@pytest.mark.parametrize("factors", SIDES)
@pytest.mark.parametrize("shape", [(24, 24), (25, 96), (96, 27)])
def test_auto_takes_the_path_of_fewer_flops(factors: str, shape: tuple[int, int]) -> None:
    sides = {"out_features": shape[1], "in_features": shape[0], "one_sided": factors == "B"}
    least = least_tokens(**sides)  # type: ignore[arg-type]
    auto = layer_of("auto", factors=factors, shape=shape, rank=5)
    for tokens in (1, least - 1, least, least + 1, 4 * least):
        by_path = {
            path: layer_flops(path, tokens, rank=5, **sides)  # type: ignore[arg-type]
            for path in PATHS
        }
        assert counted_flops(auto, tokens) == min(by_path.values())


@pytest.mark.parametrize("tokens", [20, 200])
def test_a_lora_A_that_selects_inputs_costs_no_product(tokens: int) -> None:
    sides = {"out_features": 20, "in_features": 24, "rank": 5, "one_sided": True, "selects": True}
    for path in PATHS:
        layer = layer_of(path, factors="columns", shape=(24, 20), rank=5)
        assert counted_flops(layer, tokens) == layer_flops(path, tokens, **sides)  # type: ignore[arg-type]


def test_the_whole_gradient_is_formed_only_where_that_is_cheaper() -> None:
    for rank in (4, 6, 12, 23):
        count = counted_flops(layer_of("effective", shape=(24, 24), rank=rank), 500)
        most = layer_flops("effective", 500, out_features=24, in_features=24, rank=rank, one_sided=False)
        assert count <= most


@pytest.mark.parametrize("path", ["auto", "factored", "effective"])
def test_dropout_in_training_takes_the_factored_path_whatever_is_asked(path: Path) -> None:
    layer = layer_of(path, dropout=0.5)
    x = torch.randn(64, 9)
    assert max_difference(layer(x), layer(x)) > 0
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("value", ["fast", "", None, 1, "Effective"])
def test_an_unknown_path_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="forward must be one of 'auto', 'factored', 'effective'"):
        ReLoRAConfig(forward=value)  # type: ignore[arg-type]


# --- wrappers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [3, 7, 40])
def test_gradient_checkpointing_gives_the_same_bits(
    factors: str, use_reentrant: bool, autocast: bool, tokens: int
) -> None:
    layer = layer_of("auto", factors=factors, learned=True)
    x = torch.randn(tokens, 9, requires_grad=True)

    def gradients(call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(x)
        out.float().square().sum().backward()
        assert x.grad is not None
        return {**gradients_of(layer), "input": x.grad}

    wanted = gradients(layer)
    got = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))  # type: ignore[no-any-return]
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    layer, other = layer_of("effective"), layer_of("effective")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    x = torch.randn(30, 9)
    assert torch.equal(functional_call(layer, dict(other.named_parameters()), x), other(x))


@pytest.mark.parametrize("factors", FORMS)
def test_per_sample_gradients_by_vmap_add_up(factors: str) -> None:
    layer = layer_of("effective", factors=factors, dtype=torch.float64)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(6, 4, 9, dtype=torch.float64)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, values, x).square().sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    layer(x).square().sum().backward()
    for name, gradient in gradients_of(layer).items():
        torch.testing.assert_close(single[name].sum(0), gradient)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_is_one_graph_and_lengths_do_not_compile_it_again_and_again(
    factors: str, autocast: bool
) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(linear(9, 11), nn.Tanh(), linear(11, 7))
    settings: dict[str, Any] = {"factors": factors}
    if factors == "columns":
        settings = {"factors": "B", "init": "columns"}
    inject(model, ReLoRAConfig(rank=3, scaling_rule="learned", **settings))
    train_factors_(model)
    compiled = torch.compile(model, backend=counting, fullgraph=True)

    def step(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(x)
        out.float().square().sum().backward()
        return [out.detach(), *gradients_of(model).values()]

    for tokens in (40, 50, 3, 60, 4, 5, 70, 6, 2, 41, 100):
        x = torch.randn(2, tokens, 9)
        pairs = zip(step(compiled, x), step(model, x), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), tokens
    # One for the first length, and one for all lengths on either side of each layer's threshold.
    assert len(graphs) <= 4


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("factors", FORMS)
def test_traced_through_autograd_it_computes_the_same(factors: str) -> None:
    layer = layer_of("effective", factors=factors, learned=True, shape=(24, 16))
    x = torch.randn(40, 24, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x.grad = None
        out = call(x)
        out.square().sum().backward()
        assert x.grad is not None
        results.append({**gradients_of(layer), "input": x.grad.clone(), "out": out.detach()})
    for name, wanted in results[0].items():
        # Another order of summation, in float32.
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-4, atol=1e-4)


def test_it_is_a_function_of_tensors_alone() -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    A, B = torch.randn(2, 4), torch.randn(3, 2)
    out = effective_linear(x, None, A, B, 0.5, weight)
    np.testing.assert_allclose(
        out.numpy(),
        low_rank.forward(numpy64(x), numpy64(weight), None, numpy64(A), numpy64(B), 0.5),
        rtol=1e-4,
        atol=1e-5,
    )
