"""Which parameters are pairs of lora_A and lora_B: found by name on any PEFT model, checked in any group."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.errors import ConfigError

__all__ = ["Pair", "ScalingReader", "check_groups", "groups_of_model", "pairs_of"]

ScalingReader = Callable[[], float]
"""Reads the multiplier that a layer applies at this moment."""

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "meta")
_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One lora_A [rank, in] with its lora_B [out, rank].

    Args:
        lora_A: the factor that touches the input.
        lora_B: the factor that touches the output.
        group: the number of its parameter group.
        place: the number of the pair within the group.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    group: int
    place: int

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return int(self.lora_A.shape[0])

    def describe(self, names: Sequence[str] | None = None) -> str:
        """The pair's layer, or its place in its group."""
        if names is not None:
            return repr(names[self.place])
        return f"pair {self.place} of group {self.group} ({tuple(self.lora_A.shape)}, {tuple(self.lora_B.shape)})"


def groups_of_model(
    model: nn.Module, adapter_name: str = "default"
) -> tuple[list[dict[str, Any]], dict[int, ScalingReader]]:
    """The trainable parameters of a PEFT model as one group of pairs and one of plain parameters.

    Pairs are found by exchanging `.lora_A.` for `.lora_B.` in the name; what is not such a 2-D pair (embedding and
    convolution factors, DoRA magnitudes, `modules_to_save`) is a plain parameter. A pair stays a pair where only one of
    its halves is trainable.

    Args:
        model: the attached model, not wrapped.
        adapter_name: which adapter.

    Returns:
        The groups, and for each lora_A (by id) the reader of its layer's scaling.

    Raises:
        ConfigError: no trainable pair of this adapter, a missing half, or a layer without a scaling; every fault.
    """
    parameters = dict(model.named_parameters())
    suffix = f".lora_A.{adapter_name}.weight"
    paired: set[str] = set()
    names: list[str] = []
    group: dict[str, Any] = {"kind": "lora_pair", "params": [], "scaling": []}
    readers: dict[int, ScalingReader] = {}
    faults = []
    for name, lora_A in parameters.items():
        if not name.endswith(suffix) or lora_A.ndim not in (1, 2):
            continue
        stem = name.removesuffix(suffix)
        other = f"{stem}.lora_B.{adapter_name}.weight"
        lora_B = parameters.get(other)
        if lora_B is None:
            faults.append(f"{name} has no {other}: a pair needs both halves")
            continue
        if not (lora_A.requires_grad or lora_B.requires_grad):
            continue
        reader = _scaling_reader(model.get_submodule(stem), adapter_name)
        if reader is None:
            faults.append(f"{stem} has no scaling for the adapter {adapter_name!r}: it is no LoRA layer of PEFT")
            continue
        paired |= {name, other}
        names.append(stem)
        group["params"] += [lora_A, lora_B]
        group["scaling"].append(reader())
        readers[id(lora_A)] = reader
    faults += [
        f"{name} has no lora_A: a pair needs both halves"
        for name, parameter in parameters.items()
        if f".lora_B.{adapter_name}.weight" in name
        and parameter.ndim == 2
        and parameter.requires_grad
        and name.replace(".lora_B.", ".lora_A.") not in parameters
    ]
    if not names and not faults:
        if any("_flat_param" in name for name in parameters):
            faults.append("FSDP1 has flattened the factors, on which pairs cannot be stepped: use DDP or FSDP2")
            raise ConfigError(faults)
        found = sorted({name.split(".lora_A.")[1].split(".")[0] for name in parameters if ".lora_A." in name})
        others = f"it has {', '.join(found)}" if found else "it has none: attach one with PEFT or rankwise.attach first"
        faults.append(f"the model has no trainable pair of lora_A and lora_B of the adapter {adapter_name!r}; {others}")
    if faults:
        raise ConfigError(faults)
    group["names"] = names
    plain = [p for name, p in parameters.items() if p.requires_grad and name not in paired]
    return [group, *([{"kind": "plain", "params": plain}] if plain else [])], readers


