"""Which layers inject takes, and what it refuses with nothing half done."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from method_samples import linear, mlp, same_bits, snapshot, structure, tower, train_factors_
from relora import ConfigError, ReLoRAConfig, fold, inject, lora_parameters, merge_and_reinit_

R3 = ReLoRAConfig(rank=3)


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


def test_a_head_tied_to_an_embedding_is_found_whatever_its_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "body": linear(8, 8), "unembed": linear(8, 9)})
    model["unembed"].weight = model["embed"].weight  # type: ignore[assignment]
    assert [w.name for w in inject(model, R3).wrapped] == ["body"]


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
        ({"kappa": 2.0, "alpha": 32.0}, "kappa has no effect"),
        ({"exclude": ("*nothing",)}, "matches no module"),
    ],
)
def test_a_setting_without_effect_warns(changes: dict[str, object], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        inject(mlp(), ReLoRAConfig(rank=3, **changes))  # type: ignore[arg-type]


def test_a_compiled_model_is_injected_under_its_own_names() -> None:
    plain, inner = mlp(), mlp()
    compiled = torch.compile(inner, backend="eager")
    x = torch.randn(4, 9)
    before = compiled(x)
    report = inject(compiled, R3)
    inject(plain, R3)
    assert [w.name for w in report.wrapped] == ["0", "3"]
    assert torch.equal(compiled(x), before)
    assert same_bits(snapshot(inner), snapshot(plain))
    train_factors_(inner)
    assert not torch.equal(compiled(x), before) and torch.equal(compiled(x), inner(x))


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


class Packed(torch.Tensor):
    """A weight that only says it is bfloat16, as quantised weights in a plain nn.Linear do."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> "Packed":
        whole: Packed = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        whole.codes = codes
        return whole

    codes: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


def test_weights_stored_in_a_tensor_of_another_kind_are_listed() -> None:
    model = nn.Sequential(linear(8, 9), linear(9, 8))
    packed = Packed(torch.zeros(8, 9, dtype=torch.int8))
    model[1].weight = nn.Parameter(packed, requires_grad=False)
    report = inject(model, R3)
    assert [layer.name for layer in report.wrapped] == ["0"]
    assert [(w.name, w.reason) for w in report.left_alone] == [("1.weight", "its weight is stored as Packed")]
    model = nn.Sequential(nn.Linear(9, 8))
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ConfigError, match="0: its weight is stored as Packed"):
        inject(model, R3)
    assert type(model[0]) is nn.Linear


def test_asking_an_uninjected_model_for_factors_says_what_to_do() -> None:
    for use in (fold, lambda m: merge_and_reinit_(m, seed=0, restart_index=1)):
        with pytest.raises(ConfigError, match=r"call inject\(model, config\) first"):
            use(mlp())
    assert list(lora_parameters(mlp())) == []


def test_layer_with_a_side_of_one_is_passed_over() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(12, 1), "up": nn.Linear(12, 20)})
    assert [layer.name for layer in inject(model, ReLoRAConfig(rank=3)).wrapped] == ["up"]
    refused(nn.Linear(12, 1), R3, "the model: a side of 1")
