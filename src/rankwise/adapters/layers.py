"""The view of one linear layer of the base model: [out, in], whatever class holds it."""

import copy
import re
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.ranks.shapes import LayerShape

__all__ = ["LayerKind", "LinearLayer", "view_linear"]

LayerKind = Literal["linear", "conv1d", "4bit", "8bit"]
_EXPERT: Final = re.compile(r"(?:^|[._])experts?(?:[._]|$)")


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """One linear layer of the base model, read-only.

    Args:
        name: the full dotted name, relative to the base model.
        module: the module that computes it (nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit or Linear8bitLt).
        kind: which of these it is.
        shape: its size as [out, in], Conv1D transposed.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    shape: LayerShape

    @property
    def expert(self) -> bool:
        """Whether it lies in an expert by its name, so that routing decides which tokens it sees."""
        return bool(_EXPERT.search(self.name))

    @property
    def quantized(self) -> bool:
        """Whether the stored weight is packed and must be read through `weight`."""
        return self.kind in ("4bit", "8bit")

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.device

    def weight(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """W [out, in] in `dtype` on the layer's device: dequantized, transposed for Conv1D, detached.

        May share memory with the model when no conversion is needed: never write to it.

        Raises:
            ModelError: the weight is not in memory, or packed and bitsandbytes or its scales are missing.
        """
        stored = self.module.weight
        assert isinstance(stored, Tensor)
        if stored.device.type == "meta":
            raise ModelError(
                f"{self.name}: the weight is not in memory (meta device, as device_map leaves offloaded layers): load "
                "the model without disk or CPU offload"
            )
        if self.kind == "4bit":
            return _dense_4bit(self.name, stored, dtype)
        if self.kind == "8bit" and stored.dtype == torch.int8:
            return _dense_8bit(self.name, self.module, dtype)
        weight = stored.detach()
        return (weight.T if self.kind == "conv1d" else weight).to(dtype)


def _dense_4bit(name: str, stored: Tensor, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    state = getattr(stored, "quant_state", None)
    if state is None:
        raise ModelError(
            f"{name}: the 4-bit weight has no quantization state: bitsandbytes packs it when the model is moved to its "
            "device, so load the model with BitsAndBytesConfig(load_in_4bit=True) before using it"
        )
    try:
        from bitsandbytes.functional import dequantize_4bit
    except ImportError as error:
        raise ModelError(
            f"{name} is a bitsandbytes 4-bit layer and bitsandbytes cannot be imported ({error}): "
            "pip install 'rankwise[quantized]'"
        ) from error
    packed = stored.data
    if getattr(state, "packing_format_for_cpu", False):
        # The first evaluation on a CPU with AVX512-BF16 reorders the codes for its kernel; dequantize_4bit ignores that
        # (measured: values wrong by the size of the weights). The inverse edits the state: give it a copy.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        packed, state = _convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    dense: Tensor = dequantize_4bit(packed, state)
    return dense.detach().to(dtype)


def _dense_8bit(name: str, module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """W = CB * SCB / 127 a row: bitsandbytes' `int8_vectorwise_dequant`, without bitsandbytes."""
    stored = module.weight
    assert isinstance(stored, Tensor)
    # The scales lie on the weight until the first forward pass moves them to the layer's state.
    scales = getattr(stored, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is None:
        raise ModelError(
            f"{name}: the 8-bit weight has no row scales (SCB): bitsandbytes makes them when the model is moved to its "
            "device, so load the model with BitsAndBytesConfig(load_in_8bit=True) before using it"
        )
    rows = scales.detach().to(stored.device, torch.float32).reshape(-1, 1) / 127.0
    dense: Tensor = stored.data.to(torch.float32) * rows
    return dense.to(dtype)


def view_linear(name: str, module: nn.Module) -> LinearLayer | None:
    """The view of `module`, or None if it is not a linear layer that rankwise can adapt."""
    kind: LayerKind
    class_name = type(module).__name__
    if class_name == "Linear4bit":
        kind = "4bit"
    elif class_name == "Linear8bitLt":
        kind = "8bit"
    elif class_name == "Conv1D" and hasattr(module, "nf"):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return LinearLayer(name, module, "conv1d", LayerShape(name, weight.shape[1], weight.shape[0]))
    elif isinstance(module, nn.Linear):
        kind = "linear"
    else:
        return None
    assert isinstance(module, nn.Linear)
    return LinearLayer(name, module, kind, LayerShape(name, module.out_features, module.in_features))
