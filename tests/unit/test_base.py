"""How the device holds the base: bfloat16 or codes, the exact value beside it or in host memory."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from live_bytes import LiveBytes
from method_samples import (
    LAYER_KINDS,
    as_rows,
    layers_of,
    linear,
    max_difference,
    mlp,
    numpy64,
    same_bits,
    snapshot,
    train_factors_,
)
from reference import low_rank
from relora import ConfigError, LoRALinear, ReLoRAConfig, fold, inject, merge_and_reinit_
from relora.method.codecs import Int8
from relora.method.spectrum import function_weights

BF16 = {"base_dtype": "bf16"}
BF16_HOST = {"base_dtype": "bf16", "master": "host"}
INT8 = {"base_dtype": "int8", "master": "host"}
NF4 = {"base_dtype": "nf4", "master": "host"}
CODED = [INT8, NF4]
STORES = [BF16, BF16_HOST, INT8, NF4]


def name_of(store: dict[str, str]) -> str:
    return "-".join(store.values())


stores = pytest.mark.parametrize("store", STORES, ids=name_of)
coded = pytest.mark.parametrize("store", CODED, ids=name_of)
kinds = pytest.mark.parametrize("kind", LAYER_KINDS)


@pytest.fixture(autouse=True)
def bridge(request: pytest.FixtureRequest) -> None:
    store = request.node.callspec.params.get("store", {}) if hasattr(request.node, "callspec") else {}
    if store.get("base_dtype") == "nf4":
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
        import relora.integrations.bitsandbytes  # noqa: F401


def layer_of(
    store: dict[str, str],
    *,
    kind: str = "linear",
    shape: tuple[int, int] = (9, 7),
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LoRALinear:
    layer = LAYER_KINDS[kind](*shape).to(dtype)
    inject(layer, ReLoRAConfig(rank=rank, scaling_rule="alpha/r", **store, **settings))  # type: ignore[arg-type]
    assert isinstance(layer, LoRALinear)
    return layer


def exact(layer: LoRALinear) -> Tensor:
    layer.drop_stale_residual_()
    return layer.master_rows(slice(None)).clone()


# --- nothing is lost ------------------------------------------------------------------------------------


@stores
@kinds
def test_the_exact_base_and_its_merges_are_those_of_a_float32_base_bit_for_bit(
    store: dict[str, str], kind: str
) -> None:
    layer, wanted = layer_of(store, kind=kind), layer_of({}, kind=kind)
    assert torch.equal(exact(layer), exact(wanted))
    for restart_index in range(1, 6):
        for each in (layer, wanted):
            train_factors_(each, std=1e-3, seed=restart_index)
            report = merge_and_reinit_(each, seed=0, restart_index=restart_index)
            assert report.relative_merge_error < 1e-3 and not report.unmoved_layers
        assert torch.equal(exact(layer), exact(wanted))


@stores
@kinds
def test_the_forward_uses_the_stored_base_and_the_restart_report_says_what_that_changes(
    store: dict[str, str], kind: str
) -> None:
    layer = layer_of(store, kind=kind, shape=(96, 64))
    train_factors_(layer)
    delta = low_rank.delta(numpy64(layer.lora_A), numpy64(layer.lora_B), 1.0)
    before = numpy64(layer.weight_rows(slice(None))) + delta
    report = merge_and_reinit_(layer, seed=0, restart_index=1)
    after = numpy64(layer.weight_rows(slice(None)))
    assert report.max_function_change == pytest.approx(np.abs(after - before).max(), rel=1e-6)


@stores
@kinds
@pytest.mark.parametrize("path", ["factored", "effective"])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradients_are_the_references_for_the_stored_base(
    store: dict[str, str], kind: str, path: str, autocast: bool
) -> None:
    layer = layer_of(store, kind=kind, shape=(96, 64), rank=5, forward=path)
    train_factors_(layer)
    x = torch.randn(2, 40, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    grad = torch.randn(out.shape).to(out.dtype)
    out.backward(grad)
    base = numpy64(layer.weight_rows(slice(None)))
    factors = (base, numpy64(layer.lora_A), numpy64(layer.lora_B), 1.0)
    assert layer.bias is not None and x.grad is not None
    wanted = low_rank.gradients(numpy64(x), numpy64(grad), *factors)
    got = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert got.keys() == {"bias", "lora_A", "lora_B"}
    got["input"] = x.grad
    # float32 sums of 96 terms, or bfloat16 operands and products.
    tolerance = 2**-5 if autocast else 2**-17
    reference = low_rank.forward(numpy64(x), base, numpy64(layer.bias), *factors[1:])
    assert np.abs(numpy64(out) - reference).max() <= tolerance * np.abs(reference).max()
    for name, gradient in got.items():
        error = np.abs(numpy64(gradient) - wanted[name]).max()
        assert error <= tolerance * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize("store", [BF16, BF16_HOST], ids=name_of)
def test_under_bfloat16_autocast_a_bfloat16_base_is_the_float32_base_bit_for_bit(
    store: dict[str, str],
) -> None:
    x = torch.randn(40, 9)
    for path in ("factored", "effective"):
        layer, plain = layer_of(store, forward=path), linear(9, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), plain(x))


def survival(layer: LoRALinear, *, merges: int, size: float) -> tuple[float, float]:
    """Merge deltas of 1 % of the base each; return what share of their sum the exact base has, and what share
    a base would have that is coded anew from its own codes at each merge."""
    everything = slice(None)
    start = exact(layer)
    stored_start = layer.weight_rows(everything)
    codec = layer._codec
    assert codec is not None
    naive = stored_start.clone()
    wanted = torch.zeros_like(start)
    for index in range(1, merges + 1):
        train_factors_(layer, seed=index)
        with torch.no_grad():
            layer.lora_B.mul_(size * start.norm() / layer.delta().norm())
        delta = layer.delta().float()
        wanted += delta
        naive = codec.decode(*codec.encode(naive + delta), columns=layer.in_features, dtype=torch.float32)
        merge_and_reinit_(layer, seed=0, restart_index=index)

    def share(change: Tensor) -> float:
        return float((change * wanted).sum() / wanted.square().sum())

    return share(exact(layer) - start), share(naive - stored_start)


def test_what_codes_alone_lose_in_20_merges_of_1_percent_the_host_master_keeps() -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    import relora.integrations.bitsandbytes  # noqa: F401

    kept, naive = survival(layer_of(NF4, shape=(256, 128), rank=8), merges=20, size=0.01)
    assert kept == pytest.approx(1, abs=1e-6)
    assert naive < 0.1


def test_int8_codes_are_within_half_a_step_and_zeros_stay_zeros() -> None:
    values = torch.randn(7, 150) * torch.logspace(-3, 2, 7).unsqueeze(1)
    values[3] = 0
    values[4, 64:] = 0
    codec = Int8()
    stored, scale = codec.encode(values)
    assert stored.dtype == torch.int8 and stored.shape == (7, 192) and scale.shape == (7, 3)
    decoded = codec.decode(stored, scale, columns=150, dtype=torch.float32)
    step = scale.repeat_interleave(64, 1)[:, :150]
    assert ((decoded - values).abs() <= 0.5001 * step).all()
    assert (decoded[values == 0] == 0).all()
    again = codec.encode(decoded)
    assert torch.equal(again[0], stored)


@coded
def test_rows_are_coded_by_themselves(store: dict[str, str]) -> None:
    layer = layer_of(store, shape=(150, 70))
    codec = layer._codec
    assert codec is not None
    stored, scale = codec.encode(exact(layer)[10:20])
    assert torch.equal(stored, layer.weight[10:20])
    assert layer.weight_scale is not None and torch.equal(scale, layer.weight_scale[10:20])


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "bytes_a_weight"),
    [({}, 4), (BF16, 4), (BF16_HOST, 2), (INT8, 1 + 4 / 64), (NF4, 0.5 + 4 / 64)],
    ids=["float32", "bf16", "bf16-host", "int8", "nf4"],
)
def test_the_device_holds_the_stored_base_and_no_more(store: dict[str, str], bytes_a_weight: float) -> None:
    layer = layer_of(store, shape=(256, 128))
    factors = {"lora_A", "lora_B", "bias"}
    tensors = [(n, t) for n, t in (*layer.named_parameters(), *layer.named_buffers()) if n not in factors]
    held = sum(t.untyped_storage().nbytes() for _, t in tensors if t.ndim)
    assert held == 256 * 128 * bytes_a_weight


@stores
@pytest.mark.parametrize("path", ["factored", "effective"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_decoded_or_cast_base_is_kept_for_the_backward(
    store: dict[str, str], path: str, autocast: bool
) -> None:
    layer = layer_of(store, shape=(96, 64), rank=5, forward=path)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(torch.randn(31, 96, requires_grad=True))
    assert all(t.numel() < 96 * 64 / 2 for t in kept if t.shape[0] != 31)


@pytest.mark.parametrize("store", [{}, BF16, BF16_HOST, INT8], ids=["float32", "bf16", "bf16-host", "int8"])
def test_a_restart_needs_less_than_one_layers_memory_more(store: dict[str, str]) -> None:
    layer = layer_of(store, shape=(512, 512), rank=32)
    train_factors_(layer)
    with LiveBytes() as live:
        merge_and_reinit_(layer, seed=0, restart_index=1)
    assert 0 < live.peak < 512 * 512 * 4
    assert live.now <= 8  # the checksum


# --- state ----------------------------------------------------------------------------------------------


def stack(*, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        linear(9, 11, seed=seed), nn.Tanh(), LAYER_KINDS["conv1d"](11, 7), nn.Linear(7, 8, bias=False)
    )


def trained(store: dict[str, str], *, merges: int = 2, seed: int = 0) -> nn.Sequential:
    model = stack(seed=seed)
    inject(model, ReLoRAConfig(rank=3, **store))  # type: ignore[arg-type]
    for restart_index in range(1, merges + 1):
        train_factors_(model, seed=restart_index)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)
    train_factors_(model, seed=99)
    return model


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors there are: state dict, codes, and the exact base."""
    exact_bases = {f"{n} exact": exact(layer) for n, layer in layers_of(model).items()}
    stored = {f"{n} part {i}": t for n, m in layers_of(model).items() for i, t in enumerate(m.base_parts)}
    return {k: v.detach().clone() for k, v in {**model.state_dict(), **exact_bases, **stored}.items()}


