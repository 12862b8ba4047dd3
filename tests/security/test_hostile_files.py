"""Files made to do harm, one for each known way: what they ask for does not happen, and we say so."""

import ast
import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import save_file

import relora
from relora.checkpoint.card import model_card
from relora.data import sources
from relora.data.config import DataConfig
from relora.data.sources import open_source
from relora.errors import CheckpointError, ConfigError, DataError
from relora.report.page import write_report
from relora.train.evaluate import evaluate_path
from relora.train.fit import fit
from relora.train.model import load_pretrained
from relora.train.recipe_io import load_recipe
from relora.train.saved import load_saved
from tiny_run import tiny_recipe

SOURCE = Path(relora.__file__).parent
MARK = "this was run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model folder that loads."""
    from relora.train.export import export_run

    folder = tmp_path_factory.mktemp("model")
    run = fit(tiny_recipe(folder, run={"method": "full"}, train={"steps": 3})).folder
    return export_run(run, folder / "exported")


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def put(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_model_loads_as_it_is(model: Path) -> None:
    assert sum(p.numel() for p in load_pretrained(str(model)).parameters()) > 1000


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x\x00.safetensors", 3, ["a"]]
)
def test_an_index_that_leaves_its_folder_is_refused(model: Path, name: object) -> None:
    (model.parent / "outside.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="is not a bare file name"):
        load_pretrained(str(model))


def test_links_and_devices_in_a_model_folder_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(model.parent / "elsewhere")
    weights.symlink_to(model.parent / "elsewhere")
    with pytest.raises(ConfigError, match=r"'model\.safetensors' is a link: copy what it points to"):
        load_pretrained(str(model))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        load_pretrained(str(model))


class _Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.mark, MARK)


def test_a_pickle_is_refused_and_one_that_is_allowed_still_runs_nothing(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm(mark)))
    with pytest.raises(ConfigError, match=r"which is a pickle.*model\.pickled_weights"):
        load_pretrained(str(model))
    with pytest.raises(ConfigError, match="does not load"):
        load_pretrained(str(model), pickled_weights=True)
    torch.save({"a": _Harm(mark)}, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="does not load"):
        load_pretrained(str(model), pickled_weights=True)
    assert not mark.exists()


def test_plain_pickled_weights_load_where_they_are_allowed(model: Path) -> None:
    wanted = load_pretrained(str(model)).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(wanted, model / "pytorch_model.bin")
    found = load_pretrained(str(model), pickled_weights=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_pickle_named_by_an_index_of_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(_Harm(tmp_path / "mark")))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "weights.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"should end in \.safetensors"):
        load_pretrained(str(model))
    assert not (tmp_path / "mark").exists()


def test_code_that_comes_with_a_model_or_a_tokenizer_is_never_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (model / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').write('{MARK}')\nclass Evil: pass\n")
    put(model / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})
    put(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    with pytest.raises(ConfigError, match="does not load"):
        load_pretrained(str(model))
    with pytest.raises((ConfigError, CheckpointError, DataError)):
        evaluate_path(model)
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"text_config": {"experts_implementation": "someone/kernel@main"}},
    ],
)
def test_a_config_that_asks_for_a_kernel_from_the_hub_is_refused(
    model: Path, changes: dict[str, object]
) -> None:
    put(model / "config.json", **changes)
    with pytest.raises(ConfigError, match="asks for code from elsewhere"):
        load_pretrained(str(model))


def test_an_adapter_that_names_a_base_model_of_its_own_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ConfigError, match="asks for a base model of its own"):
        load_pretrained(str(model))


def test_sizes_that_would_take_all_memory_are_refused_before_any_is_taken(tmp_path: Path) -> None:
    folder = fit(tiny_recipe(tmp_path, run={"method": "lora"}, train={"steps": 6})).folder
    config = folder / "model" / "config.json"
    whole = config.read_text()
    put(config, hidden_size=2**20, intermediate_size=2**22, vocab_size=2**30)  # petabytes
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_saved(folder)
    config.write_text(whole)
    put(config, num_hidden_layers=10**7)
    with pytest.raises(CheckpointError, match="which no model has"):
        load_saved(folder)
    for damage in ("{", "[]", '{"model_type": "evil"}', "[" * 1000):
        config.write_text(damage)
        with pytest.raises(CheckpointError):
            load_saved(folder)


def test_a_header_longer_than_its_file_takes_no_memory(model: Path) -> None:
    (model / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_pretrained(str(model))


def test_factors_left_in_a_folder_are_refused(model: Path) -> None:
    save_file({"layer.lora_A": torch.zeros(2)}, model / "model.safetensors")
    with pytest.raises(ConfigError, match="holds low-rank factors"):
        load_pretrained(str(model))


def bomb(path: Path, kind: str, *, megabytes: int, unit: bytes) -> Path:
    """Write a compressed file that expands to so many megabytes, piece by piece."""
    block = unit * (2**20 // len(unit))
    if kind == "gz":
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(megabytes):
                file.write(block)
    else:
        with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=19)) as file:
            for _ in range(megabytes):
                file.write(block)
    return path


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("document", ["file", "line", "block"])
def test_a_file_that_expands_out_of_proportion_is_refused(tmp_path: Path, kind: str, document: str) -> None:
    path = bomb(tmp_path / f"bomb.txt.{kind}", kind, megabytes=70, unit=b"\0")
    assert path.stat().st_size < 2**18
    config = DataConfig(source="text", path=str(path), document=document)
    with pytest.raises(DataError, match="expands to more than 250 times its size"):
        for _ in open_source(config).records():
            pass


