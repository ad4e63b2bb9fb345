"""Who a base model is: one hash of its architecture, one of its weights, both blind to adapters."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.errors import ModelError

__all__ = ["architecture_fingerprint", "base_tensors", "check_finite_weights", "weights_fingerprint"]

# Settings that change what the same weights compute. Token ids, label names, caches and dropout rates are left out:
# trainers edit them, and the function of the weights stays the same.
_ESSENTIALS = (
    "model_type", "*act", "*activation*", "*_heads", "head_dim", "d_kv", "*_eps", "*epsilon", "rope_*", "layer_types",
    "sliding_window", "partial_rotary*", "*softcapping", "*_layers", "n_layer", "n_head", "position_embedding_type",
    "relative_attention_*", "tie_word_embeddings", "is_decoder", "is_encoder_decoder", "is_gated_act", "scale_attn*",
    "*_multiplier", "query_pre_attn_scalar", "num_experts*", "num_local_experts",
)  # fmt: skip
_CHUNK_BYTES = 1 << 26
_SHOWN = 5


def architecture_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits over the class, the settings that change the function, and the weights' names and sizes.

    Equal before and after an adapter is attached, for a quantized and a float copy of one model, and on every device.
    """
    base = _base(model)
    shapes: dict[str, list[int]] = {}
    for name, module in _base_modules(base):
        view = view_linear(name, module)
        for key, parameter in module.named_parameters(recurse=False):
            # A packed weight has another shape than the matrix that it stands for.
            packed = key == "weight" and view is not None and view.quantized
            shape = (view.shape.out_features, view.shape.in_features) if packed and view else tuple(parameter.shape)
            shapes[f"{name}.{key}"] = list(shape)
    parts = [type(base).__name__, _essentials(base), sorted(shapes.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits over the name, type, shape and every bit of each base tensor.

    Equal before and after an adapter is attached and trained, on every device; packed weights are hashed as they are,
    with their quantization state. (bitsandbytes itself rounds the scales of 4-bit layers when they are first evaluated
    on a CPU with AVX512-BF16: those must be hashed before.)

    Raises:
        ModelError: a weight is not in memory.
    """
    digests: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], bytes] = {}
    lines = []
    # All are held until the end: quantization states are built on request, and a freed one's memory is used again.
    tensors = list(base_tensors(model))
    for name, tensor in tensors:
        if tensor.device.type == "meta":
            raise ModelError(f"{name} is not in memory (meta device): load the model without disk or CPU offload")
        # Tied tensors are one memory: hash it once.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in digests or not tensor.numel():
            digests[key] = _digest(tensor)
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digests[key].hex()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters and saved buffers under their names without adapters, quantization state included."""
    for name, module in _base_modules(_base(model)):
        prefix = f"{name}." if name else ""
        if next(module.children(), None) is None:
            # A leaf's state dict also holds what bitsandbytes keeps beside a packed weight.
            own: Mapping[str, object] = module.state_dict()
        else:
            own = {
                **dict(module.named_parameters(recurse=False)),
                **{k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set},
            }
        yield from ((prefix + key, value.detach()) for key, value in own.items() if isinstance(value, Tensor))


def check_finite_weights(layers: Sequence[LinearLayer], model: nn.Module | None = None) -> None:
    """Passes if no weight of these layers, and no other float parameter of the model, is NaN or infinite.

    Args:
        layers: looked at as matrices, so that packed weights are judged by what they stand for.
        model: whose other parameters are looked at too (norms, embeddings, biases); None for the layers alone.

    Raises:
        ModelError: some are; the first layers or parameters and how many of their values.
    """
    bad = []
    seen = {id(layer.module.weight) for layer in layers}
    for layer in layers:
        weight = layer.weight(torch.float32 if layer.quantized else _dtype(layer))
        low, high = torch.aminmax(weight)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad.append(f"{layer.name} ({int((~torch.isfinite(weight)).sum())} of {weight.numel()} values)")
    for name, parameter in () if model is None else model.named_parameters():
        if id(parameter) in seen or not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        finite = torch.isfinite(parameter.detach())
        if not finite.all():
            bad.append(f"{name} ({int((~finite).sum())} of {parameter.numel()} values)")
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ModelError(
            f"the base model holds NaN or infinite weights in {', '.join(bad[:_SHOWN])}{more}: the checkpoint is "
            "damaged or was converted to a type too narrow for it; load it again, or in another dtype"
        )


def _dtype(layer: LinearLayer) -> torch.dtype:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules as if no adapter were there: what wraps a base layer is looked through."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(module.get_base_layer(), name)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_modules(module.original_module, name)
    else:
        yield name, module
        for child_name, child in module.named_children():
            yield from _base_modules(child, f"{name}.{child_name}" if name else child_name)


def _essentials(model: nn.Module) -> dict[str, object]:
    config = getattr(model, "config", None)
    settings: dict[str, object] = {} if config is None or not hasattr(config, "to_dict") else config.to_dict()
    return {
        key: value
        for key, value in sorted(settings.items())
        if value is not None and any(fnmatch(key, pattern) for pattern in _ESSENTIALS)
    }


def _digest(tensor: Tensor) -> bytes:
    """SHA-256 of the values in row-major order, copied to the CPU in pieces."""
    hasher = hashlib.sha256()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        hasher.update(flat[start : start + _CHUNK_BYTES].cpu().numpy().data)
    return hasher.digest()
