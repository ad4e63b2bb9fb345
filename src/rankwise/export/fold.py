"""Whatever method trained it, one plain pair of factors a layer: gates, offsets, boosters and scalings in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.attach import adapted_layers, modules_saved
from rankwise.adapters.gates import RankGates, live_gates
from rankwise.adapters.offset import LiveOffset, live_offset
from rankwise.adapters.state import FactorPair, FoldState
from rankwise.errors import ArtifactError, ExportError
from rankwise.export.files import (
    AdapterFiles,
    Pair,
    peft_rank,
    peft_scaling,
    read_adapter,
    split_tensors,
    undeclared_tensors,
)
from rankwise.ranks.shapes import LayerShape

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "FoldedAdapter",
    "FoldedLayer",
    "base_module_names",
    "fold",
    "fold_files",
    "fold_folder",
    "with_empty_layers",
]


@dataclass(frozen=True, slots=True, eq=False)
class FoldedLayer:
    """One layer's update, scaling * lora_B @ lora_A, with nothing else to know.

    Args:
        shape: the layer's name and size.
        lora_A: [rank, in], float32 on the CPU; rank may be 0.
        lora_B: [out, rank], float32 on the CPU.
        scaling: the multiplier.
    """

    shape: LayerShape
    lora_A: Float[Tensor, "rank in"]  # noqa: N815
    lora_B: Float[Tensor, "out rank"]  # noqa: N815
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of lora_A, 0 for a layer without an update."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FoldedAdapter:
    """An adapter with the state of its method folded in.

    Args:
        layers: by full layer name, in the order of the model or the file.
        saved: trained copies of whole modules by tensor name relative to the base model, in their own dtype.
        saved_modules: the names under which `modules_to_save` declares them.
        base_name: the base model's name or path, if it is known.
        fan_in_fan_out: whether the base stores the weights transposed (GPT-2's Conv1D).
        task_type: PEFT's task type, if there is one.
        module_names: the names of all modules of the base model; None when only files are at hand.
        targets: a list of name suffixes known to select exactly the layers, if the source had one.
        notes: what the user should know.
    """

    layers: Mapping[str, FoldedLayer]
    saved: Mapping[str, Tensor]
    saved_modules: tuple[str, ...] = ()
    base_name: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    module_names: frozenset[str] | None = None
    targets: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer."""
        return {name: layer.rank for name, layer in self.layers.items()}


def fold(
    model: "PeftModel",
    state: FoldState | None = None,
    adapter_name: str = "default",
    *,
    empty_layers: Sequence[LayerShape] = (),
) -> FoldedAdapter:
    """The adapter of a live model as plain float32 factors; the model is only read.

    Args:
        model: a PEFT model with a LoRA adapter.
        state: what a method keeps beside the adapter; None if it keeps nothing. A live offset must be part of it.
        adapter_name: which adapter.
        empty_layers: layers that the plan gave no rank; they become layers of rank 0.

    Returns:
        Copies on the CPU, independent of the model.

    Raises:
        ExportError: a factor or a saved module holds NaN or Inf, or is empty (sharded and not gathered), or the model
            trains beside an offset or gates that `state` does not hold.
        ArtifactError: the adapter is not a plain LoRA.
    """
    state = state or FoldState()
    _refuse_forgotten(live_offset(model, adapter_name), state)
    _refuse_forgotten_gates(live_gates(model), state)
    config: Any = model.peft_config[adapter_name]
    views = adapted_layers(model, adapter_name)
    layers = {}
    for name, view in views.items():
        pair = Pair(_plain_copy(f"{name}.lora_A", view.lora_A), _plain_copy(f"{name}.lora_B", view.lora_B))
        layers[name] = _fold_layer(view.base.shape, pair, view.scaling, state)
    folded = FoldedAdapter(
        layers=layers,
        saved={name: tensor.detach().cpu().clone() for name, tensor in modules_saved(model, adapter_name).items()},
        saved_modules=tuple(config.modules_to_save or ()),
        base_name=config.base_model_name_or_path,
        fan_in_fan_out=all(view.base.kind == "conv1d" for view in views.values()),
        task_type=None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        module_names=base_module_names(model.get_base_model()),
    )
    return _checked(with_empty_layers(folded, empty_layers))


def fold_folder(
    folder: str | Path, state: FoldState | None = None, *, empty_layers: Sequence[LayerShape] = ()
) -> FoldedAdapter:
    """The adapter of a folder as plain float32 factors, by PEFT's own rules for ranks and scalings.

    Slots that `uniform` padded (a zero row of lora_A with a zero column of lora_B) are left out again.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        state: what a method keeps beside the adapter (rankwise_state.safetensors); None if nothing.
        empty_layers: layers that the plan gave no rank; they become layers of rank 0.

    Raises:
        ArtifactError: missing, damaged, not a plain LoRA, or ranks other than the configuration says.
        ExportError: a tensor holds NaN or Inf.
    """
    folded = fold_files(read_adapter(folder), state, source=str(folder))
    layers = {name: _without_padding(layer) for name, layer in folded.layers.items()}
    return with_empty_layers(replace(folded, layers=layers), empty_layers)


def fold_files(files: AdapterFiles, state: FoldState | None = None, *, source: str = "the adapter") -> FoldedAdapter:
    """`fold_folder` for files that are already read; `source` names them in errors."""
    state = state or FoldState()
    config = files.config
    pairs, saved = split_tensors(files.tensors)
    _check_ranks(config, pairs, source)
    declared = _texts(config.get("modules_to_save"))
    undeclared = undeclared_tensors(saved, declared)
    if undeclared:
        raise ArtifactError(
            f"{source}: {_listed(undeclared)}: neither a LoRA factor nor part of modules_to_save {list(declared)}. "
            "Resized or trained embeddings are saved so; declare them in modules_to_save."
        )
    layers = {}
    for name, pair in pairs.items():
        shape = LayerShape(name, pair.lora_B.shape[0], pair.lora_A.shape[1])
        layers[name] = _fold_layer(shape, pair, peft_scaling(config, name), state)
    base_name, task_type = config.get("base_model_name_or_path"), config.get("task_type")
    return _checked(
        FoldedAdapter(
            layers=layers,
            saved=saved,
            saved_modules=declared,
            base_name=base_name if isinstance(base_name, str) else None,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            task_type=task_type if isinstance(task_type, str) else None,
            targets=_known_targets(config),
        )
    )


def with_empty_layers(folded: FoldedAdapter, empty_layers: Sequence[LayerShape]) -> FoldedAdapter:
    """The same adapter with layers of rank 0 added where it has none of that name."""
    missing = [shape for shape in empty_layers if shape.name not in folded.layers]
    if not missing:
        return folded
    empty = {
        shape.name: FoldedLayer(
            shape, torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0), scaling=1.0
        )
        for shape in missing
    }
    targets = None if folded.targets is None else (*folded.targets, *empty)
    return replace(folded, layers={**folded.layers, **empty}, targets=targets)


