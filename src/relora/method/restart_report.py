"""What a restart did, in total and by layer."""

from dataclasses import asdict, dataclass
from typing import Any

from relora.method.base_error import BaseErrorReport
from relora.method.gradient_init import GradientInitReport
from relora.method.merge import LayerMerge, MergeReport
from relora.method.reset import ParameterReset, ResetReport


@dataclass(frozen=True, kw_only=True)
class RestartReport:
    """What one restart did, in total and by layer; `as_dict` gives it as JSON-able values."""

    restart_index: int
    """Counted from 1."""
    step: int
    merge: MergeReport
    resets: tuple[ResetReport, ...]
    """One for each optimizer that holds factors, and one for learned scalings if there are any."""
    gradient_init: GradientInitReport | None = None
    """Where the new lora_A come from with init="gradient"; else None."""
    base_error: BaseErrorReport | None = None
    """What lora_B took over of the base's error with carry_base_error; else None."""

    @property
    def max_function_change(self) -> float:
        """Largest absolute change of any layer's function weight (base + delta) by the merge."""
        return self.merge.max_function_change

    @property
    def relative_merge_error(self) -> float:
        """Largest part of a layer's delta that its base did not take, against a float64 reference."""
        return self.merge.relative_merge_error

    @property
    def num_layers(self) -> int:
        """Layers merged."""
        return len(self.merge.layers)

    @property
    def num_states(self) -> int:
        """Optimizer state tensors touched."""
        return sum(reset.num_states for reset in self.resets)

    @property
    def entries_targeted(self) -> int:
        """Optimizer state entries that were to be zeroed."""
        return sum(reset.entries_targeted for reset in self.resets)

    @property
    def entries_zeroed(self) -> int:
        """Targeted entries that are zero now."""
        return sum(reset.entries_zeroed for reset in self.resets)

    @property
    def entries_carried(self) -> int:
        """Optimizer state entries rewritten in the coordinates of the new factors."""
        return sum(reset.entries_carried for reset in self.resets)

    @property
    def without_state(self) -> tuple[str, ...]:
        """Factors the optimizer had no state of yet."""
        return tuple(name for reset in self.resets for name in reset.without_state)

    @property
    def layers(self) -> tuple[LayerMerge, ...]:
        """What the merge did to each layer."""
        return self.merge.layers

    @property
    def parameters(self) -> tuple[ParameterReset, ...]:
        """What the reset did to the state of each factor."""
        return tuple(parameter for reset in self.resets for parameter in reset.parameters)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values, totals first."""
        return {
            "restart_index": self.restart_index,
            "step": self.step,
            "max_function_change": self.max_function_change,
            "relative_merge_error": self.relative_merge_error,
            "entries_targeted": self.entries_targeted,
            "entries_zeroed": self.entries_zeroed,
            "entries_carried": self.entries_carried,
            "num_layers": self.num_layers,
            "num_states": self.num_states,
            "step_counts_reset": sum(reset.step_counts_reset for reset in self.resets),
            "unmoved_layers": list(self.merge.unmoved_layers),
            "without_state": list(self.without_state),
            "gradient_init": self._gradient_init(),
            "base_error": self._base_error(),
            "layers": [asdict(layer) for layer in self.layers],
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }

    def __str__(self) -> str:
        entries = sum(parameter.entries for parameter in self.parameters)
        zeroed = (
            f"{self.entries_zeroed:,} of {entries:,} entries in {self.num_states} optimizer states zeroed"
        )
        carried = f", {self.entries_carried:,} carried" if self.entries_carried else ""
        drawn = ""
        if self.gradient_init is not None:
            drawn = f", {self.gradient_init.gradient_rows} of {self.gradient_init.rows} rows from gradients"
        if self.base_error is not None:
            drawn += f", {self.base_error.cancelled_fraction:.0%} of the base's error cancelled"
        return (
            f"restart {self.restart_index} after step {self.step}: {self.num_layers} layers merged "
            f"(error {self.relative_merge_error:.1e}), {zeroed}{carried}{drawn}"
        )

    def _base_error(self) -> dict[str, Any] | None:
        found = self.base_error
        return None if found is None else {"cancelled_fraction": found.cancelled_fraction, **asdict(found)}

    def _gradient_init(self) -> dict[str, Any] | None:
        return None if self.gradient_init is None else asdict(self.gradient_init)
