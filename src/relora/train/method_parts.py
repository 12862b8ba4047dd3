"""What methods are built from: the parts of the method library, and of the data, that a TrainingMethod needs.

The laboratory stands on the trainer alone (DESIGN.md section 3) and reaches the library through here; so
this is the surface that a method of one's own may rely on.
"""

from relora.data.prepared import PreparedData
from relora.method.factor_init import FACTOR_INITS, Draw
from relora.method.gradient_observer import GradientObserver
from relora.method.inject import lora_parameters
from relora.method.linear import LoRALinear, lora_layers
from relora.method.merge import LayerMerge, MergeReport, merge_, reinit_
from relora.method.reset import ResetReport, reset_optimizer_state_
from relora.method.restart_report import RestartReport
from relora.method.seeds import derived_generator, derived_seed
from relora.method.targets import choose_targets

__all__ = [
    "FACTOR_INITS",
    "Draw",
    "GradientObserver",
    "LayerMerge",
    "LoRALinear",
    "MergeReport",
    "PreparedData",
    "ResetReport",
    "RestartReport",
    "choose_targets",
    "derived_generator",
    "derived_seed",
    "lora_layers",
    "lora_parameters",
    "merge_",
    "reinit_",
    "reset_optimizer_state_",
]