def _scaling_reader(module: nn.Module, adapter_name: str) -> ScalingReader | None:
    scaling = getattr(module, "scaling", None)
    if not isinstance(scaling, Mapping) or adapter_name not in scaling:
        return None
    return lambda: float(scaling[adapter_name])


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Passes if every group is one of pairs or of plain parameters, and nothing is listed twice.

    Raises:
        ConfigError: every fault: an unknown kind, odd or mismatched halves, a scaling that is missing or not a finite
            number other than 0, shared parameters, types that cannot be trained, flattened shards.
    """
    faults: list[str] = []
    listed: list[tuple[Tensor, str]] = []
    for number, group in enumerate(groups):
        kind = group.get("kind")
        if kind not in ("lora_pair", "plain"):
            faults.append(f"group {number} has kind {kind!r}: use 'lora_pair' for pairs A1, B1, A2, B2, ... or 'plain'")
            continue
        for place, parameter in enumerate(group["params"]):
            where = f"parameter {place} of group {number}"
            faults += _parameter_faults(parameter, where)
            listed.append((parameter, where))
        if kind == "lora_pair":
            faults += _pair_faults(group, number)
    faults += _shared_faults(listed)
    if faults:
        more = [f"and {len(faults) - _SHOWN} more faults like these"] if len(faults) > _SHOWN else []
        raise ConfigError([*faults[:_SHOWN], *more])


def _parameter_faults(parameter: Tensor, where: str) -> Iterable[str]:
    if parameter.is_sparse or parameter.layout != torch.strided:
        yield f"{where} is sparse: give dense parameters only"
    elif parameter.is_complex():
        yield f"{where} is complex: give real parameters only"
    elif parameter.device.type not in _DEVICES:
        yield f"{where} is on {parameter.device}, where float64 is missing: train on {' or '.join(_DEVICES[:2])}"
    elif parameter.dtype not in _FLOATING:
        yield f"{where} has the type {parameter.dtype}: use {', '.join(str(dtype) for dtype in _FLOATING)}"


def _shared_faults(listed: Sequence[tuple[Tensor, str]]) -> Iterable[str]:
    """Parameters that share memory, wholly or in part, or are listed twice."""
    spans = []
    for parameter, where in listed:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.layout != torch.strided or not local.numel() or local.device.type == "meta":
            continue
        last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
        begin = local.data_ptr()
        spans.append((str(local.device), begin, begin + (last + 1) * local.element_size(), where))
    spans.sort(key=lambda span: span[:3])
    for (device, _, end, where), (next_device, begin, _, next_where) in itertools.pairwise(spans):
        if device == next_device and begin < end:
            yield f"{next_where} is shared with {where} and would be stepped twice: list each once"


def _pair_faults(group: Mapping[str, Any], number: int) -> Iterable[str]:
    parameters, scaling = group["params"], group.get("scaling")
    if len(parameters) % 2:
        yield f"group {number} has {len(parameters)} parameters: a half is missing; list A1, B1, A2, B2, ..."
        return
    count = len(parameters) // 2
    if not isinstance(scaling, list | tuple) or len(scaling) != count:
        yield f"group {number} needs 'scaling', a list with the multiplier of each of its {count} pairs"
    else:
        bad = [value for value in scaling if not isinstance(value, int | float) or not 0 < abs(value) < float("inf")]
        if bad:
            yield f"group {number} has the scaling {bad[0]!r}: it must be a finite number other than 0"
    for place, (lora_A, lora_B) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        if lora_A.ndim != 2 or lora_B.ndim != 2:
            yield (
                f"pair {place} of group {number} has the shapes {shapes}: pairs are lora_A [rank, in] and lora_B "
                "[out, rank]. Flattened shards (FSDP1, DeepSpeed ZeRO) cannot work; use DDP or FSDP2"
            )
        elif not lora_A.numel() or not lora_B.numel():
            yield f"pair {place} of group {number} has the shapes {shapes}: a half is empty, as ZeRO-3 leaves it"
        elif lora_A.shape[0] != lora_B.shape[1]:
            yield (
                f"pair {place} of group {number} has the shapes {shapes}: lora_A [rank, in] and lora_B [out, rank] "
                "must have one rank; list them as A1, B1, A2, B2, ..."
            )
        elif lora_A.dtype != lora_B.dtype or lora_A.device != lora_B.device:
            yield (
                f"pair {place} of group {number}: lora_A is {lora_A.dtype} on {lora_A.device}, lora_B {lora_B.dtype} "
                f"on {lora_B.device}; both halves must agree"
            )


def pairs_of(groups: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The pairs of all groups, in order."""
    found = []
    for number, group in enumerate(groups):
        if group["kind"] == "lora_pair":
            halves = group["params"]
            found += [Pair(a, b, number, i) for i, (a, b) in enumerate(zip(halves[::2], halves[1::2], strict=True))]
    return found
