"""Scripts of experiments/, which stand beside one another as when they are run."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def experiment_script(name: str) -> ModuleType:
    """Import a script of experiments/ by its name."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.append(str(EXPERIMENTS))
    return importlib.import_module(name)
