"""Real architectures, tiny: inject, train, restart, fold, and what is listed instead of wrapped."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from method_samples import layers_of, max_difference, snapshot, train_factors_
from relora import ConfigError, InjectReport, LoRALinear, ReLoRAConfig, fold, inject, merge_and_reinit_
from tiny_sizes import GPT2_SIZES, GROUPED, SIZES, VOCAB_SIZE

R3 = ReLoRAConfig(rank=3)
IDS = torch.randint(0, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))

# model_type -> what differs from SIZES, and how many layers of one block are wrapped.
DECODERS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (GROUPED, 7),
    "mistral": (GROUPED, 7),
    "qwen2": (GROUPED, 7),
    "qwen3": (GROUPED | {"head_dim": 6}, 7),
    "gemma": (GROUPED | {"head_dim": 6}, 7),
    "gemma2": (GROUPED | {"head_dim": 6}, 7),
    "gemma3_text": (GROUPED | {"head_dim": 6}, 7),
    "phi": ({}, 6),
    "phi3": (GROUPED, 4),
    "gpt_neox": ({}, 4),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 8}, 6),
    "olmo2": (GROUPED, 7),
    "gpt2": (GPT2_SIZES, 4),
    "gptj": (GPT2_SIZES | {"rotary_dim": 4}, 6),
    "bloom": ({"n_layer": 2, "n_head": 4}, 4),
    "starcoder2": (GROUPED, 6),
}
OUTSIDE_BLOCKS = {"opt": 2}  # project_in and project_out


def causal_lm(model_type: str) -> nn.Module:
    changes = DECODERS[model_type][0]
    sizes = changes if model_type.startswith("gpt") and "n_embd" in changes else SIZES | changes
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(**(inputs or {"input_ids": IDS}))
    first: Tensor = out[0]
    return first


def loss(model: nn.Module) -> Tensor:
    out: Tensor = model(input_ids=IDS, labels=IDS).loss
    return out


def reasons(report: InjectReport) -> dict[str, str]:
    return {weight.name: weight.reason for weight in report.left_alone}


# --- decoders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_is_injected_trained_restarted_and_folded(model_type: str) -> None:
    model = causal_lm(model_type)
    kinds = {name: type(m) for name, m in model.named_modules()}
    keys, before = list(model.state_dict()), logits(model)
    report = inject(model, R3)
    assert len(report.wrapped) == 2 * DECODERS[model_type][1] + OUTSIDE_BLOCKS.get(model_type, 0)
    assert torch.equal(logits(model), before)

    model.train()
    loss(model).backward()
    for name, layer in layers_of(model).items():
        assert layer.lora_B.grad is not None and layer.lora_B.grad.count_nonzero() > 0, name
        assert layer.weight.grad is None, name
    model.eval()

    for restart_index in (1, 2, 3):
        train_factors_(model, seed=restart_index)
        before = logits(model)
        assert merge_and_reinit_(model, seed=0, restart_index=restart_index).relative_merge_error < 1e-5
        assert max_difference(logits(model), before) <= 1e-5

    train_factors_(model, seed=9)
    before = logits(model)
    fold(model)
    assert max_difference(logits(model), before) <= 1e-5
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("model_type", DECODERS)
def test_embeddings_and_head_train_at_full_rank_and_are_left_alone(model_type: str) -> None:
    model = causal_lm(model_type)
    report = inject(model, R3)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(embeddings, nn.Embedding) and not isinstance(head, LoRALinear)
    assert embeddings.weight.requires_grad and head.weight.requires_grad
    assert set(reasons(report).values()) <= {"embedding", "output head"}
    assert set(reasons(report)) <= set(report.full_rank)


def test_a_bfloat16_decoder_stays_within_its_stated_bound() -> None:
    model = causal_lm("llama").bfloat16()
    before = logits(model)
    inject(model, R3)
    assert torch.equal(logits(model), before)
    for restart_index in (1, 2, 3):
        train_factors_(model, std=0.05, seed=restart_index)
        before = logits(model)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)
        # Every weight moved by at most one bfloat16 step, 2^-7 of itself: half of it on either side.
        assert max_difference(logits(model), before) <= 0.05 * float(before.float().std())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("factors", ["both", "B"])
def test_gradient_checkpointing_and_autocast_train_every_factor(factors: str) -> None:
    gradients: dict[bool, dict[str, Tensor]] = {}
    for use_checkpointing in (False, True):
        model = causal_lm("llama")
        inject(model, ReLoRAConfig(rank=3, factors=factors))  # type: ignore[arg-type]
        train_factors_(model)
        model.train()
        if use_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            step_loss = loss(model)
        step_loss.backward()
        gradients[use_checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    assert {n.rpartition(".")[2] for n in gradients[True] if "lora_" in n} == (
        {"lora_B"} if factors == "B" else {"lora_A", "lora_B"}
    )
    for name, gradient in gradients[True].items():
        assert torch.equal(gradient, gradients[False][name]), name


def test_a_compiled_decoder_runs_on_after_a_restart_without_another_compilation() -> None:
    num_graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = causal_lm("llama").train()
    inject(model, R3)
    compiled = torch.compile(model, backend=counting)
    loss(compiled).backward()
    compiled_once = num_graphs
    assert compiled_once > 0
    for restart_index in (1, 2):
        train_factors_(model, seed=restart_index)
        merge_and_reinit_(model, seed=0, restart_index=restart_index)
        train_factors_(model, seed=10 + restart_index)
        step_loss = loss(compiled)
        step_loss.backward()
        assert max_difference(step_loss, loss(model)) <= 1e-6
    assert num_graphs == compiled_once


def test_the_cache_of_generation_sees_the_factors() -> None:
    model = causal_lm("llama")
    inject(model, R3)
    train_factors_(model, std=0.5)
    out = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, use_cache=True)  # type: ignore[operator]
    without = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, use_cache=False)  # type: ignore[operator]
    fold(model)
    folded = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert torch.equal(out, without) and torch.equal(out, folded)


# --- experts -----------------------------------------------------------------------------------------

EXPERTS = {"num_experts_per_tok": 2, **GROUPED}


def expert_lm(model_type: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | EXPERTS | changes))
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 6}),
    ],
)
def test_fused_experts_are_listed_and_keep_training_at_full_rank(
    model_type: str, changes: dict[str, Any]
) -> None:
    model = expert_lm(model_type, **changes)
    before = logits(model)
    report = inject(model, R3)
    assert torch.equal(logits(model), before)
    assert {w.name.rpartition(".")[2] for w in report.wrapped} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = {w.name: w.shape for w in report.left_alone if "experts" in w.name}
    assert {name.rpartition(".")[2] for name in experts} == {"gate_up_proj", "down_proj"}
    assert all(len(shape) == 3 and shape[0] == 4 for shape in experts.values())
    assert set(experts) <= set(report.full_rank)


def test_expert_too_small_for_the_rank_is_named_and_its_gate_of_one_passed_over() -> None:
    changes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.shared_expert\.gate_proj: rank 8 .*`exclude`"):
        inject(expert_lm("qwen2_moe", **changes), ReLoRAConfig(rank=8))
    model = expert_lm("qwen2_moe", **changes)
    before = logits(model)
    report = inject(model, R3)
    assert not any("shared_expert_gate" in w.name for w in report.wrapped)
    assert torch.equal(logits(model), before)
    assert sum("shared_expert." in w.name for w in report.wrapped) == 2 * 3


def test_linear_layers_with_a_forward_of_their_own_are_refused_by_name() -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "max_position_embeddings")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**sizes))
    with pytest.raises(ConfigError, match="FalconLinear computes its output in its own way"):
        inject(model, R3)


# --- encoders, encoder-decoders, base models ---------------------------------------------------------

OTHERS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Tensor], int]] = {
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=VOCAB_SIZE
            )
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        4 + 2 + 8 + 2,
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
        {"input_ids": IDS},
        2 * 6 + 1,
    ),
    "llama without a head": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
        {"input_ids": IDS},
        14,
    ),
    "a classifier": (
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=5)),
        {"input_ids": IDS},
        14,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_are_no_decoders_work_too(kind: str) -> None:
    make, inputs, num_wrapped = OTHERS[kind]
    torch.manual_seed(0)
    model = make().eval()
    before = logits(model, **inputs)
    report = inject(model, R3)
    assert len(report.wrapped) == num_wrapped
    assert set(reasons(report).values()) <= {"embedding", "output head"}
    assert torch.equal(logits(model, **inputs), before)
    train_factors_(model)
    before = logits(model, **inputs)
    fold(model)
    # T5's logits are of order 1 before training, without the scaling of its tied head.
    assert max_difference(logits(model, **inputs), before) <= 1e-5


# --- Conv1D ------------------------------------------------------------------------------------------


def test_gpt2s_conv1d_is_recognised_without_being_imported_and_merges_transposed() -> None:
    model = causal_lm("gpt2")
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"  # type: ignore[union-attr,index]
    report = inject(model, R3)
    shapes = {w.name: (w.in_features, w.out_features) for w in report.wrapped}
    assert shapes["transformer.h.0.attn.c_attn"] == (16, 48)
    assert shapes["transformer.h.1.mlp.c_proj"] == (64, 16)
    train_factors_(model)
    layer = layers_of(model)["transformer.h.0.attn.c_attn"]
    before, delta = layer.weight.detach().double(), layer.delta()
    merge_and_reinit_(model, seed=0, restart_index=1)
    assert max_difference(layer.weight, before + delta.T) <= 1e-7
    assert not torch.equal(snapshot(model)["transformer.h.0.attn.c_attn.lora_A"], torch.zeros(3, 16))
