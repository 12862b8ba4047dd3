"""ReLoRA: high-rank training of language models through low-rank updates (arXiv 2307.05695).

Names are resolved on first use (PEP 562), so that `import relora` and `relora --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relora.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        NonFiniteError,
        OptimizerResetError,
        ReLoRAError,
    )
    from relora.method.config import ReLoRAConfig
    from relora.method.inject import InjectReport, fold, inject, lora_parameters
    from relora.method.linear import LoRALinear
    from relora.method.merge import MergeReport, merge_and_reinit_
    from relora.method.reset import ResetReport, reset_optimizer_state_
    from relora.method.restart import ReLoRA
    from relora.method.restart_report import RestartReport
    from relora.method.schedule import JaggedCosineLR, jagged_cosine

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "relora.errors",
    "ConfigError": "relora.errors",
    "DataError": "relora.errors",
    "NonFiniteError": "relora.errors",
    "OptimizerResetError": "relora.errors",
    "ReLoRAError": "relora.errors",
    "ReLoRAConfig": "relora.method.config",
    "InjectReport": "relora.method.inject",
    "fold": "relora.method.inject",
    "inject": "relora.method.inject",
    "lora_parameters": "relora.method.inject",
    "LoRALinear": "relora.method.linear",
    "MergeReport": "relora.method.merge",
    "merge_and_reinit_": "relora.method.merge",
    "ResetReport": "relora.method.reset",
    "reset_optimizer_state_": "relora.method.reset",
    "ReLoRA": "relora.method.restart",
    "RestartReport": "relora.method.restart_report",
    "JaggedCosineLR": "relora.method.schedule",
    "jagged_cosine": "relora.method.schedule",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InjectReport",
    "JaggedCosineLR",
    "LoRALinear",
    "MergeReport",
    "NonFiniteError",
    "OptimizerResetError",
    "ReLoRA",
    "ReLoRAConfig",
    "ReLoRAError",
    "ResetReport",
    "RestartReport",
    "__version__",
    "fold",
    "inject",
    "jagged_cosine",
    "lora_parameters",
    "merge_and_reinit_",
    "reset_optimizer_state_",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'relora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
