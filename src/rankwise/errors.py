"""Every error that rankwise raises on purpose.

Each says what is wrong (the value seen, the layer or key), what is allowed and what to do, and is also the builtin it
refines. The number is the exit code of the command line.

    RankwiseError
    ├── ConfigError (ValueError)             2  settings: every fault of one place at once, in `faults`
    │   ├── TargetError                      2  a target pattern without a match, or a layer that cannot be adapted
    │   ├── BudgetError                      2  a parameter budget that cannot be met
    │   ├── PlanError                        2  a plan file that is damaged, inconsistent or made for another model
    │   └── RecipeError                      2  methods or options that must not be combined
    ├── DataError (ValueError)               2  data that is missing, empty, or without the columns or labels it needs
    ├── ModelError (ValueError)              2  a base model that is missing, damaged or holds non-finite weights
    ├── ArtifactError (ValueError)           2  an adapter or state file that is corrupt, truncated or not what it says
    ├── OutputError (FileExistsError)        2  output that must not be overwritten, or a place that cannot be written
    ├── CheckpointError (RuntimeError)       2  a checkpoint that cannot be continued from
    ├── CalibrationError (RuntimeError)      2  gradient statistics that could not be taken
    ├── ExportError (RuntimeError)           2  an adapter that cannot be written in the requested form
    │   └── VerificationError                3  an adapter that was written and does not equal the trained model
    ├── HealthError (RuntimeError)           3  a health check that failed after training began
    └── TrainingInterrupted (RuntimeError)   130  stopped by a signal, at the end of a step
"""

from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "HealthError",
    "ModelError",
    "OutputError",
    "PlanError",
    "RankwiseError",
    "RecipeError",
    "TargetError",
    "TrainingInterrupted",
    "VerificationError",
]


class RankwiseError(Exception):
    """The root of everything that rankwise raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(RankwiseError, ValueError):
    """Settings that cannot be used; `faults` lists every fault found, one line each.

    Args:
        faults: one message, or all messages of one place.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class TargetError(ConfigError):
    """A target pattern that matches nothing, or a layer that cannot be adapted."""


class BudgetError(ConfigError):
    """A parameter budget that cannot be met."""


class PlanError(ConfigError):
    """A rank plan that is damaged, inconsistent or made for another model."""


class RecipeError(ConfigError):
    """Methods or options that must not be combined."""


class DataError(RankwiseError, ValueError):
    """Data that is missing, empty, or without the columns or labels it needs."""

    exit_code: ClassVar[int] = 2


class ModelError(RankwiseError, ValueError):
    """A base model that is missing, damaged or holds non-finite weights."""

    exit_code: ClassVar[int] = 2


class ArtifactError(RankwiseError, ValueError):
    """An adapter or state file that is corrupt, truncated or not what it says."""

    exit_code: ClassVar[int] = 2


class OutputError(RankwiseError, FileExistsError):
    """Output that is there and must not be overwritten, or a place that cannot be written."""

    exit_code: ClassVar[int] = 2


class CheckpointError(RankwiseError, RuntimeError):
    """A checkpoint that cannot be continued from."""

    exit_code: ClassVar[int] = 2


class CalibrationError(RankwiseError, RuntimeError):
    """Gradient statistics that could not be taken."""

    exit_code: ClassVar[int] = 2


class ExportError(RankwiseError, RuntimeError):
    """An adapter that cannot be written in the requested form."""

    exit_code: ClassVar[int] = 2


class VerificationError(ExportError):
    """An adapter that was written and does not equal the trained model."""

    exit_code: ClassVar[int] = 3


class HealthError(RankwiseError, RuntimeError):
    """A health check that failed after training began."""

    exit_code: ClassVar[int] = 3


class TrainingInterrupted(RankwiseError, RuntimeError):  # noqa: N818  (a stop on request, not a fault)
    """Training stopped by a signal, at the end of a step."""

    exit_code: ClassVar[int] = 130
