"""ReLoRACallback in a real transformers.Trainer: restarts at their steps, and resuming changes nothing."""

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from relora import JaggedCosineLR, ReLoRAConfig, fold, inject
from relora.errors import CheckpointError, ConfigError
from relora.integrations.hf import ReLoRACallback
from relora.method.linear import lora_layers

STEPS, CYCLE = 11, 4
CONFIGS = {
    "paper": {},
    "one-sided": {"factors": "B", "reset": "transport", "init": "gradient"},
    "muon": {"factors": "B", "reset": "none", "residual": "muon", "residual_scale": 5.0},
    "bf16": {"base_dtype": "bf16", "base_weight_decay": 0.1},
}


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def plain_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def trainer(folder, config=None, *, callback=True, cycle=CYCLE, weight_decay=0.0, **arguments):
    model = plain_model()
    if config is not None:
        inject(model, ReLoRAConfig(rank=4, restart_every=CYCLE, scaling_rule="matched", **config), seed=0)
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=weight_decay)
    schedule = JaggedCosineLR(
        optimizer, total_steps=STEPS, warmup_steps=2, restart_every=cycle, rewarmup_steps=1, last_restart=9
    )
    defaults = {
        **{"max_steps": STEPS, "save_steps": 5, "per_device_train_batch_size": 2, "logging_steps": 1},
        **{"gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True},
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=Texts(),
        optimizers=(optimizer, schedule),
        callbacks=[ReLoRACallback()] if callback else [],
    )


def callback_of(made):
    (found,) = (each for each in made.callback_handler.callbacks if isinstance(each, ReLoRACallback))
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("restores_callbacks", [False, True])
def test_restarts_fall_where_they_should_and_resuming_changes_nothing(tmp_path, name, restores_callbacks):
    whole = trainer(tmp_path / "whole", CONFIGS[name])
    whole.train()
    reports = callback_of(whole).reports
    assert [(report.step, report.restart_index) for report in reports] == [(4, 1), (8, 2)]
    assert all(report.num_layers == 14 and not report.merge.unmoved_layers for report in reports)
    history = whole.state.log_history
    told = [entry for entry in history if "relora/restart_index" in entry]
    assert [(entry["step"], entry["relora/entries_zeroed"]) for entry in told] == [
        (report.step, report.entries_zeroed) for report in reports
    ]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert [step for step, rate in rates.items() if rate == 0] == [1, 5, 9]

    resumed = trainer(
        tmp_path / "resumed", CONFIGS[name], restore_callback_states_from_checkpoint=restores_callbacks
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert [report.step for report in callback_of(resumed).reports] == [8]
    assert callback_of(resumed).relora.restart_index == 2
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_a_folded_model_is_saved_as_a_plain_one(tmp_path):
    made = trainer(tmp_path / "run", {})
    made.train()
    ids = torch.arange(16)[None]
    made.model.eval()
    before = made.model(input_ids=ids).logits
    fold(made.model).save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.state_dict().keys() == plain_model().state_dict().keys()
    torch.testing.assert_close(loaded(input_ids=ids).logits, before, rtol=0, atol=1e-4)
    moved = (loaded.state_dict()["model.layers.0.mlp.up_proj.weight"], "model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(moved[0], plain_model().state_dict()[moved[1]])


def test_what_cannot_work_is_refused_before_a_step(tmp_path):
    with pytest.raises(ConfigError, match="holds no LoRALinear layer"):
        trainer(tmp_path, None).train()
    with pytest.raises(ConfigError, match=r"other cycles than the restarts: restart_every 5 .*4"):
        trainer(tmp_path, {}, cycle=5).train()
    with pytest.warns(UserWarning, match="weight decay acts on lora_A and lora_B"):
        trainer(tmp_path, {}, weight_decay=0.1, max_steps=1).train()


@pytest.mark.parametrize(
    ("name", "value", "complaint"), [("fp16", True, "use bf16=True"), ("_n_gpu", 2, "one process a GPU")]
)
def test_what_would_lose_steps_or_copies_the_model_is_refused(tmp_path, name, value, complaint):
    made = trainer(tmp_path, {})
    setattr(made.args, name, value)
    assert made.args.fp16 or made.args.n_gpu == 2
    with pytest.raises(ConfigError, match=complaint):
        callback_of(made).on_train_begin(
            made.args, made.state, made.control, model=made.model, optimizer=made.optimizer
        )


def test_a_checkpoint_without_its_counters_is_refused(tmp_path):
    trainer(tmp_path / "without", {}, callback=False).train()
    later = trainer(tmp_path / "later", {})
    before = {name: value.clone() for name, value in later.model.state_dict().items()}
    assert len(lora_layers(later.model)) == 14 and before
    with pytest.raises(CheckpointError, match=r"step 5 has no counters"):
        later.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-5"))
