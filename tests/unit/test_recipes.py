"""Recipes: the shipped ones, strict reading, precedence, validation, and the way back to TOML."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import relora
from relora import ConfigError, ReLoRAConfig, inject
from relora.train.architecture import PAPER_VOCAB_SIZE, PRESETS, llama_config
from relora.train.checks import field_types, options
from relora.train.config import (
    SECTIONS,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ReLoRASection,
    RunConfig,
    TrainConfig,
)
from relora.train.phase import method_config
from relora.train.recipe_io import (
    changed_fields,
    find_recipe,
    load_recipe,
    recipe_toml,
    resolve,
    shipped_recipes,
    write_recipe,
)

SIZES = ["9m", "20m", "35m", "40m", "60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b"]
PAPER_SIZES = ["60m", "130m", "250m", "350m", "1b"]
NAMES = [
    "quickstart",
    "beyond",
    "continue-pretraining",
    *(f"llama-{size}" for size in SIZES),
    *(f"paper-{size}" for size in PAPER_SIZES),
]


def complaint(*layers: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(*layers)
    return str(caught.value)


def restarts(recipe: Recipe) -> list[int]:
    last = recipe.total_steps
    return list(range(recipe.switch_step + recipe.relora.restart_every, last, recipe.relora.restart_every))


# The recipes that are shipped


def test_the_promised_recipes_are_shipped():
    assert set(shipped_recipes()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_is_valid_and_named_after_its_file(name):
    recipe = load_recipe(name)
    assert recipe.run.name == name
    assert recipe.run.method == "relora"
    assert restarts(recipe)
    assert resolve(tomllib.loads(recipe_toml(recipe))) == recipe


def test_beyond_is_its_preset_cold_on_the_quickstarts_model_and_text():
    recipe, quickstart = load_recipe("beyond"), load_recipe("quickstart")
    assert method_config(recipe) == ReLoRAConfig.beyond(rank=32)
    assert recipe.switch_step == 0 and recipe.schedule.rewarmup_steps == 0
    for section in ("model", "data", "train", "optim", "schedule"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    full = load_recipe("beyond", {"run": {"method": "full"}})
    assert (full.optim.lr, full.switch_step) == (4e-3, None)


def test_only_what_restarts_steps_on_the_complement():
    lora = method_config(load_recipe("beyond", {"run": {"method": "lora"}}))
    assert lora == ReLoRAConfig.beyond(rank=32, residual="none", residual_scale=1.0)


def test_quickstart_is_an_honest_relora_that_downloads_nothing():
    recipe = load_recipe("quickstart")
    assert method_config(recipe) == ReLoRAConfig.beyond(rank=32)
    assert recipe.data.source == "python-stdlib"
    assert recipe.data.tokenizer == "bpe"
    assert recipe.model.init_from is None
    assert recipe.relora.rank <= recipe.model.architecture.hidden_size / 4
    assert 0 < recipe.relora.warm_start_steps <= recipe.total_steps / 3
    assert len(restarts(recipe)) >= 3


@pytest.mark.parametrize("size", SIZES)
def test_llama_recipe_downloads_nothing_and_counts_as_the_paper_does(size):
    recipe = load_recipe(f"llama-{size}")
    assert recipe.model == ModelConfig(preset=f"llama-{size}")
    assert recipe.data.source == "python-stdlib"
    assert recipe.data.vocab_size == PAPER_VOCAB_SIZE


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_paper_recipe_is_the_papers_method_on_c4(size):
    recipe = load_recipe(f"paper-{size}")
    cycle, warm_start = recipe.relora.restart_every, recipe.relora.warm_start_steps
    paper = ReLoRAConfig.paper(restart_every=cycle, dropout=0.1)
    assert recipe.relora == ReLoRASection(**vars(paper), warm_start_steps=warm_start)
    assert recipe.model.preset == f"llama-{size}"
    assert (recipe.data.path, recipe.data.name) == ("allenai/c4", "en")


def test_paper_250m_merges_twice():
    recipe = load_recipe("paper-250m")
    assert restarts(recipe) == [10_000, 15_000]
    assert (recipe.optim.lr, recipe.optim.factor_lr_in_force) == (5e-4, 1e-3)


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_every_setting_of_a_paper_recipe_says_where_it_is_from(size):
    text = shipped_recipes()[f"paper-{size}"].read_text(encoding="utf-8")
    settings = [line for line in text.split("[model]")[1].splitlines() if " = " in line]
    assert all(re.search(r"# .*\[(C|P|R|M|D|ours)\]", line) for line in settings)


@pytest.mark.parametrize(
    ("size", "total", "factors", "trainable"),
    [
        ("60m", 58_176_000, 9_994_240, 42_873_344),
        ("130m", 134_259_456, 22_413_312, 71_738_112),
        ("250m", 247_524_096, 49_545_216, 98_888_448),
        ("350m", 368_174_080, 59_817_984, 125_608_960),
        ("1b", 1_339_492_352, 119_534_592, 251_116_544),
    ],
)
def test_parameter_counts_equal_the_papers_at_rank_128(size, total, factors, trainable):
    recipe = load_recipe(f"llama-{size}")
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(recipe.model, vocab_size=PAPER_VOCAB_SIZE))
    report = inject(model, recipe.relora)
    assert report.num_base_parameters == total
    assert report.num_factor_parameters == factors
    assert report.num_trainable_parameters == trainable


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("9m", 9.02),
        ("20m", 19.60),
        ("35m", 35.27),
        ("40m", 42.48),
        ("71m", 70.68),
        ("100m", 100.12),
        ("3b", 2686),
        ("7b", 6739),
    ],
)
def test_presets_have_the_sizes_of_their_names(size, millions):
    shape = PRESETS[f"llama-{size}"]
    width, layers = shape.hidden_size, shape.num_hidden_layers
    total = layers * (4 * width**2 + 3 * width * shape.intermediate_size + 2 * width)
    total += width + 2 * PAPER_VOCAB_SIZE * width
    assert total / 1e6 == pytest.approx(millions, rel=6e-4)


# The model section


def test_explicit_sizes_override_the_preset():
    shape = ModelConfig(preset="llama-9m", num_hidden_layers=7).architecture
    assert shape == replace(PRESETS["llama-9m"], num_hidden_layers=7)


def test_llama_config_is_the_papers_llama():
    config = llama_config(ModelConfig(preset="llama-60m"), vocab_size=77, eos_token_id=3)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (77, 3, None)
    assert (config.hidden_size, config.intermediate_size) == (512, 1376)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (8, 8, 8)
    assert (config.rms_norm_eps, config.hidden_act, config.initializer_range) == (1e-6, "silu", 0.02)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (1024, False)


def test_incomplete_architecture_names_what_is_missing():
    message = complaint({"model": {"preset": None, "hidden_size": 64, "num_hidden_layers": 2}})
    assert "intermediate_size, num_attention_heads must be given" in message


# Strict reading


def test_unknown_key_names_the_nearest_one():
    assert "train.step is not a known key (did you mean 'train.steps'?)" in complaint({"train": {"step": 3}})


def test_key_in_the_wrong_section_names_the_right_one():
    message = complaint({"train": {"seq_len": 64}})
    assert "train.seq_len is not a known key (did you mean 'data.seq_len'?)" in message


def test_unknown_key_like_no_other_is_told_the_keys_of_its_section():
    message = complaint({"optim": {"learning_rate": 1.0}})
    assert "optim.learning_rate is not a known key; [optim] has lr, low_rank_lr, factor_lr, betas," in message


def test_unknown_section_names_the_nearest_one():
    assert "[optin] is not a known section (did you mean 'optim'?)" in complaint({"optin": {"lr": 1.0}})


def test_key_outside_any_section_is_told_where_it_belongs():
    message = complaint({"warmup_steps": 3})
    assert "keys belong into one (did you mean 'schedule.warmup_steps'?)" in message


def test_section_given_as_a_value_is_refused():
    assert "train must be a section [train], not the value 3" in complaint({"train": 3})


@pytest.mark.parametrize(
    ("section", "field", "value", "wanted"),
    [
        ("train", "steps", "many", "train.steps must be a whole number or none, not 'many'"),
        ("train", "steps", 10.0, "train.steps must be a whole number or none, not 10.0"),
        ("train", "batch_size", True, "train.batch_size must be a whole number, not true"),
        ("train", "compile", 1, "train.compile must be true or false, not 1"),
        ("optim", "lr", "1e-3", "optim.lr must be a finite number, not '1e-3'"),
        ("optim", "lr", float("nan"), "optim.lr must be a finite number, not nan"),
        ("optim", "lr", 10**400, "optim.lr must be a finite number, not 1000"),
        ("optim", "betas", [0.9], "optim.betas must be a list of 2, each a finite number, not [0.9]"),
        (
            "run",
            "method",
            "relo",
            'run.method must be one of "full", "lora", "relora"',
        ),  # and what is registered
        ("run", "name", 3, "run.name must be a text, not 3"),
        ("run", "out", 3, "run.out must be a path, not 3"),
        ("run", "name", "\udc80", "run.name must be a text, not '\\udc80'"),
        ("log", "sinks", "jsonl", "log.sinks must be a list, each a text, not 'jsonl'"),
        ("relora", "targets", 3, 'relora.targets must be "all-linear" or a list, each a text, not 3'),
        ("relora", "alpha", [], "relora.alpha must be a finite number or none, not []"),
    ],
)
def test_wrong_type_names_key_value_and_what_it_should_be(section, field, value, wanted):
    assert wanted in complaint({section: {field: value}})


def test_everything_wrong_is_said_at_once():
    message = complaint(
        {"train": {"steps": "many", "step": 3}, "optim": {"lr": -1.0}, "nonsense": {"a": 1}},
        {"eval": {"sequences": 0}, "relora": {"reset_ratio": 1.5}},
    )
    assert message.startswith("recipe has 6 problems:")
    for key in ("train.steps", "train.step ", "optim.lr", "[nonsense]", "eval.sequences", "relora.reset"):
        assert f"\n  - {key}" in message


def test_sections_and_their_relations_are_complained_about_together():
    message = complaint({"optim": {"lr": 0.0}, "train": {"steps": 700}, "relora": {"restart_every": 800}})
    assert "optim.lr must be above 0" in message
    assert "relora.restart_every must be at most the 700 steps of the low-rank phase, not 800" in message


def test_a_runs_folder_is_that_run_from_wherever_it_is_named(tmp_path, monkeypatch):
    began = load_recipe("quickstart", {"run": {"out": "runs", "name": "mine"}})
    run = tmp_path / "home" / "runs" / "moved"
    run.mkdir(parents=True)
    write_recipe(began, run / "recipe.toml")
    assert load_recipe(run) == load_recipe(str(run))
    assert load_recipe(run).run.folder == run
    monkeypatch.chdir(run)
    assert load_recipe(".").run.folder == run
    assert load_recipe(run, {"run": {"out": "elsewhere"}}).run.folder == Path("elsewhere", "moved")


def test_recipe_built_by_hand_checks_types_too():
    with pytest.raises(ConfigError, match=r"run.out must be a path, not 'here'") as caught:
        Recipe(run=RunConfig(out="here"), train=TrainConfig(steps=1.5), optim=OptimConfig(betas=[0.9, 0.99]))
    assert "train.steps must be a whole number or none, not 1.5" in str(caught.value)
    assert "optim.betas must be a list of 2" in str(caught.value)


# Violations


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ({"run": {"name": "a/b"}}, "run.name must be a plain folder name"),
        ({"run": {"name": ".."}}, "run.name must be a plain folder name"),
        ({"run": {"name": ""}}, "run.name must be a plain folder name"),
        ({"run": {"seed": -1}}, "run.seed must be between 0 and 2^63 - 1"),
        ({"run": {"out": "a\0b"}}, "run.out must be a path, which has no NUL byte"),
        ({"model": {"hidden_size": 0}}, "model.hidden_size must be at least 1, not 0"),
        ({"model": {"hidden_size": 100}}, "model.num_attention_heads must divide hidden_size 100"),
        ({"model": {"hidden_size": 392}}, "model.num_attention_heads must leave heads of even width"),
        ({"model": {"init_from": ""}}, "model.init_from must name a checkpoint folder"),
        ({"model": {"init_from": "m", "hidden_size": 8}}, "model.hidden_size must be left out"),
        ({"model": {"init_from": "m", "preset": "llama-9m"}}, "model.preset must be left out with init_from"),
        ({"relora": {"rank": 512}}, "relora.rank must be less than 512, not 512"),
        ({"relora": {"warm_start_steps": -1}}, "relora.warm_start_steps must be at least 0, not -1"),
        ({"relora": {"warm_start_steps": 10_000}}, "relora.warm_start_steps must be less than the"),
        ({"relora": {"warm_start_steps": 9_500}}, "relora.restart_every must be at most the 500 steps"),
        ({"relora": {"restart_every": 20_000}}, "relora.restart_every must be at most the 10000 steps"),
        ({"schedule": {"rewarmup_steps": 1000}}, "schedule.rewarmup_steps must be less than the 1000 steps"),
        (
            {"schedule": {"rewarmup_steps": 300}, "relora": {"restart_every": 400, "restart_growth": 0.7}},
            "schedule.rewarmup_steps must be less than the",
        ),
        (
            {"train": {"compile": True}, "relora": {"factors": "B", "residual": "sign"}},
            "train.compile must be false with relora.residual 'sign'",
        ),
        (
            {"train": {"compile": True}, "relora": {"init": "gradient"}},
            "train.compile must be false with relora.init 'gradient'",
        ),
        ({"schedule": {"warmup_steps": 10_000}}, "schedule.warmup_steps must be less than the 10000 steps"),
        ({"schedule": {"min_ratio": 1.1}}, "schedule.min_ratio must be at least 0 and at most 1, not 1.1"),
        ({"optim": {"low_rank_lr": 0}}, "optim.low_rank_lr must be above 0, not 0"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas must be at least 0 and below 1, not 0.9 and 1"),
        ({"optim": {"clip_grad_norm": -1}}, "optim.clip_grad_norm must be at least 0"),
        ({"train": {"steps": 5, "tokens": 5}}, "train.steps and tokens must not both be given"),
        ({"train": {"steps": None}}, "train.steps or tokens must be given"),
        ({"train": {"steps": 0}}, "train.steps must be at least 1, not 0"),
        ({"train": {"tokens": 5}}, "train.tokens must be at least the"),
        ({"train": {"batch_size": 20}}, "train.batch_size must be a multiple of micro_batch_size"),
        ({"train": {"micro_batch_size": 0}}, "train.micro_batch_size must be at least 1, not 0"),
        ({"data": {"seq_len": 4096}}, "data.seq_len must be at most model.max_position"),
        ({"eval": {"every": -1}}, "eval.every must be at least 0"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last must be at least 1"),
        ({"log": {"sinks": ["wand"]}}, "log.sinks must hold names among"),
    ],
)
def test_violation_is_named_with_its_section(layer, wanted):
    assert wanted in complaint(layer)


def test_full_rank_ignores_the_low_rank_settings():
    low_rank = {"rank": 4096, "warm_start_steps": 10**6, "restart_every": 10**7}
    recipe = resolve({"run": {"method": "full"}, "relora": low_rank})
    assert recipe.switch_step is None


def test_lora_needs_no_room_for_restarts():
    lora = {"run": {"method": "lora"}, "relora": {"restart_every": 10**6, "warm_start_steps": 10}}
    assert resolve(lora).switch_step == 10


def test_rank_must_fit_the_feed_forward_layers_only_where_they_are_targets():
    narrow = {"model": {"intermediate_size": 64}}
    assert "a side of model.intermediate_size 64" in complaint(narrow)
    resolve(narrow, {"relora": {"targets": ["*.q_proj"]}})


def test_tokens_decide_the_steps():
    train = TrainConfig(steps=None, tokens=10_000_999, batch_size=16)
    assert Recipe(train=train, data=DataConfig(seq_len=100)).total_steps == 6250


@pytest.mark.parametrize(
    ("low_rank", "factor", "in_force"),
    [(None, None, (1.0, 1.0)), (2.0, None, (2.0, 2.0)), (None, 3.0, (1.0, 3.0)), (2.0, 3.0, (2.0, 3.0))],
)
def test_learning_rates_default_to_one_another(low_rank, factor, in_force):
    optim = OptimConfig(lr=1.0, low_rank_lr=low_rank, factor_lr=factor)
    assert (optim.low_rank_lr_in_force, optim.factor_lr_in_force) == in_force


# Precedence


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlr = 0.5\nweight_decay = 0.25\n", encoding="utf-8")
    recipe = load_recipe(path, {"optim": {"lr": 2}})
    assert recipe.optim == OptimConfig(lr=2.0, weight_decay=0.25)
    assert isinstance(recipe.optim.lr, float)


def test_recipe_without_a_name_lends_its_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nseed = 3\n", encoding="utf-8")
    assert load_recipe(path).run == RunConfig(name="mine", seed=3)
    assert load_recipe(path, {"run": {"name": "other"}}).run.name == "other"


def test_steps_and_tokens_take_each_other_back():
    tokens, steps = {"train": {"tokens": 10**8}}, {"train": {"steps": 9000}}
    assert resolve(tokens).train == TrainConfig(steps=None, tokens=10**8)
    assert resolve(tokens, steps).train == TrainConfig(steps=9000)
    assert resolve(steps, tokens).train == TrainConfig(steps=None, tokens=10**8)


def test_preset_and_checkpoint_take_sizes_back():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    by_hand, named = {"model": sizes}, {"model": {"preset": "llama-350m"}}
    loaded = {"model": {"init_from": "m"}, "data": {"tokenizer": "m"}}
    assert resolve(by_hand).model == ModelConfig(preset=None, **sizes)
    assert resolve(by_hand, named).model == ModelConfig(preset="llama-350m")
    assert resolve(named, by_hand).model == ModelConfig(preset=None, **sizes)
    assert resolve(by_hand, loaded).model == ModelConfig(preset=None, init_from="m")
    assert resolve(loaded, named).model == ModelConfig(preset="llama-350m")
    assert resolve(named, {"model": {"hidden_size": 512}}).model.preset == "llama-350m"


def test_another_source_takes_the_dataset_back():
    hub = {"data": {"source": "hub", "path": "allenai/c4", "name": "en", "tokenizer": "t5"}}
    assert resolve(hub, {"data": {"source": "python-stdlib"}}).data == DataConfig(tokenizer="t5")
    assert resolve(hub, {"data": {"source": "hub", "name": "de"}}).data.path == "allenai/c4"


# Files


def test_folder_of_a_run_names_its_recipe(tmp_path):
    write_recipe(load_recipe("llama-9m"), tmp_path / "recipe.toml")
    run = {"out": str(tmp_path.parent), "name": tmp_path.name}
    assert load_recipe(tmp_path) == load_recipe("llama-9m", {"run": run})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_path_is_never_taken_for_the_name_of_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("quickstart")
    folder.mkdir()
    write_recipe(load_recipe("llama-9m"), folder / "recipe.toml")
    assert load_recipe(folder).model == load_recipe("llama-9m").model != load_recipe("quickstart").model


def test_missing_recipe_names_the_nearest_shipped_one():
    with pytest.raises(ConfigError, match=r"'lama-60m' is neither a file .* \(did you mean 'llama-60m'\?\)"):
        find_recipe("lama-60m")


@pytest.mark.parametrize(
    "content",
    [
        b"[run\nname = 1",
        b"[run]\nname = '\xff'",
        b"[run]\n[run]\n",
        b"[run]\nseed = " + b"9" * 5000,
        b"[run]\nseed = " + b"[" * 100_000,
    ],
    ids=["syntax", "encoding", "twice", "digits", "nesting"],
)
def test_file_that_is_no_toml_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken.toml is not valid TOML"):
        load_recipe(path)


def test_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nsteps = 0\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}: train.steps must be at least 1")


def test_wheel_carries_its_recipes_inside_the_package(tmp_path, monkeypatch):
    inside = tmp_path / "relora" / "recipes"
    inside.mkdir(parents=True)
    (inside / "quickstart.toml").write_text("[run]\nseed = 7\n", encoding="utf-8")
    monkeypatch.setattr(relora, "__file__", str(tmp_path / "relora" / "__init__.py"))
    assert load_recipe("quickstart").run.seed == 7


def test_changed_fields_are_named_with_both_values():
    before, after = Recipe(), Recipe(run=RunConfig(seed=4), log=LogConfig(every=3))
    assert changed_fields(before, after) == {"run.seed": (0, 4), "log.every": (10, 3)}


# The way back to TOML


def test_no_field_loses_a_default_where_none_is_left_out():
    decided_by_others = {"train.steps", "model.preset"}
    for name, kind in SECTIONS.items():
        for field, annotation in field_types(kind).items():
            optional = type(None) in options(annotation)
            assert not optional or f"{name}.{field}" in decided_by_others or getattr(kind(), field) is None


texts = st.text(min_size=1, max_size=20)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
counts = st.integers(min_value=1, max_value=10**18)
sizes = st.fixed_dictionaries(
    {"hidden_size": st.sampled_from([384, 768])},
    optional={"num_hidden_layers": counts, "max_position_embeddings": st.integers(256, 10**9)},
)
complete = st.fixed_dictionaries(
    {"intermediate_size": counts, "num_hidden_layers": counts, "num_attention_heads": st.just(12)}
)
models = st.one_of(
    st.builds(lambda given: ModelConfig(preset="llama-130m", **given), sizes),
    st.builds(lambda given, rest: ModelConfig(preset=None, **(given | rest)), sizes, complete),
    st.builds(lambda origin: ModelConfig(preset=None, init_from=origin), texts),
)
recipes = st.builds(
    Recipe,
    run=st.builds(
        RunConfig,
        name=st.from_regex(r"[a-zA-Z0-9_][\w.+=@ -]*", fullmatch=True),
        method=st.just("full"),
        seed=st.integers(0, 2**63 - 1),
        out=st.builds(Path, texts.filter(lambda text: "\0" not in text)),
    ),
    model=models,
    data=st.builds(
        DataConfig, source=st.just("text"), path=texts, tokenizer=texts, eos_token=st.none() | texts
    ),
    relora=st.builds(
        ReLoRASection,
        rank=counts,
        alpha=st.none() | positive,
        dropout=fractions,
        targets=st.just("all-linear") | st.lists(texts, min_size=1, max_size=3).map(tuple),
        exclude=st.lists(texts, max_size=3).map(tuple),
        reset_step_count=st.booleans(),
        warm_start_steps=counts,
    ),
    optim=st.builds(
        OptimConfig,
        lr=positive,
        factor_lr=st.none() | positive,
        betas=st.tuples(fractions, fractions),
        clip_grad_norm=st.integers(0, 3),
    ),
    train=st.builds(TrainConfig, steps=st.integers(10**4, 10**18), compile=st.booleans())
    | st.builds(TrainConfig, steps=st.none(), tokens=st.integers(10**8, 10**18)),
    log=st.builds(LogConfig, sinks=st.permutations(["jsonl", "wandb"]).map(tuple)),
)


@settings(deadline=None, max_examples=150)
@given(recipe=recipes)
def test_recipe_survives_the_way_to_toml_and_back(recipe):
    assert resolve(tomllib.loads(recipe_toml(recipe))) == recipe


def test_settings_that_lora_leaves_idle_are_named():
    given = {"factors": "B", "residual": "sign", "reset": "none", "rank": 8}
    assert resolve({"run": {"method": "lora"}, "relora": given}).idle_settings == ["reset", "residual"]
    assert resolve({"relora": given}).idle_settings == []
    assert resolve({"run": {"method": "full"}, "relora": given}).idle_settings == []
