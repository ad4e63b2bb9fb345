"""Full weights W + scaling * lora_B @ lora_A: what is left when no adapter may be left."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.adapters.checkpoint import read_safetensors, write_safetensors
from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.errors import ExportError, VerificationError
from rankwise.export.fold import FoldedAdapter

__all__ = ["MergedWeights", "merge_weights", "save_merged", "verify_merged"]

_ROUNDING_WORTH_A_NOTE = 1e-2
_LOAD_UNQUANTIZED = (
    "Merging into quantized weights would round the update away: load the base in bfloat16 or float32 and export the "
    "checkpoint with it, or export an adapter (layout uniform)."
)


@dataclass(frozen=True, slots=True)
class MergedWeights:
    """The tensors of a merged model.

    Args:
        tensors: by their names in the base model, on the CPU; tied tensors share memory as in the base.
        rounding: the largest part of a layer's update that the dtype of the weights rounds away, in [0, inf).
        worst_layer: the layer behind `rounding`.
        dtype: of the merged layers.
        layers: how many layers were merged.
        rounds_base: whether the dtype is narrower than the base model's own.
    """

    tensors: Mapping[str, Tensor]
    rounding: float
    worst_layer: str
    dtype: torch.dtype
    layers: int
    rounds_base: bool

    @property
    def half(self) -> bool:
        """Whether the merged layers are stored in 16 bits."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.rounding <= _ROUNDING_WORTH_A_NOTE:
            return ()
        return (
            f"warning: rounding to the dtype of the merged weights loses up to {self.rounding:.0%} of a layer's update "
            f"({self.worst_layer}); an adapter, or float32 weights, keep it.",
        )


def merge_weights(folded: FoldedAdapter, base: nn.Module, dtype: torch.dtype | None = None) -> MergedWeights:
    """The base model's weights with the adapter added in float32 and saved modules in place; `base` is only read.

    Args:
        folded: the adapter.
        base: the base model, with or without PEFT's wrappers inside.
        dtype: of all floating-point tensors; None keeps each tensor's own.

    Raises:
        ExportError: a quantized, missing, tied or offloaded weight, or one of another shape than the adapter's.
    """
    if getattr(base, "hf_quantizer", None) is not None:
        raise ExportError(f"the base model is quantized. {_LOAD_UNQUANTIZED}")
    layers = {name: _plain_layer(base, name, folded) for name, layer in folded.layers.items() if layer.rank}
    sources = _base_tensors(base)
    sources |= {name: tensor.to(sources[name].dtype) for name, tensor in folded.saved.items() if name in sources}
    missing = [name for name in folded.saved if name not in sources]
    if missing:
        raise ExportError(
            f"{missing[0]} (modules_to_save) is no tensor of the base model; take the base it was trained on."
        )
    owners = {f"{name}.weight": layer for name, layer in layers.items()}
    _refuse_tied(sources, owners)
    tensors, copies, worst = {}, {}, (0.0, "")
    for key, source in sources.items():
        if key in owners:
            tensors[key], rounding = _merged(owners[key], folded, source, dtype)
            worst = max(worst, (rounding, owners[key].name))
            continue
        mark = (source.data_ptr(), tuple(source.shape), source.stride())
        if mark not in copies or not source.numel():
            target = dtype if dtype is not None and source.is_floating_point() else source.dtype
            copies[mark] = source.detach().to(device="cpu", dtype=target, copy=True)
        tensors[key] = copies[mark]
    kept = next((key for key in owners), next(iter(sources)))
    rounds = tensors[kept].dtype.itemsize < sources[kept].dtype.itemsize
    return MergedWeights(tensors, *worst, dtype=tensors[kept].dtype, layers=len(layers), rounds_base=rounds)


