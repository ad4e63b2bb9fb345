"""The proof that a written adapter is the trained one: files, updates, consumers' rules, and logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import view_linear
from rankwise.adapters.offset import LiveOffset
from rankwise.errors import ArtifactError, VerificationError
from rankwise.export.consumers import ConsumerVerdict, audit_files, consumers_of
from rankwise.export.files import (
    AdapterFiles,
    Pair,
    peft_rank,
    peft_scaling,
    read_adapter,
    split_tensors,
    undeclared_tensors,
)
from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.export.live import base_as_found, computed_logits, file_as_second_adapter, loaded_on_fresh
from rankwise.linalg.factors import product_norm, relative_difference
from rankwise.linalg.precision import full_float32

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "Batch",
    "Verification",
    "cast_notes",
    "check_files",
    "compare_logits",
    "logit_difference",
    "update_bound",
    "update_errors",
    "verify",
]

Batch = Mapping[str, object]

_EXACT_BOUND = 1e-5
_HALF_BOUND = 1e-2
_HALF_LOGIT_BOUND = 5e-2
_SHOWN = 5
_HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and by how much it differs.

    Args:
        update_error: the largest relative difference of a layer's update, file against trained model.
        update_bound: what was allowed: 1e-5 for float32 files, 1e-2 for 16-bit ones.
        worst_layer: the layer behind `update_error`.
        logit_error: the largest difference of logits relative to the largest logit, None if no batch was given.
        logit_bound: what was allowed: 1e-5 in float32, 5e-2 where the base or the file is 16-bit or packed; None if
            ranks were discarded on purpose.
        verdicts: what each consumer would compute from the file.
        layers: how many layers were compared.
    """

    update_error: float
    update_bound: float
    worst_layer: str
    logit_error: float | None
    logit_bound: float | None
    verdicts: tuple[ConsumerVerdict, ...]
    layers: int


def verify(
    folder: str | Path,
    folded: FoldedAdapter,
    model: "PeftModel | None" = None,
    batch: Batch | None = None,
    fresh: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    consumers: Sequence[str] = (),
    reference: Tensor | None = None,
    offset: LiveOffset | None = None,
    lossy: bool = False,
) -> Verification:
    """Reads a written adapter back and compares it with the trained one.

    Args:
        folder: the written adapter.
        folded: the trained adapter.
        model: the trained model; it gives the logits to compare with, and its base carries the file as
            a second adapter.
            It is left as found: adapters, active adapter, requires_grad, training mode, random state.
        batch: keyword arguments of the model's forward; without it logits are not compared.
        fresh: an unadapted base model to load the file on instead; it keeps the adapter.
        adapter_name: the trained adapter of `model`.
        consumers: values of `export --for` that must compute the same.
        reference: the trained logits, where `model` does not compute them itself.
        offset: the live offset of `model`: the file is held against the base weights as they were found.
        lossy: whether ranks were discarded from `folded` on purpose: logits are compared, and not bound.

    Returns:
        The measured figures, all within their bounds.

    Raises:
        VerificationError: a file that is not the trained adapter, with every measured excess.
    """
    files = _read_back(folder, folded)
    update_error, layer = _worst_update(files, folded)
    bound = update_bound(files)
    if not update_error <= bound:
        raise VerificationError(
            f"{folder}: {layer}: the update in the file differs from the trained one by {update_error:.3g} of its "
            f"size; allowed: {bound:g}. Export in float32; if that fails too, please report it."
        )
    verdicts = tuple(audit_files(files.config, files.tensors))
    _check_consumers(verdicts, consumers)
    logit_error, logit_bound = _compare_logits(
        Path(folder), files, model, batch, fresh, adapter_name, reference, offset, lossy=lossy
    )
    return Verification(
        update_error=update_error,
        update_bound=bound,
        worst_layer=layer,
        logit_error=logit_error,
        logit_bound=logit_bound,
        verdicts=verdicts,
        layers=len(folded.layers),
    )