@stores
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_gives_the_same_model_bit_for_bit(store: dict[str, str], assign: bool) -> None:
    model, other = trained(store), trained(store, merges=0, seed=5)
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=assign)
    assert same_bits(everything(other), everything(model))
    x = torch.randn(40, 9)
    assert torch.equal(other(x), model(x))
    for each in (model, other):
        merge_and_reinit_(each, seed=0, restart_index=3)
    assert same_bits(everything(other), everything(model))


@pytest.mark.parametrize("source", [{}, *STORES[:3]], ids=["float32", "bf16", "bf16-host", "int8"])
@pytest.mark.parametrize("target", [{}, *STORES[:3]], ids=["float32", "bf16", "bf16-host", "int8"])
def test_checkpoints_go_from_any_store_to_any_other(source: dict[str, str], target: dict[str, str]) -> None:
    model, other = trained(source), trained(target, merges=1, seed=5)
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    for name, weights in function_weights(model).items():
        assert torch.equal(function_weights(other)[name], weights)


@stores
def test_a_plain_checkpoint_loads_and_fold_gives_the_plain_model_back(store: dict[str, str]) -> None:
    plain, model = stack(seed=3), trained(store)
    wanted = snapshot(plain)
    model.load_state_dict(snapshot(plain), strict=True)
    for name, layer in layers_of(model).items():
        assert np.array_equal(numpy64(exact(layer)), as_rows(plain.get_submodule(name)))
        assert layer.lora_B.count_nonzero() == 0
    parameters = dict(model.named_parameters())
    fold(model)
    assert same_bits(snapshot(model), wanted)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert all(p.requires_grad for p in model.parameters())
    assert not [key for m in model for key in vars(m) if key.startswith(("_host", "_codec", "_plain"))]


