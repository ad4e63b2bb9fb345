"""The view of one linear layer of the base model: [out, in], whatever class holds it."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.ranks.shapes import LayerShape

__all__ = ["LayerKind", "LinearLayer", "view_linear"]

LayerKind = Literal["linear", "conv1d", "4bit", "8bit"]


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
        """
        stored = self.module.weight
        assert isinstance(stored, Tensor)
        if self.kind == "4bit":
            from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]

            dense: Tensor = dequantize_4bit(stored.data, stored.quant_state)  # type: ignore[attr-defined]
            return dense.detach().to(dtype)
        if self.kind == "8bit":
            raise NotImplementedError("8-bit: owned by adapters")
        weight = stored.detach()
        return (weight.T if self.kind == "conv1d" else weight).to(dtype)


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
