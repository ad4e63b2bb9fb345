"""Adapter files: native training checkpoints, exact in every bit, and a reader that names every kind of damage."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.adapters.attach import adapter_tensors, peft_model_of
from rankwise.errors import ArtifactError, ExportError

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "load_native",
    "read_adapter_config",
    "read_safetensors",
    "save_native",
    "write_safetensors",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What must agree for the stored factors to mean the same function.
_DECISIVE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "use_dora")
_SHOWN = 5


def save_native(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT does: own ranks, exact dtype, nothing folded.

    A training checkpoint, not a serving file: most servers mis-scale uneven ranks (docs/export-contract.md).

    Raises:
        ModelError: the model is not a PEFT model with this adapter.
        ExportError: a tensor is empty, as ZeRO-3 leaves them in one process.
    """
    peft_model = peft_model_of(model, adapter_name)
    tensors = adapter_tensors(peft_model, adapter_name)
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise ExportError(
            f"{empty[0]} is empty in this process ({len(empty)} of {len(tensors)} tensors): the parameters are "
            "sharded; save from the gathered model"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    staged = target / f".{WEIGHTS_FILE}.{os.getpid()}.part"
    # Clones: a saved module may be tied to another, and safetensors refuses shared memory.
    saved = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_safetensors(staged, saved, {"format": "pt"})
    staged.replace(target / WEIGHTS_FILE)
    staged_config = target / f".{CONFIG_FILE}.{os.getpid()}.part"
    staged_config.write_text(
        json.dumps(_config_dict(peft_model, adapter_name), indent=2, sort_keys=True), encoding="utf-8"
    )
    staged_config.replace(target / CONFIG_FILE)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors with the access rights of any other new file; safetensors' own let only the owner read.

    Args:
        path: the file, new or to be overwritten.
        tensors: contiguous, without shared memory.
        metadata: the header's text entries.
    """
    target = Path(path)
    target.touch()
    mode = target.stat().st_mode
    save_file(dict(tensors), target, metadata=None if metadata is None else dict(metadata))
    target.chmod(mode)


def load_native(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes the stored factors and saved modules into the attached model, bit for bit; requires_grad is untouched.

    Args:
        model: the model with an adapter of the same plan attached.
        folder: what `save_native` (or PEFT's save_pretrained) wrote.
        adapter_name: which adapter to fill.

    Raises:
        ModelError: the model is not a PEFT model with this adapter.
        ArtifactError: a file is missing or damaged, or is for another plan: the differences in names, shapes, types and
            scaling settings.
    """
    peft_model = peft_model_of(model, adapter_name)
    source = Path(folder)
    stored_config = read_adapter_config(source)
    tensors = read_safetensors(source / WEIGHTS_FILE)
    live = adapter_tensors(peft_model, adapter_name)
    faults = _config_faults(stored_config, _config_dict(peft_model, adapter_name)) + _tensor_faults(tensors, live)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more differences" if len(faults) > _SHOWN else ""
        raise ArtifactError(
            f"{source} does not fit the attached adapter: {'; '.join(faults[:_SHOWN])}{more}. Attach the plan that the "
            "checkpoint was made with (its plan.json or rankwise.json)"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of adapter_config.json in a folder.

    Raises:
        ArtifactError: no such folder or file, or not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise ArtifactError(f"{folder} is not a folder: give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: a PEFT adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}): it is damaged; copy it again from its source") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds no JSON object but a {type(config).__name__}: it is no adapter's config")
    return config


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is missing, unreadable, truncated, damaged, or a pickle.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtifactError(_missing(source))
    if source.suffix in (".bin", ".pt", ".pth", ".pkl"):
        raise ArtifactError(
            f"{source} is a pickle, which can run any code when it is opened; rankwise reads safetensors only: "
            "convert it in an environment that you trust (load it with PEFT, then save_pretrained)"
        )
    try:
        return load_file(source, device="cpu")
    except OSError as error:
        raise ArtifactError(
            f"{source} cannot be read ({error.strerror or error}): check its permissions and disk"
        ) from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{source} ({source.stat().st_size} bytes) is not a whole safetensors file ({error}): it is truncated or "
            "damaged; copy it again from its source, or go on from an earlier checkpoint"
        ) from None


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder: give the path of a safetensors file"
    pickled = path.with_name("adapter_model.bin")
    if pickled.is_file():
        return (
            f"{path} is missing and {pickled.name} beside it is a pickle, which can run any code when it is opened: "
            "convert it in an environment that you trust (load it with PEFT, then save_pretrained)"
        )
    return f"{path} is missing: check the path, or go on from an earlier checkpoint"


def _config_dict(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The adapter's config as PEFT would save it: plain JSON values, sets sorted, marked for inference."""
    values: dict[str, Any] = model.peft_config[adapter_name].to_dict()
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return {**values, "inference_mode": True}


def _config_faults(stored: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {stored.get(key)!r} in the file and {live.get(key)!r} in the model"
        for key in _DECISIVE
        if (stored.get(key) or None) != (live.get(key) or None)
    ]


def _tensor_faults(stored: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    faults = [f"{name} is missing from the file" for name in live if name not in stored]
    faults += [f"{name} is in the file only" for name in stored if name not in live]
    for name in live.keys() & stored.keys():
        ours, theirs = live[name], stored[name]
        if ours.shape != theirs.shape:
            faults.append(f"{name} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        elif ours.dtype != theirs.dtype:
            faults.append(f"{name} is {theirs.dtype} in the file and {ours.dtype} in the model")
    return faults