@coded
def test_a_checkpoint_of_another_shape_is_refused_even_one_shaped_like_the_codes(
    store: dict[str, str],
) -> None:
    layer = layer_of(store, shape=(9, 7))
    before = everything(nn.Sequential(layer))
    for shape in ((7, 10), tuple(layer.weight.shape)):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict({**snapshot(layer), "weight": torch.zeros(shape)})
    assert same_bits(everything(nn.Sequential(layer)), before)


@pytest.mark.parametrize("store", [BF16, BF16_HOST], ids=name_of)
@pytest.mark.parametrize("reader", ["merge", "checkpoint"])
def test_a_weight_that_somebody_else_has_written_is_right(store: dict[str, str], reader: str) -> None:
    model = trained(store)
    layer = layers_of(model)["0"]
    with torch.no_grad():
        layer.weight.mul_(0.5)
    wanted = as_rows(layer)
    if reader == "merge":
        wanted = wanted + numpy64(layer.delta())
        merge_and_reinit_(model, seed=0, restart_index=3)
    else:
        state = snapshot(model)
        model = trained(store, seed=4)
        model.load_state_dict(state)
    np.testing.assert_allclose(numpy64(exact(layers_of(model)["0"])), wanted, rtol=1e-6)


@coded
def test_codes_that_somebody_else_has_written_are_right(store: dict[str, str]) -> None:
    layer, other = layer_of(store), layer_of(store)
    with torch.no_grad():
        other.lora_B.normal_()
    merge_and_reinit_(other, seed=0, restart_index=1)
    assert layer.weight_scale is not None and other.weight_scale is not None
    with torch.no_grad():
        layer.weight.copy_(other.weight)  # as DDP's first broadcast does
        layer.weight_scale.copy_(other.weight_scale)
    assert torch.equal(exact(layer), other.weight_rows(slice(None)))