def test_many_bombs_in_one_file_are_refused_as_one(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor(level=19).compress(b" " * 2**24)
    path = tmp_path / "many.jsonl.zst"
    path.write_bytes(frame * 40)
    with pytest.raises(DataError, match="expands to more than"):
        list(open_source(DataConfig(source="jsonl", path=str(path))).records())


def test_a_parquet_file_that_repeats_one_long_text_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["x" * 4_000_000] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="expands to more than"):
        list(open_source(DataConfig(source="parquet", path=str(tmp_path / "a.parquet"))).records())
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["y" * 70_000_000]}), tmp_path / "b.parquet", compression="zstd"
    )
    with pytest.raises(DataError, match="expands to more than"):
        list(open_source(DataConfig(source="parquet", path=str(tmp_path / "b.parquet"))).records())


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_line_without_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "long").write_bytes(b"x" * 1001)
    for document in ("line", "file"):
        config = DataConfig(source=source, path=str(tmp_path / "long"), document=document)
        with pytest.raises(DataError, match="is longer than the"):
            list(open_source(config).records())


def test_a_recipe_is_data_and_names_no_object_of_python(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    words = [
        f'__import__("pathlib").Path({str(mark)!r}).write_text("x")',
        "!!python/object/apply:os.system ['true']",
        "${oc.env:HOME}",
        "$(touch mark)",
    ]
    for word in words:
        (tmp_path / "recipe.toml").write_text(
            f"[run]\nname = {json.dumps(word)}\n[optim]\nlr = {json.dumps(word)}\n"
        )
        with pytest.raises(ConfigError, match=r"optim\.lr must be"):
            load_recipe(tmp_path / "recipe.toml")
    assert not mark.exists()
    (tmp_path / "recipe.toml").write_text('[model]\n_target_ = "os.system"\n')
    with pytest.raises(ConfigError, match="_target_"):
        load_recipe(tmp_path / "recipe.toml")


def test_cards_and_reports_show_what_data_says_and_obey_none_of_it(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>](http://evil) ``` \n---\nlicense: evil'
    card = model_card({"run": {"name": evil}, "data": {"path": evil}}, {"sample": evil, "method": evil})
    head = card.split("---")[1]
    assert "evil" not in head
    assert card.count("<script>") == card.count("````<script>") + card.count("````text\n<script>")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(f"[run]\nname = {json.dumps(evil)}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.0, "phase": evil}) + "\n")
    restart = {"step": 1, "restart_index": evil, "loss_before": 1.0, "loss_after": 2.0, "hurt": True}
    (run / "restarts.jsonl").write_text(json.dumps({**restart, "layers": [{"name": evil}]}) + "\n")
    (run / "summary.json").write_text(json.dumps({"sample": evil, "method": evil, "strategy": evil}))
    page = write_report(run).read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


FORBIDDEN_BUILTINS = {"eval", "exec", "compile"}
FORBIDDEN_CALLS = {"system", "popen", "Popen", "check_output"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "yaml"}
LOADERS = {"from_pretrained", "from_config"}
STARTS_PROCESSES = "lab/processes.py"
"""The laboratory trains its cells in processes: this interpreter, a list of words, no shell."""


def test_the_source_has_no_pickle_no_shell_no_eval_and_never_trusts_remote_code() -> None:
    wrong = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                wrong += [place for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                wrong.append(place)
            elif isinstance(node, ast.Call):
                wrong += [f"{place}: {why}" for why in call_problems(node)]
    starter = [place for place in wrong if place.startswith(STARTS_PROCESSES)]
    assert [place for place in wrong if place not in starter] == []
    assert [place.partition(": ")[2] for place in starter] == ["", "calls Popen"]  # the import, and one call
    assert "shell" not in (SOURCE / STARTS_PROCESSES).read_text(encoding="utf-8").partition("Popen(")[2]


def call_problems(node: ast.Call) -> list[str]:
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    owner = getattr(getattr(node.func, "value", None), "id", None)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    trusted = keywords.get("trust_remote_code")
    problems = []
    if (name in FORBIDDEN_BUILTINS and isinstance(node.func, ast.Name)) or name in FORBIDDEN_CALLS:
        problems.append(f"calls {name}")
    if (owner, name) in {("torch", "load"), ("torch", "save")}:
        problems.append(f"calls torch.{name}")
    if name in LOADERS and not (isinstance(trusted, ast.Constant) and trusted.value is False):
        problems.append(f"{name} without trust_remote_code=False")
    if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
        problems.append("trust_remote_code is not False")
    return problems