def base_module_names(base: nn.Module) -> frozenset[str]:
    """The names of the base model's own modules, with or without PEFT's wrappers inside."""
    names = set()
    for name, _ in base.named_modules():
        parts = name.split(".")
        if any(part.startswith("lora_") or part in ("base_layer", "modules_to_save") for part in parts):
            continue
        names.add(".".join(part for part in parts if part != "original_module"))
    return frozenset(names - {""})


def _refuse_forgotten_gates(gates: RankGates | None, state: FoldState) -> None:
    """Gates that stand on the ranks belong to the update: without them another one would be written."""
    missing = [] if gates is None else [name for name in gates.names if name not in state.gates]
    if missing:
        raise ExportError(
            f"the model trains with gates on the ranks of {len(missing)} layers ({missing[0]} first), and the state "
            "holds none for them: export with session.export, or give state=session.fold_state"
        )


def _refuse_forgotten(offset: LiveOffset | None, state: FoldState) -> None:
    forgotten = [] if offset is None else [name for name in offset.pairs if name not in state.offsets]
    if forgotten:
        raise ExportError(
            f"{forgotten[0]}: this model trains beside an offset (lora-ga's start), and without it the exported "
            "adapter would be wrong: use session.export(folder), or pass offset=session.offset"
        )


def _fold_layer(shape: LayerShape, pair: Pair, scaling: float, state: FoldState) -> FoldedLayer:
    """Gate, stack boosters, take the offset off (common.md section 3, serving.md sections 3 and 6)."""
    lora_A, lora_B = pair.lora_A.float(), pair.lora_B.float()
    gate = state.gates.get(shape.name)
    if gate is not None:
        kept = gate != 0
        lora_A, lora_B = lora_A[kept], lora_B[:, kept] * gate[kept].float()
    booster = state.boosters.get(shape.name)
    if booster is not None:
        lora_A = torch.cat([booster.lora_A.float(), lora_A])
        lora_B = torch.cat([booster.lora_B.float(), lora_B], dim=1)
    offset = state.offsets.get(shape.name)
    if offset is not None:
        lora_A, lora_B = _without_start(lora_A, lora_B, offset)
    return FoldedLayer(shape, lora_A, lora_B, scaling)


