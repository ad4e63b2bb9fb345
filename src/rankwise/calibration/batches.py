"""Batches: taken once, sharded over processes, weighted by what the loss sees."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import DataError

__all__ = ["BatchStore", "Loss", "batch_to", "model_loss", "model_weight"]

Loss = Callable[[nn.Module, Any], tuple[Tensor, float]]
"""Given the model and a batch on the model's device: the mean loss and the batch's weight (label tokens or rows)."""

_SHIFTED_LOSSES = ("ForCausalLM", "ForConditionalGeneration")


class BatchStore:
    """The first batches of an iterable, which may be read again.

    A list or a tuple is read in place. Anything else, also a loader that could be iterated twice (a shuffling loader
    would give other batches), is read once, and what was read stays on the CPU for another reading.

    Args:
        source: the batches; every process gets the same ones.
        limit: at most so many are used; None for all.
    """

    def __init__(self, source: Iterable[Any], limit: int | None) -> None:
        self._fixed = source[:limit] if isinstance(source, list | tuple) else None
        self._limit = limit
        self._source = source
        self._reader: Iterator[Any] | None = None
        self._kept: list[Any] = []

    @property
    def total(self) -> int | None:
        """How many batches there are, if that is known before reading them."""
        if self._fixed is not None:
            return len(self._fixed)
        length = getattr(self._source, "__len__", None)
        try:
            count = None if length is None else int(length())
        except TypeError:  # a DataLoader over an IterableDataset has __len__ and raises
            count = None
        return min(count, self._limit) if count is not None and self._limit is not None else count

    def __iter__(self) -> Iterator[Any]:
        if self._fixed is not None:
            yield from self._fixed
            return
        yield from tuple(self._kept)
        if self._reader is None:
            self._reader = islice(iter(self._source), self._limit)
        for batch in self._reader:
            self._kept.append(batch_to(batch, torch.device("cpu")))
            yield batch


def batch_to(batch: Any, device: torch.device) -> Any:
    """The same batch with every tensor on `device`; containers keep their kind where they can be rebuilt."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: batch_to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(batch_to(value, device) for value in batch)
    return batch


def model_loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """The model's own loss of a batch with labels, and how many label tokens (or rows) it is the mean of.

    Raises:
        DataError: a batch that is no mapping, or a model that returns no loss for it.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a calibration batch is a {type(batch).__name__}, not a mapping of the model's arguments. "
            "Give dictionaries with labels, or pass loss=callable(model, batch) -> (mean loss, weight)."
        )
    weight = model_weight(model, batch)
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            f"{type(model).__name__} returned no loss for a calibration batch with the keys {sorted(map(str, batch))}. "
            "Add labels to the batches, or pass loss=callable(model, batch) -> (mean loss, weight)."
        )
    return loss, weight


def model_weight(model: nn.Module, batch: Mapping[Any, Any]) -> float:
    """How many labels the model's loss averages over: label tokens, shifted for a causal model, or rows.

    A causal model predicts labels[:, 1:], so the first label of a row never counts. Floating labels (regression,
    several classes a row) and batches without labels count rows.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
        return 1.0 if first is None else float(len(first))
    if labels.is_floating_point():
        return float(len(labels)) if labels.ndim else 1.0
    seen = labels[..., 1:] if labels.ndim > 1 and _shifts_labels(model) else labels
    return float((seen != -100).sum())


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss compares position t with label t + 1."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__
    return getattr(model, "loss_type", None) in _SHIFTED_LOSSES or "CausalLM" in name or "LMHeadModel" in name
