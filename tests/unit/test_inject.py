"""inject and fold: what is wrapped, what trains, what is refused, and that nothing is left half done."""

import copy
import hashlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from method_samples import (
    LAYER_KINDS,
    conv1d,
    layers_of,
    linear,
    max_difference,
    mlp,
    numpy64,
    same_bits,
    snapshot,
    train_factors_,
)
from reference.low_rank import kaiming_bound
from relora import (
    ConfigError,
    LoRALinear,
    NonFiniteError,
    ReLoRAConfig,
    fold,
    inject,
    lora_parameters,
    merge_and_reinit_,
)

R3 = ReLoRAConfig(rank=3)
RULES = ("alpha/r", "rslora", "matched", "learned")


def structure(model: nn.Module) -> list[tuple[str, type, list[tuple[str, tuple[int, ...], bool]]]]:
    """Return every module's name, type and own parameters: what inject changes and must not half change."""
    return [
        (name, type(m), [(k, tuple(p.shape), p.requires_grad) for k, p in m.named_parameters(recurse=False)])
        for name, m in model.named_modules()
    ]


class Tower(nn.Module):
    """A little of everything: embedding, tied head, blocks, norm, fused experts, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False), "up_proj": nn.Linear(8, 12)})
            for _ in range(2)
        )
        self.down = conv1d(12, 8)
        self.experts = nn.ParameterDict({"gate_up": nn.Parameter(torch.randn(2, 8, 10) * 0.1)})
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 23, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + self.down(block["up_proj"](block["q_proj"](x)).tanh())
        left, right = (x @ self.experts["gate_up"][0]).chunk(2, dim=-1)
        out: Tensor = self.lm_head(self.norm(x + (left * right).mean(-1, keepdim=True)))
        return out


def tower(*, tied: bool = False) -> Tower:
    torch.manual_seed(0)
    model = Tower()
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


IDS = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))


# --- what injection does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_outputs_are_bit_equal_after_injection(kind: str, dtype: torch.dtype) -> None:
    layer = LAYER_KINDS[kind](5, 7).to(dtype)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = layer(x)
    inject(layer, ReLoRAConfig(rank=2))
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factors", ["both", "B"])
def test_lora_B_gets_a_gradient_on_the_first_backward_of_every_cycle(rule: str, factors: str) -> None:
    model = tower()
    inject(model, ReLoRAConfig(rank=3, scaling_rule=rule, factors=factors))  # type: ignore[arg-type]
    for restart_index in (1, 2):
        model.zero_grad()
        model(IDS).square().mean().backward()
        for name, layer in layers_of(model).items():
            assert layer.lora_B.grad is not None and layer.lora_B.grad.count_nonzero() > 0, name
            assert layer.weight.grad is None, name
        train_factors_(model)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)


def test_only_factors_and_what_trained_outside_the_targets_train() -> None:
    model = tower()
    model.norm.weight.requires_grad_(False)
    report = inject(model, ReLoRAConfig(rank=3, scaling_rule="learned"))
    factors = {name for name, _ in lora_parameters(model)}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {"blocks.0.up_proj.bias", "blocks.1.up_proj.bias", "down.bias"}
    outside = {"embed.weight", "norm.bias", "lm_head.weight", "experts.gate_up"}
    assert trains == factors | biases | outside
    assert set(report.full_rank) == biases | outside
    wrapped = ["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj", "down"]
    assert factors == {f"{n}.{leaf}" for n in wrapped for leaf in ("lora_A", "lora_B", "lora_scaling")}


def test_with_factors_B_lora_A_is_frozen() -> None:
    model = mlp()
    inject(model, ReLoRAConfig(rank=3, factors="B"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n} == {
        "0.lora_B",
        "3.lora_B",
    }
    assert {n for n, _ in lora_parameters(model)} == {"0.lora_A", "0.lora_B", "3.lora_A", "3.lora_B"}


def test_the_base_keeps_its_objects_and_names_and_factors_stand_beside_it() -> None:
    model = tower()
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    inject(model, R3)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("bare", [linear(5, 7), conv1d(5, 7)], ids=["linear", "conv1d"])
def test_the_model_may_be_the_layer_itself(bare: nn.Module) -> None:
    layer = copy.deepcopy(bare)
    report = inject(layer, R3)
    assert [name for name, _ in lora_parameters(layer)] == ["lora_A", "lora_B"]
    assert [w.name for w in report.wrapped] == [""]
    assert type(fold(layer)) is type(bare)


def test_hooks_of_a_wrapped_layer_survive_injection_and_fold() -> None:
    model = mlp()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    x = torch.randn(2, 9, requires_grad=True)
    for change in (lambda: inject(model, R3), lambda: fold(model)):
        change()
        calls.clear()
        model(x).sum().backward()
        assert calls == ["forward", "backward"]


def test_attributes_of_a_users_layer_come_back_at_fold() -> None:
    layer = linear(5, 7)
    layer.name, layer.config, layer.note = "mine", {"a": 1}, "kept"  # type: ignore[assignment]
    attributes = set(vars(layer))
    fold(inject(layer, R3) and layer)
    assert (layer.name, layer.config, layer.note) == ("mine", {"a": 1}, "kept")
    assert set(vars(layer)) == attributes


def test_a_copy_of_an_injected_model_is_independent_and_equal() -> None:
    model = mlp()
    inject(model, R3)
    train_factors_(model)
    x = torch.randn(4, 9)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = model(x)
    for other in copies:
        assert torch.equal(other(x), before)
        merge_and_reinit_(other, seed=0, restart_index=1)
        assert type(fold(other)[0]) is nn.Linear
    assert torch.equal(model(x), before) and isinstance(model[0], LoRALinear)


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_counts_and_names_everything() -> None:
    model = tower(tied=True)
    num_base = sum(p.numel() for p in model.parameters())
    report = inject(model, ReLoRAConfig(rank=3, alpha=6.0, exclude=("blocks.1.*",)))
    factors = {"blocks.0.q_proj": (8, 8), "blocks.0.up_proj": (8, 12), "down": (12, 8)}
    assert {w.name: (w.in_features, w.out_features) for w in report.wrapped} == factors
    assert {(w.rank, w.scaling) for w in report.wrapped} == {(3, 2.0)}
    assert report.num_base_parameters == num_base
    assert report.num_factor_parameters == sum(3 * (i + o) for i, o in factors.values())
    frozen = sum(i * o for i, o in factors.values())
    assert report.num_trainable_parameters == num_base - frozen + report.num_factor_parameters
    left = {w.name: (w.shape, w.reason) for w in report.left_alone}
    assert left == {
        "embed.weight": ((23, 8), "embedding"),
        "blocks.1.q_proj.weight": ((8, 8), "not among the targets"),
        "blocks.1.up_proj.weight": ((12, 8), "not among the targets"),
        "experts.gate_up": ((2, 8, 10), "ParameterDict is not a linear layer"),
    }
    assert "3 layers wrapped" in str(report) and "experts.gate_up [2, 8, 10]" in str(report)


def test_linear_layers_that_cannot_carry_factors_are_listed_with_the_reason() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Plus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = nn.Sequential()
    model.add_module("good", nn.Linear(8, 8))
    model.add_module("scaled", Scaled(8, 8))
    model.add_module("normed", nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model.add_module("shifted", nn.Linear(8, 8))
    nn.utils.parametrize.register_parametrization(model.shifted, "bias", Plus())
    model.add_module("patched", nn.Linear(8, 8))
    model.patched.forward = lambda x: x  # type: ignore[method-assign]
    model.add_module("scorer", Scorer())
    model.add_module("attention", nn.MultiheadAttention(8, 2))
    report = inject(model, R3)
    assert [w.name for w in report.wrapped] == ["good"]
    reasons = {w.name.split(".")[0]: w.reason for w in report.left_alone if "in_proj" not in w.name}
    assert "in its own way" in reasons["scaled"] and "in its own way" in reasons["patched"]
    assert "Parametrization" in reasons["normed"] and "parametrization" in reasons["shifted"]
    assert reasons["scorer"] == "Scorer is not a linear layer"
    assert "without calling it" in reasons["attention"]
    assert "attention.in_proj_weight" in {w.name for w in report.left_alone}


def test_a_subclass_with_nn_linears_own_forward_is_wrapped_and_given_back() -> None:
    class Named(nn.Linear):
        pass

    model = nn.Sequential(Named(8, 8))
    inject(model, R3)
    assert isinstance(model[0], LoRALinear)
    assert type(fold(model)[0]) is Named


# --- which layers -------------------------------------------------------------------------------------------


def test_patterns_match_full_names_across_dots_and_pass_over_what_is_not_linear() -> None:
    model = tower()
    report = inject(model, ReLoRAConfig(rank=3, targets=("blocks*",), exclude=("*.up_proj",)))
    assert [w.name for w in report.wrapped] == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert report.unmatched_patterns == ()


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "score", "classifier"])
def test_all_linear_leaves_an_output_head_and_an_explicit_pattern_takes_it(name: str) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(8, 8), name: nn.Linear(8, 9)})

    assert [w.name for w in inject(model(), R3).wrapped] == ["body"]
    assert [w.name for w in inject(model(), ReLoRAConfig(rank=3, targets=(name,))).wrapped] == [name]


def test_a_layer_of_a_heads_name_inside_a_block_is_no_head() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"score": nn.Linear(8, 8)}) for _ in "ab")})
    assert [w.name for w in inject(model, R3).wrapped] == ["layers.0.score", "layers.1.score"]


def test_a_declared_head_is_found_whatever_its_name() -> None:
    class Declares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.to_logits = nn.Linear(8, 8), nn.Linear(8, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.to_logits

    report = inject(Declares(), R3)
    assert [w.name for w in report.wrapped] == ["body"]
    assert [(w.name, w.reason) for w in report.left_alone] == [("to_logits.weight", "output head")]


def test_a_pattern_that_matches_nothing_warns_at_the_callers_line() -> None:
    model = tower()
    with pytest.warns(UserWarning, match=r"'\*gate_proj' matches no module") as caught:
        report = inject(model, ReLoRAConfig(rank=3, targets=("*q_proj", "*gate_proj")))
    assert Path(caught[0].filename) == Path(__file__)
    assert report.unmatched_patterns == ("*gate_proj",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_precision": "native"}, "native"),
        ({"scaling_rule": "matched", "alpha": 32.0}, "alpha has no effect"),
        ({"kappa": 2.0}, "kappa has no effect"),
        ({"exclude": ("*nothing",)}, "matches no module"),
    ],
)
def test_a_setting_without_effect_warns(changes: dict[str, object], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        inject(mlp(), ReLoRAConfig(rank=3, **changes))  # type: ignore[arg-type]


# --- what is refused, with nothing half done ----------------------------------------------------------------


def refused(model: nn.Module, config: ReLoRAConfig, *mentions: str) -> None:
    before, state = structure(model), snapshot(model)
    with warnings.catch_warnings(), pytest.raises(ConfigError) as refusal:
        warnings.simplefilter("ignore")
        inject(model, config)
    for mention in mentions:
        assert mention in str(refusal.value)
    assert structure(model) == before and same_bits(snapshot(model), state)


def test_a_rank_too_large_names_every_layer_it_does_not_fit() -> None:
    refused(
        tower(), ReLoRAConfig(rank=8), "blocks.0.q_proj", "blocks.1.up_proj", "down", "rank 8", "`exclude`"
    )
    inject(tower(), ReLoRAConfig(rank=7))


def test_targets_that_match_nothing_are_answered_with_a_name_that_would() -> None:
    refused(tower(), ReLoRAConfig(rank=3, targets=("q_proj",)), "'*q_proj'", "blocks.0.q_proj")
    refused(tower(), ReLoRAConfig(rank=3, targets=("*attention*",)), "no linear layer", "blocks.0.q_proj")
    refused(tower(), ReLoRAConfig(rank=3, exclude=("*",)), "no linear layer")
    refused(nn.LayerNorm(8), R3, "none at all")


def test_a_target_that_cannot_carry_factors_is_refused_with_its_reason() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    refused(model, ReLoRAConfig(rank=3, targets=("*out_proj",)), "attention.out_proj", "without calling it")
    refused(nn.MultiheadAttention(8, 2), R3, "out_proj", "without calling it")


def test_tied_targets_are_refused_by_name_and_a_tied_head_is_left_alone() -> None:
    assert "lm_head" not in {w.name for w in inject(tower(tied=True), R3).wrapped}
    refused(tower(tied=True), ReLoRAConfig(rank=3, targets=("lm_head",)), "lm_head", "tied to embed.weight")
    model = mlp()
    model.append(nn.Linear(9, 11))
    model[4].weight = model[0].weight  # type: ignore[union-attr]
    refused(model, R3, "0: its weight is tied to 4.weight")
    inject(model, ReLoRAConfig(rank=3, exclude=("0", "4")))


def test_weights_tied_through_one_storage_are_found() -> None:
    model = nn.Sequential(linear(8, 8), linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    refused(model, R3, "tied")


def test_a_module_used_under_two_names_is_refused() -> None:
    layer = linear(8, 8)
    refused(nn.Sequential(layer, nn.Tanh(), layer), R3, "0: its weight is tied to 2.weight")


def test_a_model_is_injected_once() -> None:
    model = tower()
    inject(model, R3)
    with pytest.raises(ConfigError, match=r"blocks\.0\.q_proj is a LoRALinear already.*fold"):
        inject(model, R3)
    with pytest.raises(ConfigError, match="already"):
        inject(nn.ModuleDict({"whole": model, "more": nn.Linear(8, 8)}), R3)


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ConfigError, match="not initialised"):
        inject(model, R3)
    model(torch.randn(2, 8))
    inject(model, R3)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_a_model_wrapped_for_distributed_training_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with pytest.raises(ConfigError, match=r"DistributedDataParallel.*before"):
        inject(nn.parallel.DistributedDataParallel(mlp()), R3)
    with pytest.raises(ConfigError, match=r"FullyShardedDataParallel.*before"):
        inject(nn.Sequential(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))), R3)
    sharded = mlp()
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ConfigError, match="sharded"):
        inject(sharded, R3)


def test_asking_an_uninjected_model_for_factors_says_what_to_do() -> None:
    for use in (fold, lambda m: merge_and_reinit_(m, seed=0, restart_index=1)):
        with pytest.raises(ConfigError, match=r"call inject\(model, config\) first"):
            use(mlp())
    assert list(lora_parameters(mlp())) == []


# --- the factors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(5, 7, 3), (7, 5, 4), (96, 64, 24)])
def test_factors_have_their_shapes_and_start_at_zero_and_kaiming(
    in_features: int, out_features: int, rank: int
) -> None:
    layer = linear(in_features, out_features)
    inject(layer, ReLoRAConfig(rank=rank))
    assert isinstance(layer, LoRALinear)
    assert layer.lora_A.shape == (rank, in_features) and layer.lora_B.shape == (out_features, rank)
    assert layer.lora_B.count_nonzero() == 0
    bound = kaiming_bound(in_features)
    assert float(layer.lora_A.detach().abs().max()) <= bound
    if layer.lora_A.numel() > 1000:
        assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_orthonormal_factors_have_orthonormal_rows(kind: str) -> None:
    for config in (ReLoRAConfig(rank=4, factors="B"), ReLoRAConfig(rank=4, init="orthonormal")):
        layer = LAYER_KINDS[kind](9, 7)
        inject(layer, config)
        assert isinstance(layer, LoRALinear)
        rows = numpy64(layer.lora_A)
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-6)


def factors_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, parameter in lora_parameters(model):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def test_factors_depend_on_seed_restart_and_name_alone() -> None:
    def drawn(*, seed: int = 0, restart_index: int = 0, stream: int = 0) -> dict[str, Tensor]:
        model = tower()
        torch.manual_seed(stream)
        state = torch.get_rng_state()
        inject(model, ReLoRAConfig(rank=3, init="orthonormal"), seed=seed)
        if restart_index:
            merge_and_reinit_(model, seed=seed, restart_index=restart_index)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: layer.lora_A.detach() for name, layer in layers_of(model).items()}

    first = drawn()
    assert same_bits(first, drawn(stream=5))
    assert not torch.equal(first["blocks.0.q_proj"], first["blocks.1.q_proj"])
    for other in (drawn(seed=1), drawn(restart_index=1), drawn(seed=1, restart_index=1)):
        assert not any(torch.equal(first[name], other[name]) for name in first)
    alone = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])})
    inject(alone, ReLoRAConfig(rank=3, init="orthonormal"))
    assert torch.equal(layers_of(alone)["blocks.0.q_proj"].lora_A, first["blocks.0.q_proj"])


def test_a_numpy_seed_is_the_number_it_stands_for() -> None:
    models = [mlp(), mlp()]
    inject(models[0], R3, seed=7)
    inject(models[1], R3, seed=np.int64(7))  # type: ignore[arg-type]
    assert factors_digest(models[0]) == factors_digest(models[1])


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_factors_do_not_depend_on_torchs_default_dtype_or_device(init: str) -> None:
    config = ReLoRAConfig(rank=3, init=init)  # type: ignore[arg-type]
    models = [mlp() for _ in range(3)]
    inject(models[0], config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        inject(models[1], config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        inject(models[2], config)
    assert len({factors_digest(model) for model in models}) == 1
    assert all(p.dtype == torch.float32 for model in models for _, p in lora_parameters(model))


def test_another_process_draws_the_same_factors() -> None:
    program = (
        "import torch\n"
        "from test_inject import R3, mlp, factors_digest, inject, merge_and_reinit_, ReLoRAConfig\n"
        "torch.manual_seed(99)\n"
        "model = mlp(); inject(model, ReLoRAConfig(rank=3, init='orthonormal'), seed=4)\n"
        "merge_and_reinit_(model, seed=4, restart_index=2)\n"
        "print(factors_digest(model))"
    )
    model = mlp()
    inject(model, ReLoRAConfig(rank=3, init="orthonormal"), seed=4)
    merge_and_reinit_(model, seed=4, restart_index=2)
    path = "\n".join(["import sys", *(f"sys.path.append({entry!r})" for entry in sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", f"{path}\n{program}"], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == factors_digest(model), run.stderr


# --- the meta device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["alpha/r", "learned"])
@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_injected_on_the_meta_device_is_complete_once_it_has_weights(
    rule: str, way: str, dtype: torch.dtype
) -> None:
    config = ReLoRAConfig(rank=3, alpha=6.0, scaling_rule=rule)  # type: ignore[arg-type]
    plain = mlp().to(dtype)
    wanted = copy.deepcopy(plain)
    inject(wanted, config, seed=4)
    with torch.device("meta"):
        model = mlp().to(dtype)
    inject(model, config, seed=4)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), assign=way == "assign")
    assert same_bits(snapshot(model), snapshot(wanted))
    for each in (model, wanted):
        train_factors_(each)
        merge_and_reinit_(each, seed=4, restart_index=1)
    assert same_bits(snapshot(model), snapshot(wanted))


def test_a_cast_on_the_meta_device_is_not_forgotten() -> None:
    with torch.device("meta"):
        model = mlp()
    inject(model, R3)
    model.bfloat16().to_empty(device="cpu").load_state_dict(mlp().bfloat16().state_dict())
    train_factors_(model)
    assert merge_and_reinit_(model, seed=0, restart_index=1).relative_merge_error < 1e-3


# --- fold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factors", ["both", "B"])
def test_fold_keeps_the_function_and_gives_back_kinds_keys_and_what_trained(rule: str, factors: str) -> None:
    model = tower()
    model.blocks[0].q_proj.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = structure(model)
    keys = list(model.state_dict())
    inject(model, ReLoRAConfig(rank=3, scaling_rule=rule, factors=factors))  # type: ignore[arg-type]
    merge_and_reinit_(model, seed=0, restart_index=1)
    train_factors_(model)
    wanted = model(IDS)
    assert fold(model) is model
    assert max_difference(model(IDS), wanted) <= 1e-5
    assert structure(model) == before
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    inject(model, R3)


def test_fold_refuses_what_is_not_finite_and_leaves_the_model_injected() -> None:
    model = mlp()
    inject(model, R3)
    train_factors_(model)
    with torch.no_grad():
        layers_of(model)["3"].lora_B[2, 1] = torch.nan
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=r"no weight was changed.*\b3\b"):
        fold(model)
    after = snapshot(model)
    assert all(torch.equal(after[k], before[k]) for k in before if not k.endswith("3.lora_B"))
    assert isinstance(model[0], LoRALinear)
