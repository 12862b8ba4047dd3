"""Resets of 8-bit, 4-bit and float8 optimizer states: by decoded values, since code 0 is not value 0."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from relora import ConfigError, reset_optimizer_state_
from relora.method import adapters

BITSANDBYTES = ("AdamW8bit", "Adam8bit", "AdamW", "Lion8bit", "RMSprop8bit", "AdEMAMix8bit", "LAMB8bit")
TORCHAO = ("AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8")
# Two of 8192 entries, coded, one of them with blocks that do not divide evenly; one small, left in float32.
SHAPES = ((64, 128), (4999,), (16, 8))


def stepped(family, package, shapes=SHAPES, steps=3):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = family(params, lr=1e-2)
    for step in range(steps):
        advance(optimizer, params, step)
    return params, optimizer


def advance(optimizer, params, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        # Columns of very different sizes, as gradients have them.
        scale = torch.logspace(-3, 0, parameter.shape[-1])
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def family_of(package, name):
    if package == "bitsandbytes":
        module = pytest.importorskip("bitsandbytes.optim", exc_type=ImportError)
        import relora.integrations.bitsandbytes
    else:
        module = pytest.importorskip("torchao.optim", exc_type=ImportError)
        import relora.integrations.torchao  # noqa: F401
    return getattr(module, name)


CASES = [("bitsandbytes", name) for name in BITSANDBYTES] + [("torchao", name) for name in TORCHAO]


def independently_decoded(value, state, key):
    """Decode by the package's own function, not by the adapter's."""
    if hasattr(value, "dequantize") and type(value) is not torch.Tensor:
        return value.dequantize().float()
    if value.dtype != torch.uint8:
        return value.float()
    from bitsandbytes.functional import dequantize_blockwise

    number = key.removeprefix("state")
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    if absmax.ndim == 1:
        return dequantize_blockwise(value, absmax=absmax, code=code, blocksize=256)
    halves = zip(value, absmax, strict=True)  # AdEMAMix stacks two moments
    return torch.stack([dequantize_blockwise(v, absmax=a, code=code, blocksize=256) for v, a in halves])


def moments(optimizer, parameter):
    state = optimizer.state[parameter]
    keys = [k for k in state if k.startswith("state") or k.startswith("exp_avg")]
    return {key: independently_decoded(state[key], state, key).clone() for key in keys}


@pytest.mark.parametrize(("package", "name"), CASES)
@pytest.mark.parametrize("method", ["zero", "magnitude", "random"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_reset_zeroes_decoded_values_and_leaves_the_others(package, name, method, index):
    params, optimizer = stepped(family_of(package, name), package)
    target = params[index]
    before = {i: moments(optimizer, p) for i, p in enumerate(params)}
    raw = {i: raw_tensors(optimizer.state[p]) for i, p in enumerate(params) if i != index}
    first = next(iter(before[index].values()))
    has_no_zero = name == "AdamW4bit" and hasattr(optimizer.state[target]["exp_avg_sq"], "codes")
    if has_no_zero and method != "zero":
        with pytest.raises(ConfigError, match="none for 0"):
            reset_optimizer_state_(optimizer, [target], method=method, ratio=0.9)
        after = moments(optimizer, target)
        assert all(torch.equal(after[k], before[index][k]) for k in after)
        return
    report = reset_optimizer_state_(optimizer, [target], method=method, ratio=0.9)
    ratio = 1.0 if method == "zero" else 0.9
    after = moments(optimizer, target)
    masks = []
    for key, values in after.items():
        changed = values != before[index][key]
        assert (values[changed] == 0).all(), key
        assert int((values == 0).sum()) >= round(ratio * values.numel()), key
        survivors = values != 0
        assert torch.equal(values[survivors], before[index][key][survivors]), key
        masks.append(values == 0)
    if method == "magnitude" and len(first.shape) == target.ndim:
        kept = first[~masks[0]].abs()
        assert not kept.numel() or kept.min() >= first[masks[0]].abs().max()
    assert (
        report.entries_zeroed
        == report.entries_targeted
        == sum(round(ratio * values.numel()) for values in after.values())
    )
    for i, tensors in raw.items():
        now = raw_tensors(optimizer.state[params[i]])
        assert all(torch.equal(a, b) for a, b in zip(now, tensors, strict=True))
    advance(optimizer, params, 9)
    assert all(p.isfinite().all() for p in params)


def raw_tensors(state):
    """Copy every tensor of a state as it is stored."""
    stored = [v for v in state.values() if isinstance(v, torch.Tensor)]
    parts = [[v.codes.view(torch.uint8), v.scale] if hasattr(v, "codes") else [v] for v in stored]
    return [part.clone() for part in itertools.chain(*parts)]


@pytest.mark.parametrize(("package", "name"), [("bitsandbytes", "AdamW8bit"), ("torchao", "AdamW8bit")])
def test_a_full_reset_with_its_step_count_trains_on_as_a_new_optimizer(package, name):
    family = family_of(package, name)
    params, optimizer = stepped(family, package)
    reset_optimizer_state_(optimizer, params, method="zero", reset_step_count=True)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    new = family(fresh, lr=1e-2)
    for step in (5, 6):
        advance(optimizer, params, step)
        advance(new, fresh, step)
    for left, right in zip(params, fresh, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_writing_code_0_is_what_this_avoids():
    optim = pytest.importorskip("bitsandbytes.optim", exc_type=ImportError)
    params, optimizer = stepped(optim.AdamW8bit, "bitsandbytes")
    before = moments(optimizer, params[0])["state1"].abs().mean()
    optimizer.state[params[0]]["state1"].zero_()
    assert moments(optimizer, params[0])["state1"].abs().mean() > 2 * before


# --- finding the bridge ---------------------------------------------------------------------------------


def test_a_foreign_optimizers_bridge_is_imported_when_it_is_met(tmp_path, monkeypatch):
    package = tmp_path / "strange_optim.py"
    package.write_text(
        "import torch\n"
        "class Strange(torch.optim.SGD):\n"
        "    pass\n"
        "class Other(torch.optim.Optimizer):\n"
        "    def __init__(self, params): super().__init__(params, {})\n"
    )
    bridge = tmp_path / "strange_bridge.py"
    bridge.write_text(
        "from relora.method.adapters import OptimizerAdapter, register_optimizer_adapter\n"
        "import strange_optim\n"
        "register_optimizer_adapter(OptimizerAdapter(optimizer=strange_optim.Other, moments=('m',)))\n"
    )
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    Path(info, "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    Path(info, "entry_points.txt").write_text("[relora.optimizers]\nstrange_optim = strange_bridge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    import strange_optim

    known = adapters.adapter_for(strange_optim.Strange([nn.Parameter(torch.ones(2))], lr=1.0))
    assert known.optimizer is torch.optim.SGD and "strange_bridge" not in sys.modules
    found = adapters.adapter_for(strange_optim.Other([nn.Parameter(torch.ones(2))]))
    assert found.optimizer is strange_optim.Other
    adapters._ADAPTERS.pop(strange_optim.Other)
    for module in ("strange_optim", "strange_bridge"):
        sys.modules.pop(module)


def test_the_extras_are_declared_where_the_method_looks_for_them():
    import tomllib

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    declared = project["entry-points"]
    assert declared["relora.optimizers"].keys() <= project["optional-dependencies"].keys()
    modules = {m for group in declared.values() for m in group.values()}
    source = Path(adapters.__file__).parents[2]
    assert all(source.joinpath(*m.split(".")).with_suffix(".py").is_file() for m in modules)


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_missing_package_is_an_error_that_names_its_extra(package):
    # A None in sys.modules makes the import fail as a missing package does.
    code = f"import sys; sys.modules[{package!r}] = None; import relora.integrations.{package}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"pip install 'relora[{package}]'" in result.stderr


def test_relora_alone_imports_neither_package():
    code = (
        "import sys, torch, relora, relora.method.restart\n"
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
