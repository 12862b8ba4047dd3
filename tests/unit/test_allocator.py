"""The allocator keeps what is freed, seen by the pages that the system must map again."""

import platform
import subprocess
import sys

import pytest

from relora.train.allocator import keep_freed_memory

MEASURE = """
import os, resource, sys
import torch
from torch import nn
from relora.train.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

took = keep_freed_memory(os.environ) if sys.argv[1] == "keep" else None
model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(4)])
input = torch.ones(2**16, 64)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(12):
    if step == 6:
        begun = faults()
    model(input).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(took, faults() - begun)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


def measured(word: str) -> tuple[str, int]:
    """Return what the process was told, and how many pages the system had to map in six steps."""
    command = [sys.executable, "-c", MEASURE, word]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took, faults = done.stdout.split()
    return took, int(faults)


@glibc
def test_a_steps_memory_is_not_mapped_again() -> None:
    took, kept = measured("keep")
    assert took == "True"
    _, given_back = measured("do not")
    assert 4 * kept < given_back


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000")],
)
def test_settings_of_the_environment_stand(name: str, value: str) -> None:
    assert not keep_freed_memory({name: value})
