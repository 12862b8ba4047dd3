"""A model folder from elsewhere, looked at before `transformers` opens it.

Names in its index stay inside the folder, files are files, JSON is bounded in size and depth, headers of
safetensors are bounded and fit their files, and nothing asks for code or weights of a third party. What is
refused is refused before a tensor is allocated.
"""

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.checkpoint.files import disk_errors, read_bounded
from relora.checkpoint.strict_json import MAX_DEPTH, listed, shown, too_deep
from relora.checkpoint.tensor_file import MAX_TENSORS, check_structure
from relora.errors import CheckpointError

JSON_LIMIT_BYTES = 64 * 2**20
MAX_FILES = 10_000
MAX_LAYERS = 10_000
MAX_SIZE = 2**40

_INDEX = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"[\w][\w.+=-]{0,200}\.(?:safetensors|bin)", re.ASCII)


def check_model_folder(folder: Path, *, with_pickles: bool = False) -> list[Path]:
    """Refuse a model folder that must not be opened.

    Args:
        folder: In Hugging Face form: config.json and weights.
        with_pickles: Whether weights may be in .bin files, where there are no safetensors.

    Returns:
        The files of its weights.

    Raises:
        CheckpointError: naming all that is wrong.
    """
    names = check_files(folder)
    if "config.json" not in names:
        raise CheckpointError(f"{folder} holds no config.json: it is not a model folder")
    check_config(folder)
    if _INDEX in names:
        return _checked(_indexed(folder, _INDEX, names))
    shards = [folder / name for name in names if name.endswith(".safetensors")]
    if shards:
        return _checked(shards)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights: no safetensors file, and no index of one")
    if not with_pickles:
        raise CheckpointError(
            f"{folder} has its weights in {listed(pickles, most=3)}, which is a pickle: save it as "
            "safetensors (model.save_pretrained does), or, if you trust its writer, set model.pickled_weights"
        )
    if _PICKLED_INDEX in names:
        return _indexed(folder, _PICKLED_INDEX, names)
    return [folder / name for name in pickles]


def check_files(folder: Path) -> list[str]:
    """Refuse a folder with links, devices, or JSON out of bounds at its top level; return its files' names.

    Raises:
        CheckpointError: naming all that is wrong, or what cannot be read.
    """
    with disk_errors("read", folder):
        kinds = {path.name: path.lstat() for path in sorted(folder.iterdir())}
    if len(kinds) > MAX_FILES:
        raise CheckpointError(f"{folder} holds {len(kinds)} files; at most {MAX_FILES} are allowed")
    problems = [
        f"{shown(name)} is a link: copy what it points to (cp -rL)"
        if stat.S_ISLNK(found.st_mode)
        else f"{shown(name)} is neither a file nor a folder"
        for name, found in kinds.items()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode)
    ]
    if problems:
        raise CheckpointError(f"{folder} is refused: {listed(problems)}")
    names = [name for name, found in kinds.items() if stat.S_ISREG(found.st_mode)]
    for name in names:
        if name.endswith(".json"):
            _bounded_json(folder / name)
    return names


def _bounded_json(path: Path) -> bytes:
    data = read_bounded(path, limit=JSON_LIMIT_BYTES)
    if too_deep(data):
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels")
    return data


def _object(path: Path) -> dict[str, Any]:
    data = _bounded_json(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should be an object, found a {type(value).__name__}")
    return value


def check_config(folder: Path) -> None:
    """Refuse a config.json with sizes that no model has, or that asks for code or weights from elsewhere.

    Raises:
        CheckpointError: naming all that is wrong.
    """
    path = folder / "config.json"
    problems = _config_problems(_object(path))
    if (folder / "adapter_config.json").exists():
        problems.append("adapter_config.json beside it asks for a base model of its own: merge the adapter")
    if problems:
        raise CheckpointError(f"{path} is refused: {listed(problems)}")


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in config.items():
        if isinstance(value, dict):
            problems += [f"{shown(key)}: {problem}" for problem in _config_problems(value)]
        elif isinstance(value, int) and value > (MAX_LAYERS if "layers" in key else MAX_SIZE):
            problems.append(f"{shown(key)} is {shown(value)}, which no model has")
        elif key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            # transformers would fetch a kernel of this name from the hub, and run it.
            problems.append(f"{shown(key)} asks for code from elsewhere: {shown(value)}")
    return problems


def _indexed(folder: Path, index: str, names: list[str]) -> list[Path]:
    """Return the files that an index names, all of them in the folder."""
    weight_map = _object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{folder / index} should have a weight_map of at most {MAX_TENSORS} names of tensors"
        )
    files = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    problems = [
        f"{shown(name)} is not a bare file name" if not _SHARD.fullmatch(name) else f"{name} is not there"
        for name in files
        if not _SHARD.fullmatch(name) or name not in names
    ]
    if problems or not files:
        raise CheckpointError(f"{folder / index} is refused: {listed(problems) or 'it names no file'}")
    ending = ".safetensors" if index == _INDEX else ".bin"
    strange = [name for name in files if not name.endswith(ending)]
    if strange:
        raise CheckpointError(f"{folder / index} is refused: {shown(strange[0])} should end in {ending}")
    return [folder / name for name in files]


def _checked(shards: list[Path]) -> list[Path]:
    for shard in shards:
        check_structure(shard, {})
    return shards
