"""Statistics as a file: read again only for exactly the question that they answered.

A safetensors file: the tensors of each layer under `gradient.<layer>`, `projection.<layer>`, `left_projection.<layer>`,
`scores.<layer>`, `score_errors.<layer>`; everything else as JSON in the header, with the fingerprint and a checksum.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.adapters.fingerprint import architecture_fingerprint, weights_fingerprint
from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.batches import Loss
from rankwise.calibration.processes import process_index
from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, MemoryMode, StatisticsRequest
from rankwise.errors import ArtifactError, CalibrationError
from rankwise.ranks.shapes import LayerShape

__all__ = ["load_statistics", "save_statistics", "statistics_fingerprint"]

FORMAT, VERSION = "rankwise-statistics", "1"

_TENSORS = ("gradient", "projection", "left_projection", "scores", "score_errors")
_NUMBERS = ("batches", "skipped", "tokens", "loss", "memory", "collector", "row_share", "seconds")


def statistics_fingerprint(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Sequence[Any],
    request: StatisticsRequest,
    *,
    memory: MemoryMode = "auto",
    max_batches: int | None = None,
    token_weighted: bool = True,
    train_mode: bool = False,
    sample_share: float = 0.25,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    on_unused: Literal["error", "min"] = "error",
    on_zero: Literal["error", "uniform"] = "error",
    data_identity: str = "",
) -> str:
    """What the statistics of a `collect` call with these arguments depend on, as a line of named short hashes.

    Two functions count as the same loss if they have the same module and name; say what else tells them apart in
    `data_identity`.

    Args:
        model: the base model; its configuration and every bit of its weights count.
        layers: the targets, in order.
        batches: the batches themselves, read again by `collect`; the first `max_batches` count.
        request: what is kept; its functions are told apart by `identity`.
        memory: as in `collect`, and so are the others.
        max_batches: at most so many batches.
        token_weighted: whether batches are weighed by tokens.
        train_mode: whether dropout is active.
        sample_share: the share of sampled rows.
        seed: the run's seed.
        autocast_dtype: the training's autocast.
        loss: the loss, None for the model's own.
        on_unused: what was allowed, so that a run that allows less does not pass by reading what a freer one kept.
        on_zero: likewise.
        data_identity: anything else that tells these batches from others.

    Returns:
        `"model=...;data=...;targets=...;request=...;loss=...;settings=..."`, equal on every machine.
    """
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    kept = [request.gradient, request.projection is not None, request.left_projection is not None]
    asked = [request.score is not None, request.score_is_row_mean, request.stop is not None, request.identity]
    asked += [len(request.follow_ups)] if request.follow_ups else []
    settings = [memory, token_weighted, train_mode, sample_share, seed, str(autocast_dtype), dtypes, on_unused, on_zero]
    parts = {
        "model": [architecture_fingerprint(model), weights_fingerprint(model)],
        "data": [data_identity, max_batches, _hash_of(batches[:max_batches])],
        "targets": [[s.name, s.out_features, s.in_features] for s in (layer.shape for layer in layers)],
        "request": [*kept, *asked],
        "loss": None if loss is None else f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}",
        "settings": settings,
    }
    return ";".join(f"{name}={_short(value)}" for name, value in parts.items())


def save_statistics(path: str | os.PathLike[str], statistics: GradientStatistics, fingerprint: str) -> None:
    """Writes the statistics and their fingerprint, all or nothing; with several processes, process 0 writes.

    Args:
        path: a file, conventionally `*.safetensors`; its folder is made.
        statistics: what `collect` returned.
        fingerprint: from `statistics_fingerprint` with the arguments of that call.
    """
    if process_index() > 0:
        return
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, layer in statistics.layers.items():
        for kind in _TENSORS:
            tensor = getattr(layer, kind)
            if tensor is not None:
                tensors[f"{kind}.{name}"] = tensor.contiguous()
    described = {key: getattr(statistics, key) for key in _NUMBERS}
    described["layers"] = [
        [name, layer.shape.out_features, layer.shape.in_features, layer.batches]
        for name, layer in statistics.layers.items()
    ]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "checksum": _checksum(tensors),
        "statistics": json.dumps(described),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, staged, metadata=header)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def load_statistics(path: str | os.PathLike[str], fingerprint: str) -> GradientStatistics | None:
    """The statistics of a cache file, or None if there is no file.

    Args:
        path: the file.
        fingerprint: from `statistics_fingerprint` with the arguments that `collect` would get.

    Raises:
        CalibrationError: the file answers another question; the error names what differs.
        ArtifactError: the file is damaged or is no statistics file.
    """
    source = Path(path)
    if not source.exists():
        return None
    header, tensors = _read(source)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ArtifactError(
            f"{source} is no calibration cache of this version (format {header.get('format')!r}, version "
            f"{header.get('version')!r}; expected {FORMAT!r}, {VERSION!r}). Delete it or name another cache file."
        )
    if header.get("fingerprint") != fingerprint:
        differing = _differing(header.get("fingerprint", ""), fingerprint)
        raise CalibrationError(
            f"{source} holds statistics taken with another {' and another '.join(differing)}. "
            "Delete it or name another cache file; statistics are never reused for something else."
        )
    if header.get("checksum") != _checksum(tensors):
        raise ArtifactError(f"{source} is damaged: its checksum does not match. Delete it; calibration will run again.")
    return _statistics(source, header, tensors)


def _read(source: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    try:
        with safe_open(source, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{source} is damaged or no safetensors file ({error}). Delete it; calibration will run again."
        ) from error


def _statistics(source: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> GradientStatistics:
    try:
        described = json.loads(header["statistics"])
        layers = {
            name: LayerStatistics(
                shape=LayerShape(name, out_features, in_features),
                batches=batches,
                **{kind: tensors.get(f"{kind}.{name}") for kind in _TENSORS},
            )
            for name, out_features, in_features, batches in described.pop("layers")
        }
        return GradientStatistics(layers=layers, from_cache=True, **described)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{source} has a damaged header ({error!r}). Delete it; calibration will run again."
        ) from error


def _differing(found: str, wanted: str) -> list[str]:
    old = dict(part.partition("=")[::2] for part in found.split(";"))
    new = dict(part.partition("=")[::2] for part in wanted.split(";"))
    return [name for name in new if old.get(name) != new[name]] or ["fingerprint"]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return _hash_of({name: tensors[name] for name in sorted(tensors)})


def _hash_of(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Feeds tensors by dtype, shape and bits, containers by structure, all else by its text."""
    if hasattr(value, "__array_interface__"):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(f"\x1e{key}\x1f".encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"\x1d{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"\x1c{type(value).__name__}:{value!r}".encode())


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
