"""An adapter as it lies on disk: a configuration, tensors, and PEFT's own rule for rank and scaling of each layer."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_safetensors
from rankwise.adapters.lora_config import check_plain_lora_config
from rankwise.errors import ArtifactError, RecipeError

__all__ = [
    "CONFIG_FILE",
    "KEY_PREFIX",
    "WEIGHTS_FILE",
    "AdapterFiles",
    "Pair",
    "number",
    "pattern_value",
    "peft_alpha",
    "peft_rank",
    "peft_scaling",
    "read_adapter",
    "split_tensors",
    "undeclared_tensors",
]

KEY_PREFIX = "base_model.model."

_FACTOR_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter folder holds.

    Args:
        config: the content of adapter_config.json.
        tensors: the content of adapter_model.safetensors, by its key.
        notes: what whoever wrote it should know.
    """

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """The stored factors of one layer: lora_A [rank, in] and lora_B [out, rank], unscaled, in the file's dtype."""

    lora_A: Float[Tensor, "rank in"]  # noqa: N815
    lora_B: Float[Tensor, "out rank"]  # noqa: N815

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]


def read_adapter(folder: str | Path) -> AdapterFiles:
    """The files of a plain PEFT LoRA adapter.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        Configuration and tensors (as stored, on the CPU).

    Raises:
        ArtifactError: a file is missing or damaged, or the adapter is not a plain LoRA.
    """
    config = read_adapter_config(folder)
    _refuse_settings(config, Path(folder))
    return AdapterFiles(config=config, tensors=read_safetensors(Path(folder) / WEIGHTS_FILE))


def _refuse_settings(config: Mapping[str, object], folder: Path) -> None:
    faults: tuple[str, ...] = ()
    try:
        check_plain_lora_config(config)
    except RecipeError as fault:
        faults = fault.faults
    faults = faults or tuple(_number_faults(config))
    if faults:
        listed = "\n  ".join(faults)
        raise ArtifactError(f"{folder / CONFIG_FILE}: not a plain LoRA adapter:\n  {listed}")


def _number_faults(config: Mapping[str, object]) -> list[str]:
    faults = []
    if not _is_number(config.get("r"), whole=True):
        faults.append(f"r is {config.get('r')!r}, allowed: a whole number >= 1")
    if not _is_number(config.get("lora_alpha")):
        faults.append(f"lora_alpha is {config.get('lora_alpha')!r}, allowed: a number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            faults.append(f"{key} is {pattern!r}, allowed: an object of name patterns")
            continue
        for name, value in pattern.items():
            if not _is_number(value, whole=key == "rank_pattern"):
                faults.append(f"{key}[{name!r}] is {value!r}, allowed: a number")
            elif not _compiles(name):
                faults.append(f"{key}[{name!r}]: not a regular expression")
    return faults


def _is_number(value: object, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return not whole or (isinstance(value, int) and value >= 1)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    r"""The value of the first entry that matches the layer's name, by PEFT's rule.

    A key matches as `re.match(r"(.*\.)?(KEY)$", name)`; entries are tried in their order in the file.

    Source: PEFT 0.21.2, `peft.utils.other.get_pattern_key`.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def peft_rank(config: Mapping[str, object], name: str) -> int:
    """The rank that PEFT builds the layer with, >= 1."""
    return int(pattern_value(_pattern(config, "rank_pattern"), name, number(config, "r")))


def peft_alpha(config: Mapping[str, object], name: str) -> float:
    """The alpha that PEFT uses for the layer."""
    return pattern_value(_pattern(config, "alpha_pattern"), name, number(config, "lora_alpha"))


def peft_scaling(config: Mapping[str, object], name: str) -> float:
    """The multiplier that PEFT applies: alpha / rank, or alpha / sqrt(rank) under use_rslora."""
    rank = peft_rank(config, name)
    return peft_alpha(config, name) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def number(config: Mapping[str, object], key: str) -> float:
    """A numeric setting (checked when the configuration was read)."""
    value = config[key]
    assert isinstance(value, int | float)
    return value


def _pattern(config: Mapping[str, object], key: str) -> Mapping[str, float]:
    pattern = config.get(key) or {}
    assert isinstance(pattern, dict)
    return pattern


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The factors by layer, and everything else by its name relative to the base model.

    Args:
        tensors: the tensors of an adapter file by their keys.

    Returns:
        Pairs by full layer name, in the file's order; other tensors (`modules_to_save`) by name.

    Raises:
        ArtifactError: a factor without its partner, empty or of another shape than a matrix; factors of an embedding.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        relative = key.removeprefix(KEY_PREFIX)
        match = _FACTOR_KEY.fullmatch(relative)
        if match:
            sides.setdefault(match["name"], {})[match["side"]] = tensor
        elif ".lora_" in relative:
            raise ArtifactError(f"{key}: not a factor of a linear layer; only lora_A and lora_B weights are allowed.")
        else:
            saved[relative] = tensor
    if not sides:
        raise ArtifactError("no lora_A or lora_B tensor in the file; it is no LoRA adapter or lost its tensors.")
    return {name: _paired(name, pair) for name, pair in sides.items()}, saved


def _paired(name: str, sides: Mapping[str, Tensor]) -> Pair:
    if len(sides) != 2:
        missing = "A" if "B" in sides else "B"
        raise ArtifactError(f"{name}: lora_{missing} is missing; the file is incomplete. Save the adapter again.")
    first, second = sides["A"], sides["B"]
    shapes = f"lora_A {list(first.shape)}, lora_B {list(second.shape)}"
    if not (first.numel() and second.numel()):
        raise ArtifactError(
            f"{name}: empty factors ({shapes}): sharded parameters (ZeRO-3, FSDP) were saved without gathering them. "
            "Save from the gathered state dict."
        )
    if first.ndim != 2 or second.ndim != 2:
        raise ArtifactError(f"{name}: {shapes}; only linear layers, with matrices as factors, are allowed.")
    if first.shape[0] != second.shape[1]:
        raise ArtifactError(f"{name}: {shapes}: the ranks differ, so the file is damaged.")
    return Pair(first, second)


def undeclared_tensors(saved: Iterable[str], modules_to_save: Iterable[str]) -> list[str]:
    """The tensors that belong to no declared module, by PEFT's rule (a declared name ends a module's name)."""
    declared = tuple(modules_to_save)
    return [name for name in saved if not any(_belongs(name, module) for module in declared)]


def _belongs(name: str, module: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)))
