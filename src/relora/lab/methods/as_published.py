"""relora-as-published: ReLoRA with the defects of the authors' code, each a switch, to measure what it costs.

    dead_first_cycle   lora_A is zeroed where lora_B is zero: no factor gets a gradient before the first merge
    random_reset       the "reset" prunes a random 99.9 % of the moments instead of what relora.reset says
    keep_step_count    Adam's step count survives the reset, and with it a wrong bias correction
    native_merge       base, delta and their sum are rounded to bfloat16, as in a model held in it
    late_merge         merge and reset come one step after the learning rate's drop
    separate_masks     each moment is pruned by a mask of its own

None of this is in the method library. With `defects = []` the run is `relora` with step counts reset, bit for
bit. Sources: docs/method.md, "What earlier code got wrong".
"""

from typing import Any

import torch
from torch import nn

from relora.errors import ConfigError
from relora.lab.methods.counted import CountedRestarts
from relora.lab.methods.options import AsPublishedOptions, Defect
from relora.train.method_parts import (
    LayerMerge,
    LoRALinear,
    MergeReport,
    ResetReport,
    RestartReport,
    derived_seed,
    lora_layers,
    merge_,
    reinit_,
    reset_optimizer_state_,
)
from relora.train.training_method import refuse_dead_cycle

PUBLISHED_RATIO = 0.999


class AsPublished(CountedRestarts):
    """Restarts with the defects that the recipe names."""

    def switch_(self, model: nn.Module) -> str:
        """Put the factors in, and spoil them as told."""
        report = super().switch_(model)
        with torch.no_grad():
            for layer in lora_layers(model):
                if self._has("native_merge"):
                    if layer.weight.dtype != torch.float32:
                        raise ConfigError(f'{layer.name}: the defect "native_merge" is for float32 weights')
                    layer.weight.copy_(layer.weight.bfloat16())
                if self._has("dead_first_cycle"):
                    layer.lora_A.zero_()
        named = ", ".join(self._defects) or "none"
        return f"{report}\ndefects of the published code: {named}"

    def after_step(self, step: int) -> RestartReport | None:
        """Restart at the end of a cycle, or a step later."""
        ended = step - 1 if self._has("late_merge") else step
        if ended not in self.restart_steps:
            return None
        seed = self.recipe.run.seed
        merge = native_merge_(self.layers) if self._has("native_merge") else merge_(self.layers)
        self.counters["merges"] += 1
        index = self.counters["merges"]
        reinit_(self.layers, seed=seed, restart_index=index)
        resets = (self._reset(derived_seed(seed, index)),)
        self.counters["optimizer_resets"] += 1
        report = RestartReport(restart_index=index, step=step, merge=merge, resets=resets)
        is_dead_by_design = index == 1 and self._has("dead_first_cycle")
        return report if is_dead_by_design else refuse_dead_cycle(report)

    def facts(self) -> dict[str, Any]:
        """Return the counters and the defects."""
        return {**super().facts(), "defects": list(self._defects)}

    def _reset(self, seed: int) -> ResetReport:
        relora = self.recipe.relora
        assert self.optimizer is not None
        is_random = self._has("random_reset")
        return reset_optimizer_state_(
            self.optimizer,
            self.factors,
            method="random" if is_random else relora.reset,
            ratio=PUBLISHED_RATIO if is_random else relora.reset_ratio,
            mask="separate" if self._has("separate_masks") else "coupled",
            seed=seed,
            reset_step_count=not self._has("keep_step_count"),
        )

    @property
    def _defects(self) -> tuple[Defect, ...]:
        options = self.recipe.options
        assert isinstance(options, AsPublishedOptions)
        return options.defects

    def _has(self, defect: Defect) -> bool:
        return defect in self._defects


@torch.no_grad()
def native_merge_(layers: list[LoRALinear]) -> MergeReport:
    """Merge as a model held in bfloat16 does: W + s B A with every product and sum rounded to bfloat16.

    The weights stay float32 tensors of bfloat16 values, so that nothing but the merge differs.
    """
    merges = []
    for layer in layers:
        rows = slice(None)
        before, delta = layer.weight_rows(rows).clone(), layer.delta()
        with torch.autocast(layer.weight.device.type, enabled=False):
            product = layer.lora_B.bfloat16() @ layer.lora_A.bfloat16()
        rounded = before.bfloat16() + product * layer.fixed_scaling
        layer.weight_rows(rows).copy_(rounded)
        wanted = before.to(delta.dtype) + delta
        lost = layer.weight_rows(rows).to(delta.dtype) - wanted
        norm = float(delta.norm())
        merges.append(
            LayerMerge(
                name=layer.name,
                delta_norm=norm,
                max_abs_delta=float(delta.abs().max()),
                max_function_change=float(lost.abs().max()),
                relative_merge_error=float(lost.norm()) / norm if norm else 0.0,
            )
        )
    return MergeReport(layers=tuple(merges))
