"""LogConfig: how often a run reports, and where to besides its own metrics.jsonl."""

from dataclasses import dataclass

SINK_NAMES = ("jsonl", "tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged and where; it may change when a run resumes."""

    every: int = 10
    """Steps between two lines of metrics.jsonl, and between two lines on a screen that is no terminal."""
    sinks: tuple[str, ...] = ("jsonl",)
    """Where metrics go: "jsonl" (metrics.jsonl, written in any case), "tensorboard" (needs
    relora[tensorboard]), "wandb" (needs relora[wandb]; project, entity and mode by its WANDB_* variables)."""

    def violations(self) -> list[str]:
        """List what is wrong with the values, in words; empty when they can be used."""
        return [*self._every_violations(), *self._sink_violations()]

    def _every_violations(self) -> list[str]:
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            return [f"every must be a whole number of steps, not {self.every!r}"]
        return [] if self.every >= 1 else [f"every must be at least 1, not {self.every}"]

    def _sink_violations(self) -> list[str]:
        if not isinstance(self.sinks, tuple) or not all(isinstance(name, str) for name in self.sinks):
            return [f"sinks must be a tuple of names, not {self.sinks!r}"]
        unknown = [name for name in self.sinks if name not in SINK_NAMES]
        choices = ", ".join(map(repr, SINK_NAMES))
        problems = [f"sinks must hold names among {choices}, not {name!r}" for name in unknown]
        if len(set(self.sinks)) < len(self.sinks):
            problems.append(f"sinks must name each sink once, not {self.sinks!r}")
        return problems
