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


def test_a_mistake_in_the_other_study_is_said(folders: Path):
    (folders / "older" / "study.toml").write_text(OLDER.replace("rank = 4", "rnak = 4"))
    with pytest.raises(ConfigError, match="rnak"):
        read(folders)