def _without_start(lora_A: Tensor, lora_B: Tensor, start: FactorPair) -> tuple[Tensor, Tensor]:
    """B A - B0 A0 as one pair: [B - B0, B0] [A; A - A0], or [B, -B0] [A; A0] where the ranks differ.

    The first form holds what training changed in small numbers, which s B and a 16-bit file round in proportion; the
    second is the difference of two large products, of which rounding alone would leave a multiple of a short run.
    """
    start_A, start_B = start.lora_A.float(), start.lora_B.float()
    subtracts = start_A.any(dim=1) & start_B.any(dim=0)  # an update of zero has nothing to subtract
    if start_A.shape != lora_A.shape:
        return torch.cat([lora_A, start_A[subtracts]]), torch.cat([lora_B, -start_B[:, subtracts]], dim=1)
    start_B = start_B * subtracts
    rows = torch.cat([lora_A, (lora_A - start_A)[subtracts]])
    return rows, torch.cat([lora_B - start_B, start_B[:, subtracts]], dim=1)


def _without_padding(layer: FoldedLayer) -> FoldedLayer:
    used = layer.lora_A.any(dim=1) | layer.lora_B.any(dim=0)
    return replace(layer, lora_A=layer.lora_A[used], lora_B=layer.lora_B[:, used])


def _plain_copy(name: str, parameter: Tensor) -> Tensor:
    full = getattr(parameter, "full_tensor", None)  # DTensor: the gathered value
    tensor: Tensor = parameter.detach() if full is None else full().detach()
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ExportError(f"{name} is empty, shape {list(tensor.shape)}: gather sharded parameters (ZeRO-3) first.")
    return tensor.to(device="cpu", dtype=torch.float32, copy=True)


def _check_ranks(config: Mapping[str, object], pairs: Mapping[str, Pair], source: str) -> None:
    faults = [
        f"{name}: rank {pair.rank} in the file, {peft_rank(config, name)} by the configuration"
        for name, pair in pairs.items()
        if pair.rank != peft_rank(config, name)
    ]
    if faults:
        raise ArtifactError(
            f"{source}: PEFT itself cannot load this adapter: {_listed(faults)}. "
            "Correct r or rank_pattern in adapter_config.json, or save the adapter again."
        )


def _checked(folded: FoldedAdapter) -> FoldedAdapter:
    for name, layer in folded.layers.items():
        for side, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if not bool(torch.isfinite(factor).all()):
                raise ExportError(f"{name}.{side} holds NaN or Inf; such an adapter is not exported. Train again.")
    for name, tensor in folded.saved.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} (modules_to_save) holds NaN or Inf; such an adapter is not exported.")
    return folded


def _known_targets(config: Mapping[str, object]) -> tuple[str, ...] | None:
    """The source's own suffix list, where nothing else narrows what it selects."""
    targets = config.get("target_modules")
    narrowed = any(config.get(key) is not None for key in ("exclude_modules", "layers_to_transform"))
    return None if narrowed or not isinstance(targets, list) else tuple(sorted(_texts(targets)))


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list | tuple | set) else ()


def _listed(items: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return "; ".join(items[:shown]) + more