@stores
def test_copies_and_pickles_are_whole(store: dict[str, str]) -> None:
    model = trained(store)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(everything(other), everything(model))
        merge_and_reinit_(other, seed=0, restart_index=3)
        assert not same_bits(everything(other), everything(model))


@stores
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_casting_the_model_leaves_the_stored_base_and_its_exact_value(
    store: dict[str, str], dtype: torch.dtype
) -> None:
    model = trained(store)
    before = {name: (exact(m), m.weight.detach().clone()) for name, m in layers_of(model).items()}
    model.to(dtype)
    for name, layer in layers_of(model).items():
        value, stored = before[name]
        assert layer.weight.dtype == stored.dtype and torch.equal(layer.weight, stored)
        assert torch.equal(exact(layer), value)
        assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert model(torch.randn(40, 9, dtype=dtype)).dtype == dtype
    fold(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_half_precision_model_may_keep_its_residual_on_the_host() -> None:
    device, host = (stack().bfloat16() for _ in range(2))
    for model, place in ((device, "device"), (host, "host")):
        inject(model, ReLoRAConfig(rank=3, master=place))  # type: ignore[arg-type]
        for restart_index in (1, 2):
            train_factors_(model, seed=restart_index)
            merge_and_reinit_(model, seed=0, restart_index=restart_index)
    assert same_bits(snapshot(device), snapshot(host))
    names = {name for name, _ in host.named_buffers() if name.endswith("weight_residual")}
    assert not names and any(n.endswith("weight_residual") for n, _ in device.named_buffers())
    host.float()
    assert all(
        max_difference(w, function_weights(device)[n]) < 1e-6 for n, w in function_weights(host).items()
    )


def test_injected_on_the_meta_device_a_bfloat16_base_takes_what_is_loaded() -> None:
    with torch.device("meta"):
        model = mlp()
    inject(model, ReLoRAConfig(rank=3, base_dtype="bf16", master="host"))
    plain = mlp(seed=3)
    for load in ("assign", "copy"):
        other = copy.deepcopy(model)
        if load == "copy":
            other.to_empty(device="cpu")
        other.load_state_dict(snapshot(plain), strict=False, assign=load == "assign")
        for name, layer in layers_of(other).items():
            assert layer.weight.dtype == torch.bfloat16
            assert np.array_equal(numpy64(exact(layer)), as_rows(plain.get_submodule(name)))


# --- compiled, and refused ------------------------------------------------------------------------------


@stores
def test_a_compiled_model_follows_its_restarts_without_compiling_again(store: dict[str, str]) -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = trained(store)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    x = torch.randn(40, 9)
    for restart_index in (3, 4, 5):
        out = compiled(x)
        out.sum().backward()
        assert torch.equal(out, model(x))
        train_factors_(model, seed=restart_index)
        merge_and_reinit_(compiled, seed=0, restart_index=restart_index)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_settings_that_contradict_each_other_are_refused_together() -> None:
    with pytest.raises(ConfigError) as error:
        ReLoRAConfig(base_dtype="int8", merge_precision="native")
    assert "base_dtype='int8' needs master='host'" in str(error.value)
    assert "merge_precision='native' keeps no master" in str(error.value)
    with pytest.raises(ConfigError, match="base_dtype must be one of 'keep', 'bf16', 'int8', 'nf4'"):
        ReLoRAConfig(base_dtype="fp4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="master must be one of 'device', 'host'"):
        ReLoRAConfig(master="disk")  # type: ignore[arg-type]


def test_bases_that_cannot_be_stored_so_are_refused_before_anything_changes() -> None:
    model = stack().double()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="0 is float64, and base_dtype='bf16' keeps float32"):
        inject(model, ReLoRAConfig(rank=3, base_dtype="bf16"))
    assert same_bits(snapshot(model), before)
    with torch.device("meta"):
        empty = mlp()
    with pytest.raises(ConfigError, match="meta device"):
        inject(empty, ReLoRAConfig(rank=3, base_dtype="int8", master="host"))


def test_a_codec_nobody_has_registered_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from relora.method import codecs

    monkeypatch.setattr(codecs, "_CODECS", {})
    monkeypatch.setattr(codecs, "load_plugins", lambda group, name: False)
    model = stack()
    with pytest.raises(ConfigError, match=r"pip install 'relora\[bitsandbytes\]'"):
        inject(model, ReLoRAConfig(rank=3, base_dtype="nf4", master="host"))
    assert type(model[0]) is nn.Linear


def test_a_host_master_with_nothing_to_hold_warns() -> None:
    with pytest.warns(UserWarning, match="master='host' has no effect"):
        inject(stack(), ReLoRAConfig(rank=3, master="host"))
