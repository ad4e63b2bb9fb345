"""The validation batches that a schedule scores on: checked for labels, cut to size, equal in every process."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.methods.schedule import Scene

__all__ = ["batches_hash", "labelled", "row_counts", "row_groups", "rows_between"]


def labelled(scene: Scene, method_id: str) -> list[Any]:
    """The validation batches that have a label that counts.

    Args:
        scene: where they and a loss of the user's own were given.
        method_id: who scores on them.

    Raises:
        ConfigError: there are none.
    """
    batches = list(scene.validation or ())
    if not batches:
        raise ConfigError(f"{method_id} scores on validation batches: pass validation=batches, with labels")
    labels = [batch.get("labels") if isinstance(batch, Mapping) else None for batch in batches]
    if scene.loss is None and any(not isinstance(one, Tensor) for one in labels):
        raise ConfigError(
            f"{method_id} scores on labels, and a validation batch has none: add labels, or pass "
            "loss=callable(model, batch) -> (mean loss, weight)"
        )
    kept = [batch for batch, one in zip(batches, labels, strict=True) if one is None or bool((one != -100).any())]
    if not kept:
        raise ConfigError(
            f"{method_id} scores on labels, and those of all {len(batches)} validation batches are masked (-100): give "
            "sequences with labels that count"
        )
    return kept


def row_groups(batches: Sequence[Any], rows: int) -> list[list[Any]]:
    """The batches cut into groups of `rows` sequences, the last one left out if it is smaller and not the only one.

    Batches whose rows are not known are one group.
    """
    if any(not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor) for batch in batches):
        return [list(batches)]
    total = sum(len(batch["labels"]) for batch in batches)
    starts = range(0, max(1, total - rows + 1), rows)
    return [rows_between(batches, start, min(total, start + rows)) for start in starts]


def row_counts(groups: Sequence[Sequence[Any]]) -> list[int]:
    """The sequences of every group; none where one's are not known."""
    batches = [batch for group in groups for batch in group]
    if any(not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor) for batch in batches):
        return []
    return [sum(len(batch["labels"]) for batch in group) for group in groups]


def rows_between(batches: Sequence[Any], start: int, end: int) -> list[Any]:
    """The rows from number `start` up to `end`, counted over all batches; every batch a mapping with labels."""
    found, before = [], 0
    for batch in batches:
        size = len(batch["labels"])
        first, last = max(0, start - before), min(size, end - before)
        if first < last:
            found.append({key: _cut(value, size, first, last) for key, value in batch.items()})
        before += size
    return found


def _cut(value: Any, size: int, start: int, end: int) -> Any:
    """Rows of a tensor that has one a sequence; anything else whole."""
    return value[start:end] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def batches_hash(groups: Sequence[Sequence[Any]]) -> str:
    """16 hexadecimal digits over the tensors of mappings, to compare between processes."""
    digest = hashlib.sha256()
    for batch in (batch for group in groups for batch in group):
        for key, value in sorted(batch.items()) if isinstance(batch, Mapping) else ():
            digest.update(str(key).encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
