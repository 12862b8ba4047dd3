"""A study that is like another: what it takes from it, what stands anew, and what is refused."""

from pathlib import Path

import pytest

from relora.errors import ConfigError
from relora.lab.study_file import read_study

OLDER = """
[study]
name = "older"
base = "small.toml"
tokens = 100_000
seeds = [0, 1]
references = ["full"]

[tuning]
tokens = 50_000
search = "axes"

[set]
relora.rank = 4
train.precision = "fp32"

[methods.full.grid]
optim.lr = [1e-3, 2e-3]

[methods.lora]
inherit = "full"
grid = { optim.factor_lr = ["1x", "2x"] }
"""

NEWER = """
[study]
like = "../older"
steps = 30

[tuning]
seed = 7

[set]
relora.alpha = 8.0
data.source = "text"
data.path = "mine.txt"

[methods.lora]
grid = { optim.factor_lr = ["4x"] }
"""

BASE = """
[data]
vocab_size = 512
[relora]
warm_start_steps = 5
restart_every = 10
[schedule]
warmup_steps = 2
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, text in (("older", OLDER), ("newer", NEWER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.toml").write_text(text)
    (tmp_path / "older" / "small.toml").write_text(BASE)
    return tmp_path


def read(folders: Path, changes: dict[str, str] | None = None):
    file = folders / "newer" / "study.toml"
    text = file.read_text()
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return read_study(file)


def test_keys_stand_unless_given_anew_and_methods_as_a_whole(folders: Path):
    study = read(folders)
    assert study.name == "newer"
    assert study.seeds == (0, 1) and study.search == "axes" and study.tuning_seed == 7
    assert study.settings == {
        "relora.rank": 4,
        "relora.alpha": 8.0,
        "train.precision": "fp32",
        "data.source": "text",
        "data.path": "mine.txt",
    }
    assert study.base["data"] == {"vocab_size": 512}
    assert [arm.name for arm in study.arms] == ["full", "lora"]
    assert study.arm("lora").inherit is None
    assert study.arm("lora").grid == {"optim.factor_lr": ("4x",)}
    assert study.source.startswith(NEWER.rstrip()) and OLDER in study.source


def test_a_length_replaces_one_of_the_other_kind(folders: Path):
    study = read(folders)
    assert [budget.label for budget in study.budgets] == ["30 steps"]
    assert study.tuning_budget is not None and study.tuning_budget.tokens == 50_000


def test_a_name_given_stands(folders: Path):
    assert read(folders, {"steps = 30": 'steps = 30\nname = "own"'}).name == "own"


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ('"../missing"', "is no study: give a study.toml"),
        ("3", "study.like must be the file or folder of a study, not 3"),
        ('"."', "a study cannot be like itself"),
        ('"../third"', "a study cannot be like itself"),
    ],
)
def test_what_is_no_other_study_is_refused(folders: Path, like: str, said: str):
    (folders / "third").mkdir()
    (folders / "third" / "study.toml").write_text('[study]\nlike = "../newer/study.toml"\n')
    with pytest.raises(ConfigError, match=r"study\.toml: study\.like") as caught:
        read(folders, {'"../older"': like})
    assert said in str(caught.value)


@pytest.mark.parametrize("head", ["study = 3", "[[study]]\nsteps = 3"])
def test_another_study_without_a_head_is_refused(folders: Path, head: str):
    (folders / "older" / "study.toml").write_text(head)
    with pytest.raises(ConfigError, match=r"study\.like: .*older/study\.toml has no table \[study\]"):
        read(folders)


def test_a_method_may_be_called_as_a_length_is(folders: Path):
    older = folders / "older" / "study.toml"
    older.write_text(OLDER + '\n[methods.tokens]\nmethod = "lora"\n')
    study = read(folders, {"[methods.lora]": "[methods.steps]\nmethod = 'lora'\n[methods.lora]"})
    assert [arm.name for arm in study.arms] == ["full", "lora", "tokens", "steps"]


def test_three_studies_in_a_row_with_bases_of_their_own_from_any_folder(
    folders: Path, monkeypatch: pytest.MonkeyPatch
):
    third = folders / "third"
    third.mkdir()
    (third / "own.toml").write_text(BASE.replace("512", "600"))
    (third / "study.toml").write_text('[study]\nlike = "../newer"\nbase = "own.toml"\nseeds = [4]\n')
    monkeypatch.chdir(third)
    for path in (Path("study.toml"), third / "study.toml"):
        study = read_study(path)
        assert study.base["data"] == {"vocab_size": 600}
        assert study.seeds == (4,) and study.settings["relora.alpha"] == 8.0
        assert study.settings["relora.rank"] == 4


def test_a_file_of_another_name_is_a_study_of_that_name(folders: Path):
    path = folders / "older" / "longer.toml"
    path.write_text('[study]\nlike = "study.toml"\ntokens = 200_000\n')
    assert read_study(path).name == "longer"


def test_a_mistake_in_the_other_study_is_said(folders: Path):
    (folders / "older" / "study.toml").write_text(OLDER.replace("rank = 4", "rnak = 4"))
    with pytest.raises(ConfigError, match=r"(?s)newer/study\.toml \(like .*older/study\.toml\) .*rnak"):
        read(folders)
