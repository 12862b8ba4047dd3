"""CheckpointConfig: how often a run saves, and how many of its checkpoints it keeps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how long they stay; it may change when a run resumes."""

    every: int = 1000
    """Steps between two checkpoints; 0 writes one at the last step only. The last step always gets one."""
    keep_last: int = 3
    """Newest checkpoints that stay on disk; the last one that verifies is never removed."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this stay for good; 0 keeps none besides keep_last."""
    background: bool = True
    """Write a checkpoint while training goes on, from a copy in memory; false stops training for it."""
    timeout_s: float = 600.0
    """Seconds a save may take; a disk that hangs longer ends the run with an error."""

    def violations(self) -> list[str]:
        """List what is wrong with the values, in words; empty when they can be used."""
        return [
            *_whole_number("every", self.every, least=0),
            *_whole_number("keep_last", self.keep_last, least=1),
            *_whole_number("keep_every", self.keep_every, least=0),
            *_boolean("background", self.background),
            *_seconds("timeout_s", self.timeout_s),
        ]


def _whole_number(name: str, value: object, *, least: int) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{name} must be a whole number, not {value!r}"]
    return [] if value >= least else [f"{name} must be at least {least}, not {value}"]


def _boolean(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name} must be true or false, not {value!r}"]


def _seconds(name: str, value: object) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [f"{name} must be a number of seconds, not {value!r}"]
    return [] if value > 0 else [f"{name} must be above 0, not {value:g}"]