def cast_notes(folded: FoldedAdapter, cast_errors: Mapping[str, float]) -> tuple[str, ...]:
    """What the rounding of a moved base changed in training, against what was trained: no adapter can hold it.

    Args:
        folded: the trained adapter.
        cast_errors: by layer, ||W' - W + s B0 A0||_F of a 16-bit base weight W' (`LiveOffset.cast_errors`).

    Raises:
        VerificationError: in some layer it is larger than the trained update itself.
    """
    trained = {name: folded.layers[name] for name in cast_errors}
    norms = {n: product_norm(x.lora_A, x.lora_B) * x.scaling if x.rank else 0.0 for n, x in trained.items()}
    faults = [
        f"{name}: rounding changed the base weight by {error:.3g} (Frobenius), training by {norms[name]:.3g}"
        for name, error in cast_errors.items()
        if not error <= norms[name]
    ]
    if faults:
        listed = [*faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more layers"] if len(faults) > _SHOWN else [])]
        raise VerificationError(
            "lora-ga.offset: base on a 16-bit base: the trained model differs from the base model more by rounding, "
            "which the adapter does not hold, than by what was trained:\n  " + "\n  ".join(listed) + "\n"
            "Train with lora-ga.offset: adapter, which rounds no base weight, or on a float32 base."
        )
    shares = {name: error / norms[name] for name, error in cast_errors.items() if error > 0}
    if not shares:
        return ()
    worst = max(shares, key=lambda name: shares[name])
    return (
        f"warning: lora-ga.offset: base: rounding of the 16-bit base, in training only, is up to {shares[worst]:.3g} "
        f"of the trained update ({worst}); the exported adapter does not hold it.",
    )


def _read_back(folder: str | Path, folded: FoldedAdapter) -> AdapterFiles:
    try:
        files = read_adapter(folder)
        faults = check_files(files, folded)
    except ArtifactError as fault:
        raise VerificationError(f"{folder}: the written adapter cannot be read back: {fault}") from fault
    if faults:
        raise VerificationError(f"{folder}: the written adapter is not as planned:\n  " + "\n  ".join(faults))
    return files


def check_files(files: AdapterFiles, folded: FoldedAdapter) -> list[str]:
    """Everything wrong with the files as such: keys, finiteness, shapes, ranks, alpha and saved modules.

    Raises:
        ArtifactError: factors without partner, empty or of other shapes than matrices.
    """
    pairs, saved = split_tensors(files.tensors)
    config = files.config
    faults = [
        f"{key} holds NaN or Inf"
        for key, tensor in files.tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if type(config.get("lora_alpha")) is not int:
        faults.append(f"lora_alpha is {config.get('lora_alpha')!r}, allowed: an integer")
    if config.get("use_rslora"):
        faults.append("use_rslora is set, but the scaling is folded")
    faults += [f"{name}: a layer that was not trained" for name in pairs if name not in folded.layers]
    for name, layer in folded.layers.items():
        faults += _layer_faults(name, layer, pairs.get(name), config)
    return faults + _saved_faults(saved, folded)


def _layer_faults(name: str, layer: FoldedLayer, pair: Pair | None, config: Mapping[str, object]) -> list[str]:
    if pair is None:
        return [f"{name}: rank {layer.rank} was trained and is missing"] if layer.rank else []
    shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
    planned = (layer.shape.out_features, layer.shape.in_features)
    faults = [] if shape == planned else [f"{name}: an update of shape {list(shape)}, trained {list(planned)}"]
    built = peft_rank(config, name)
    if pair.rank != built:
        faults.append(f"{name}: rank {pair.rank} in the tensors, {built} in the configuration")
    padded = not config.get("rank_pattern")
    if pair.rank < layer.rank or (not padded and pair.rank != layer.rank):
        faults.append(f"{name}: rank {pair.rank} in the file, {layer.rank} trained")
    return faults


def _saved_faults(saved: Mapping[str, Tensor], folded: FoldedAdapter) -> list[str]:
    faults = [f"{name}: not declared in modules_to_save" for name in undeclared_tensors(saved, folded.saved_modules)]
    faults += [f"{name}: part of modules_to_save and missing" for name in folded.saved if name not in saved]
    faults += [f"{name}: saved, but not part of the trained adapter" for name in saved if name not in folded.saved]
    for name in saved.keys() & folded.saved.keys():
        first, second = saved[name], folded.saved[name]
        if first.dtype != second.dtype or not torch.equal(first, second):
            faults.append(f"{name}: differs from the trained module (modules_to_save are compared bit for bit)")
    return faults


def update_bound(files: AdapterFiles) -> float:
    """The relative difference of an update that the file's dtype allows."""
    pairs, _ = split_tensors(files.tensors)
    half = any(factor.dtype in _HALF_DTYPES for pair in pairs.values() for factor in (pair.lora_A, pair.lora_B))
    return _HALF_BOUND if half else _EXACT_BOUND


def update_errors(files: AdapterFiles, folded: FoldedAdapter) -> dict[str, float]:
    """The relative difference of each layer's update, file (by PEFT's scaling) against trained; no dense product."""
    pairs, _ = split_tensors(files.tensors)
    errors = {}
    for name, layer in folded.layers.items():
        trained = (layer.lora_A, layer.lora_B * layer.scaling)
        pair = pairs.get(name)
        if pair is None:
            errors[name] = 1.0 if product_norm(*trained) else 0.0
            continue
        written = (pair.lora_A.float(), pair.lora_B.double() * peft_scaling(files.config, name))
        errors[name] = relative_difference(written, trained)
    return errors


def _worst_update(files: AdapterFiles, folded: FoldedAdapter) -> tuple[float, str]:
    errors = update_errors(files, folded)
    name = max(errors, key=lambda layer: math.inf if math.isnan(errors[layer]) else errors[layer])
    return errors[name], name


def _check_consumers(verdicts: Sequence[ConsumerVerdict], targets: Sequence[str]) -> None:
    wanted = {key for target in targets for key in consumers_of(target)}
    faults = [
        f"{v.consumer} {v.version} {v.status}: {v.reason}"
        for v in verdicts
        if v.consumer in wanted and v.status != "ok"
    ]
    if faults:
        raise VerificationError("the written adapter does not serve the consumers asked for:\n  " + "\n  ".join(faults))


def _compare_logits(
    folder: Path,
    files: AdapterFiles,
    model: "PeftModel | None",
    batch: Batch | None,
    fresh: nn.Module | None,
    adapter_name: str,
    reference: Tensor | None,
    offset: LiveOffset | None,
    *,
    lossy: bool,
) -> tuple[float | None, float | None]:
    if batch is None or (model is None and (fresh is None or reference is None)):
        return None, None
    with full_float32():
        if reference is None:
            assert model is not None
            reference = computed_logits(model, batch)
        if fresh is not None:
            served = loaded_on_fresh(fresh, folder, batch)
        else:
            assert model is not None
            with base_as_found(model, offset):
                served = file_as_second_adapter(model, folder, batch, adapter_name)
    if lossy:
        return logit_difference(served, reference), None
    packed = any(_packed(one) for one in (model, fresh) if one is not None)
    half = reference.dtype in _HALF_DTYPES or update_bound(files) == _HALF_BOUND or packed
    return compare_logits(folder, served, reference, half=half), _logit_bound(half)


def _packed(model: nn.Module) -> bool:
    """Whether a layer is quantized: its kernel may compute in 16 bits whatever goes in and comes out."""
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    views = (view_linear(name, module) for name, module in linear)  # PEFT's own wrappers share the class names
    return any(view.quantized for view in views if view is not None)


def _logit_bound(half: bool) -> float:
    return _HALF_LOGIT_BOUND if half else _EXACT_BOUND


def compare_logits(folder: Path, served: Tensor, reference: Tensor, *, half: bool) -> float:
    """The largest difference relative to the largest logit of the reference, within its bound.

    Raises:
        VerificationError: it is above 1e-5, or 5e-2 where 16-bit numbers are involved.
    """
    error = logit_difference(served, reference)
    if not error <= _logit_bound(half):
        raise VerificationError(
            f"{folder}: loaded by stock software, the written files change the logits by {error:.3g} of the largest "
            f"one; allowed: {_logit_bound(half):g}. The trained model computes something that the files do not hold."
        )
    return error


def logit_difference(first: Tensor, second: Tensor) -> float:
    """max|first - second| / max|second|; inf where either is not finite or the shapes differ."""
    if first.shape != second.shape:
        return math.inf
    # Differences of near numbers are exact in float32, and logits are large: no float64 copies.
    first, second = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (first, second))
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return math.inf
    difference, size = float((first - second).abs().max()), float(second.abs().max())
    return difference / size if size else (math.inf if difference else 0.0)
