"""Where gradient statistics come from: the batches and how they are read, the cache, and what to say of the result."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.as_found import random_states_restored
from rankwise.calibration.batches import Loss
from rankwise.calibration.cache import load_statistics, save_statistics, statistics_fingerprint
from rankwise.calibration.collect import OnBatch, collect
from rankwise.calibration.processes import decided_by_first
from rankwise.calibration.statistics import CollectorKind, GradientStatistics, MemoryMode, StatisticsRequest
from rankwise.errors import ConfigError
from rankwise.training.trial import EVALUATION_BATCHES

__all__ = ["Calibration", "calibration_notes", "gathered", "kept_calibration"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The batches behind the gradient statistics, and how they are read.

    Args:
        batches: global batches, the same in every process; a one-shot iterator is read once and kept.
        max_batches: at most so many are used, >= 1; None for all.
        memory: where full gradients are held: `auto`, `exact`, `sampled` or `low`.
        collector: how gradients are caught: `auto`, `outer` or `param`.
        train_mode: whether dropout is active.
        sample_share: the share of rows behind sampled importance, in (0, 1].
        autocast_dtype: the autocast that training will use, or None.
        token_weighted: weight batches by label tokens, as the loss over all of them would; otherwise a plain mean.
        cache: a file that keeps the statistics for the next time, or None. If it cannot be written, that is a warning.
        cache_gradients: whether it also keeps whole gradients, which are as large as the target weights in float32.
        data_identity: what tells these batches from others, in the cache's fingerprint.
        on_unused: `min` allows targets that some batch does not reach (experts, branches); the default is an error.
        on_zero: `uniform` goes on with gradients that are all zero, the method deciding by equal importances; the
            default is an error.
        on_batch: called with the number of batches done and their total, if it is known.
    """

    batches: Iterable[Any]
    max_batches: int | None = 64
    memory: MemoryMode = "auto"
    collector: CollectorKind = "auto"
    train_mode: bool = False
    sample_share: float = 0.25
    autocast_dtype: torch.dtype | None = None
    token_weighted: bool = True
    cache: str | PathLike[str] | None = None
    cache_gradients: bool = True
    data_identity: str = ""
    on_unused: Literal["error", "min"] = "error"
    on_zero: Literal["error", "uniform"] = "error"
    on_batch: OnBatch | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.max_batches is not None and self.max_batches < 1:
            faults.append(f"calibration.max_batches is {self.max_batches}: it must be at least 1")
        if not 0 < self.sample_share <= 1:
            faults.append(f"calibration.sample_share is {self.sample_share}: it must be above 0 and at most 1")
        for key, known in (("on_unused", ("error", "min")), ("on_zero", ("error", "uniform"))):
            if getattr(self, key) not in known:
                faults.append(f"calibration.{key} is {getattr(self, key)!r}: allowed are {' and '.join(known)}")
        if faults:
            raise ConfigError(faults)


def kept_calibration(given: Calibration | Iterable[Any] | None) -> Calibration | None:
    """Batches as a Calibration whose batches can be read again: one-shot iterators are kept, loaders are read once."""
    if given is None:
        return None
    found = given if isinstance(given, Calibration) else Calibration(batches=given)
    if isinstance(found.batches, list | tuple):
        return found
    limit = None if found.max_batches is None else found.max_batches + EVALUATION_BATCHES
    with random_states_restored():
        return replace(found, batches=list(islice(found.batches, limit)))


def gathered(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    calibration: Calibration,
    request: StatisticsRequest,
    *,
    seed: int,
    loss: Loss | None,
) -> GradientStatistics:
    """Statistics from the cache, if it answers exactly this question, else from a pass over the batches."""
    c = calibration
    shared: dict[str, Any] = {
        "memory": c.memory,
        "max_batches": c.max_batches,
        "token_weighted": c.token_weighted,
        "train_mode": c.train_mode,
        "sample_share": c.sample_share,
        "seed": seed,
        "autocast_dtype": c.autocast_dtype,
        "loss": loss,
        "on_unused": c.on_unused,
        "on_zero": c.on_zero,
    }
    batches = list(c.batches)
    if c.cache is None or (request.gradient and not c.cache_gradients):
        return collect(model, layers, batches, request, collector=c.collector, on_batch=c.on_batch, **shared)
    fingerprint = statistics_fingerprint(model, layers, batches, request, data_identity=c.data_identity, **shared)
    # Process 0's file decides for all: on several machines the others may not see it, and half of them would wait.
    path = c.cache
    found = decided_by_first(lambda: load_statistics(path, fingerprint))
    if found is None:
        found = collect(model, layers, batches, request, collector=c.collector, on_batch=c.on_batch, **shared)
        try:
            save_statistics(c.cache, found, fingerprint)
        except (OSError, SafetensorError) as error:
            logger.warning("the calibration cache %s was not written (%s); the run goes on without it", c.cache, error)
    return found


def calibration_notes(model: nn.Module, source: Calibration, statistics: GradientStatistics) -> tuple[str, ...]:
    """What the user should know of the statistics behind the start."""
    told: tuple[str, ...] = ()
    if statistics.skipped:
        told += (
            f"calibration skipped {statistics.skipped} of {statistics.batches + statistics.skipped} batches whose loss "
            "or gradient was not finite: look at the data, or calibrate in a wider dtype",
        )
    dropping = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0 and "lora_" not in n]
    if dropping and not source.train_mode:
        told += (
            f"calibration ran without the base model's dropout ({len(dropping)} modules, first {dropping[0]!r}), with "
            "which training runs: set train_mode=True to calibrate as training computes",
        )
    return told