def _plain_layer(base: nn.Module, name: str, folded: FoldedAdapter) -> LinearLayer:
    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise ExportError(
            f"{name} is not in the base model {type(base).__name__}; take the base it was trained on."
        ) from None
    inner = getattr(module, "base_layer", module)
    layer = view_linear(name, inner)
    weight = getattr(inner, "weight", None)
    if layer is None or layer.quantized or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ExportError(f"{name} is a {type(inner).__name__}. {_LOAD_UNQUANTIZED}")
    if weight.device.type == "meta":
        raise ExportError(f"{name} is offloaded (meta device); load the base model into memory to merge.")
    expected = folded.layers[name].shape
    if (layer.shape.out_features, layer.shape.in_features) != (expected.out_features, expected.in_features):
        raise ExportError(
            f"{name} is [{layer.shape.out_features}, {layer.shape.in_features}] in the base model and "
            f"[{expected.out_features}, {expected.in_features}] in the adapter; take the base it was trained on."
        )
    return layer


def _base_tensors(base: nn.Module) -> dict[str, Tensor]:
    """The base model's own state by its original names, PEFT's wrappers taken out."""
    tensors = {}
    for key, tensor in base.state_dict().items():
        parts = key.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        tensors[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    return tensors


def _refuse_tied(sources: Mapping[str, Tensor], owners: Mapping[str, LinearLayer]) -> None:
    names: dict[int, list[str]] = {}
    for key, tensor in sources.items():
        if tensor.numel():
            names.setdefault(tensor.data_ptr(), []).append(key)
    for shared in names.values():
        merged = [key for key in shared if key in owners]
        if merged and len(shared) > 1:
            other = next(key for key in shared if key != merged[0])
            raise ExportError(
                f"{merged[0]} shares its memory with {other}: merging would change both. Export an adapter instead."
            )


def _merged(
    layer: LinearLayer, folded: FoldedAdapter, source: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, float]:
    """The merged weight as the base stores it, and the part of the update that its dtype loses."""
    factors = folded.layers[layer.name]
    update = (factors.lora_B * factors.scaling) @ factors.lora_A
    weight = layer.weight(torch.float32).cpu()
    merged = (weight + update).to(dtype or source.dtype)
    size = float(update.norm())
    lost = float((merged.float() - weight - update).norm()) / size if size else 0.0
    return (merged.T if layer.kind == "conv1d" else merged).contiguous(), lost


def save_merged(merged: MergedWeights, base: nn.Module, folder: Path) -> None:
    """Writes the merged model with the base model's own `save_pretrained`; its configuration is left as found.

    A base without `save_pretrained` gets its tensors in one model.safetensors.
    """
    save = getattr(base, "save_pretrained", None)
    if save is None:
        write_safetensors(folder / "model.safetensors", {key: t.clone() for key, t in merged.tensors.items()})
        return
    config = base.config
    before = {key: getattr(config, key, None) for key in ("dtype", "architectures")}
    try:
        save(folder, state_dict=dict(merged.tensors))
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    _state_dtype(merged, folder / "config.json")


def _state_dtype(merged: MergedWeights, path: Path) -> None:
    """The live model's dtype stands in the configuration that transformers writes; a loader needs the file's."""
    dtypes = {tensor.dtype for tensor in merged.tensors.values() if tensor.is_floating_point()}
    if path.is_file() and len(dtypes) == 1:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify_merged(folder: Path, merged: MergedWeights, adapted: set[str]) -> int:
    """Reads the weights back and compares them bit for bit; returns the number of tensors compared.

    Raises:
        VerificationError: a tensor that is missing or differs. A tied tensor is stored under one of its names only.
    """
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored |= read_safetensors(path)
    present = {merged.tensors[key].data_ptr() for key in stored.keys() & merged.tensors.keys()}
    faults = []
    for key, tensor in merged.tensors.items():
        if key in stored:
            if stored[key].dtype != tensor.dtype or not torch.equal(stored[key], tensor):
                faults.append(f"{key} differs from what was written")
        elif tensor.data_ptr() not in present or key.removesuffix(".weight") in adapted:
            faults.append(f"{key} is missing")
    if faults:
        raise VerificationError(f"{folder}: the merged weights are not in the file:\n  " + "\n  ".join(faults[:10]))
    return len(stored)
