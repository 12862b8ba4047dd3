"""The errors this package raises on purpose, each with cause, place and remedy in its message.

Every one derives from `ReLoRAError`. The command line maps them to exit codes: configuration 2,
data 3, checkpoint 4, non-finite 5.
"""

from collections.abc import Sequence


class ReLoRAError(Exception):
    """Base of the errors of this package."""


class ConfigError(ReLoRAError, ValueError):
    """A setting, or a use of the library, that cannot work as given."""

    @classmethod
    def from_violations(cls, subject: str, violations: Sequence[str]) -> "ConfigError":
        """Build one error that lists every violation found, so that they can be mended together."""
        if len(violations) == 1:
            return cls(f"{subject}: {violations[0]}")
        return cls("\n  - ".join([f"{subject} has {len(violations)} problems:", *violations]))


class DataError(ReLoRAError, ValueError):
    """Text or token data that cannot be read, or does not fit the model."""


class CheckpointError(ReLoRAError, RuntimeError):
    """A checkpoint that is missing, damaged, foreign, or cannot be written."""


class NonFiniteError(ReLoRAError, ArithmeticError):
    """A NaN or an infinity where training cannot go on; nothing was changed by the refused operation."""


class OptimizerResetError(ReLoRAError, RuntimeError):
    """An optimizer reset that did not do what it reported, or touched nothing although states exist."""
