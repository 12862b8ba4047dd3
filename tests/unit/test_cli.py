"""The command line: help without torch, settings over recipes, a message and exit code for each mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest

from relora import __version__
from relora.cli import arguments
from relora.cli.arguments import split_settings
from relora.cli.main import VERBS, main
from relora.cli.output import print_json, print_result, stdout_for_result
from relora.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OptimizerResetError,
)
from relora.train.checks import field_types
from relora.train.config import SECTIONS
from relora.train.recipe_io import load_recipe

HEAVY = ("torch", "transformers", "datasets", "tokenizers", "numpy", "matplotlib", "rich", "typeguard")


def relora(*words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "relora", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def error_of(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(list(words)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == [], "a refused command must leave nothing behind"


# Help


def test_train_help_imports_nothing_heavy():
    shown = relora("train", "--help", python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert shown.returncode == 0
    assert "tyro" in imported
    assert not imported & set(HEAVY)


def test_train_help_shows_every_field_with_its_help(capsys):
    assert main(["train", "--help"]) == 0
    lines = [line.strip("\u2502| ") for line in capsys.readouterr().out.splitlines()]
    shown = {line.split()[0] for line in lines if line.startswith("--") and line.strip("-")}
    fields = {f"--{name}.{field}" for name, kind in SECTIONS.items() for field in field_types(kind)}
    assert shown == fields | {"--json", "--overwrite", "--fork"}
    first_words = [after for line, after in pairwise(lines) if line.split()[:1] and line.split()[0] in fields]
    assert all(word and not word.startswith(("--", "(default")) for word in first_words)


def test_help_shows_the_values_of_the_recipe_before_it(capsys):
    main(["train", "llama-350m", "--help"])
    assert "(default: llama-350m)" in capsys.readouterr().out


def test_help_takes_no_options_value_for_a_recipe(capsys):
    assert main(["plan", "--memory", "24GiB", "--help"]) == 0
    assert "--relora.rank" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_overview_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_no_verb_is_a_usage_error(capsys):
    assert "usage: relora VERB" in error_of(capsys)


def test_module_is_the_command():
    shown = relora("--version")
    assert (shown.returncode, shown.stdout) == (0, f"relora {__version__}\n")


def test_reader_that_stops_reading_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "relora", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


# Settings


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--train.steps", "10_000"], {"train": {"steps": 10_000}}),
        (["--train.batch-size=4"], {"train": {"batch_size": 4}}),
        (["--train.compile", "true"], {"train": {"compile": True}}),
        (["--train.compile", "False"], {"train": {"compile": False}}),
        (["--train.compile"], {"train": {"compile": True}}),
        (["--train.tokens", "none"], {"train": {"tokens": None}}),
        (["--data.path", "None"], {"data": {"path": None}}),
        (["--optim.lr", "-1e-3"], {"optim": {"lr": -1e-3}}),
        (["--optim.betas", "0.9", "0.95"], {"optim": {"betas": (0.9, 0.95)}}),
        (["--log.sinks", "jsonl", "wandb"], {"log": {"sinks": ("jsonl", "wandb")}}),
        (["--relora.exclude"], {"relora": {"exclude": ()}}),
        (["--relora.targets", "all-linear"], {"relora": {"targets": "all-linear"}}),
        (["--relora.targets", "*.q_proj", "*.v_proj"], {"relora": {"targets": ("*.q_proj", "*.v_proj")}}),
        (["--data.path=a=b c"], {"data": {"path": "a=b c"}}),
        (["--run.seed", "1", "--run.seed", "2"], {"run": {"seed": 2}}),
        (["--train.stops", "3"], {"train": {"stops": "3"}}),
        (["--trian.steps", "3"], {"trian": {"steps": "3"}}),
    ],
)
def test_setting_is_read_by_the_type_of_its_field(words, value):
    others, settings = split_settings(["mine.toml", *words, "--json"])
    assert others == ["mine.toml", "--json"]
    assert settings == value


def test_words_that_are_no_settings_stay_in_order():
    words = ["a.toml", "--optim.betas", "0.9", "0.99", "b.c", "--prompt", "--", "-x"]
    others, settings = split_settings(words)
    assert others == ["a.toml", "b.c", "--prompt", "--", "-x"]
    assert settings == {"optim": {"betas": (0.9, 0.99)}}


def fake_fit(calls: list) -> Callable[..., object]:
    def fit(recipe, *, overwrite=False, fork=None):
        calls.append((recipe, overwrite, fork))
        print("training noise")
        return SimpleNamespace(folder=recipe.run.folder, summary={"eval/loss": float("inf")}, exit_code=143)

    return fit


@pytest.fixture
def fits(monkeypatch):
    """Stand in for the trainer, which has tests of its own: what the verb asks of it is looked at here."""
    calls: list = []
    monkeypatch.setitem(sys.modules, "relora.train.fit", SimpleNamespace(fit=fake_fit(calls)))
    return calls


def test_train_hands_the_resolved_recipe_to_the_trainer(fits, capsys):
    own = ["--overwrite", "llama-20m", "--fork", "other"]
    assert main(["train", *own, "--train.tokens", "300_000_000", "--optim.lr=2e-3"]) == 143
    overrides = {"train": {"tokens": 300_000_000}, "optim": {"lr": 2e-3}}
    assert fits == [(load_recipe("llama-20m", overrides), True, "other")]
    assert capsys.readouterr().out == "training noise\n"


def test_train_without_a_recipe_is_the_quickstart(fits):
    main(["train"])
    assert fits == [(load_recipe("quickstart"), False, None)]


def test_json_result_has_stdout_for_itself(fits, capsys):
    assert main(["train", "--json", "--run.name", "x"]) == 143
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"folder": "runs/x", "exit_code": 143, "eval/loss": None}
    assert shown.err == "training noise\n"


def test_only_the_main_process_prints_the_result(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    print_json({"a": 1})
    print_result({"a": 1}, as_json=False)
    assert capsys.readouterr().out == ""


def test_result_is_lined_up_for_people(capsys):
    counts = {"documents": 12345, "share": 0.5, "skipped": []}
    notes = ["a first remark of some forty characters", "a second one, and just about as long as that"]
    result = {"folder": "x", "is_finished": True, "counts": counts, "step": None, "notes": notes, "more": {}}
    print_result(result, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "folder       x",
        "is_finished  yes",
        "counts",
        "  documents  12,345",
        "  share      0.5",
        "  skipped    none",
        "step         none",
        "notes",
        "  a first remark of some forty characters",
        "  a second one, and just about as long as that",
        "more         none",
    ]


def test_characters_that_act_on_a_terminal_are_spelled_out(capsys):
    print_result({"sample": "red \x1b[31m\u202eand\nmore"}, as_json=False)
    assert capsys.readouterr().out == "sample  red \\x1b[31m\\u202eand\\nmore\n"


def test_stdout_is_left_alone_without_json(capsys):
    with stdout_for_result(only_json=False):
        print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_prepare_says_what_there_is_and_finds_it_again(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(
            f"document {number}: " + "all work and no play. " * 40, encoding="utf-8"
        )
    where = ["--data.source", "text", "--data.path", str(text), "--data.cache_dir", str(tmp_path / "cache")]
    how = ["--data.vocab_size", "270", "--data.seq_len", "16", "--data.heldout_fraction", "0.3"]
    summaries = []
    for _ in range(2):
        assert main(["prepare", "--json", *where, *how]) == 0
        summaries.append(json.loads(capsys.readouterr().out))
    assert summaries[0] == summaries[1]
    assert summaries[0]["counts"]["documents"] == 40
    tokens = load_recipe("quickstart").total_steps * 16 * load_recipe("quickstart").train.batch_size
    assert summaries[0]["epochs_of_the_run"] == tokens / summaries[0]["train_tokens"]


# Mistakes


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("words", "code", "wanted"),
    [
        (["prepare", "--data.source", "text", "--data.path", "nowhere"], 3, "nowhere does not exist"),
        (["inspect", "nowhere"], 2, "nowhere is not a run"),
        (["eval", "nowhere"], 2, "nowhere is not a folder"),
        (["generate", "nowhere", "--prompt", "x"], 2, "nowhere is not a folder"),
    ],
)
def test_missing_folder_is_named(words, code, wanted, capsys):
    assert wanted in error_of(capsys, *words, code=code)


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["trian"], "'trian' is not a verb (did you mean 'train'?)"),
        (["train", "quickstrat"], "(did you mean 'quickstart'?)"),
        (["train", "a.toml", "b.toml"], "b.toml"),
        (["train", "--lr", "3"], "--optim.lr"),
        (["train", "--train.steps"], "--train.steps must be followed by a value"),
        (["train", "--optim.betas", "0.9"], "--optim.betas must be followed by 2 values"),
        (["train", "--train.step", "3"], "train.step is not a known key (did you mean 'train.steps'?)"),
        (["train", "--optin.lr", "3"], "[optin] is not a known section (did you mean 'optim'?)"),
        (["train", "--train.steps", "many"], "train.steps must be a whole number or none, not 'many'"),
        (["train", "--train.steps", "1e3"], "train.steps must be a whole number or none, not '1e3'"),
        (["train", "--train.compile", "maybe"], "train.compile must be true or false, not 'maybe'"),
        (["train", "--train.precision", "fp16"], 'must be one of "auto", "fp32", "bf16", not \'fp16\''),
        (["train", "--relora.rank", "4096"], "relora.rank must be less than"),
        (["train", "--relora.restart_every", "100_000"], "relora.restart_every must be at most"),
        (["train", "--relora.warm_start_steps", "100_000"], "relora.warm_start_steps must be less than"),
        (["train", "--train.micro_batch_size", "7"], "must be a multiple of micro_batch_size"),
        (["train", "--train.steps", "9", "--train.tokens", "9"], "must not both be given"),
        (["prepare", "--data.heldout_fraction", "2"], "data.heldout_fraction must be above 0 and below 1"),
        (["eval"], "PATH"),
        (["eval", "x", "--optim.lr", "3"], "optim.lr has no effect here: only [data] has"),
        (["eval", "x", "--data.seqlen", "3"], "(did you mean 'data.seq_len'?)"),
        (["generate", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "x", "--prompt", "\udcff"], "prompt must be a text"),
        (["eval", "x", "--sequences", "0"], "sequences must be at least 1, not 0"),
        (["generate", "x", "--max-new-tokens", "many"], "--max_new_tokens"),
        (["export", "x"], "OUT"),
        (["export", "x", "y", "--step", "-3"], "--step must be at least 0, not -3"),
    ],
)
def test_usage_mistake_gets_one_message_and_exit_code_2(words, wanted, capsys):
    assert wanted in error_of(capsys, *words)


def test_every_mistake_is_said_at_once(capsys):
    message = error_of(capsys, "train", "--train.step", "3", "--optim.lr", "x", "--nothing.here", "1")
    assert "has 3 problems:" in message


def test_json_error_is_one_object_on_stdout(capsys):
    assert main(["train", "--json", "--train.steps", "0"]) == 2
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said["kind"] == "ConfigError"
    assert said["exit_code"] == 2
    assert "train.steps must be at least 1, not 0" in said["error"]
    assert said["error"] in shown.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_message_has_no_box_around_it_whatever_the_terminal(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    assert relora("export", "a", "b", "c").stderr == (
        "relora: export: Unrecognized options: c\n  For full helptext, run relora export --help\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (NonFiniteError, 5), (OptimizerResetError, 1)],
)
def test_our_errors_have_their_exit_codes(error, code, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "load_recipe", raising(error("cause, place, remedy")))
    assert error_of(capsys, "train", code=code) == "relora: cause, place, remedy\n"


def test_interrupt_outside_training_is_130(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "load_recipe", raising(KeyboardInterrupt()))
    assert error_of(capsys, "train", code=130) == "relora: interrupted\n"


def test_unexpected_exception_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(arguments, "load_recipe", raising(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["train"])


def test_error_of_one_process_among_many_says_which(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert error_of(capsys, "train", "--train.steps", "0").startswith("[rank 3] relora: ")


def raising(error: BaseException) -> Callable[..., object]:
    def refuse(*_words: object, **_settings: object) -> object:
        raise error

    return refuse
