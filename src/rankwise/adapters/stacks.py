"""Layers of one size as one tensor: what is computed for each layer alone is computed for all of them at once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.perturbation import gathered

__all__ = ["LayerStack", "stack_layers", "stacked"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerStack:
    """Layers that share size, rank, scaling, device and dtype.

    The factors are those of the moment it is made: under FSDP2 the sharded ones, which the optimizer holds too. Tensors
    that are returned are copies, [n, ...] in the order of `names`, float32 or wider; sharded ones are gathered, which
    is a collective operation.

    Args:
        names: their full names.
        layers: the layers.
        lora_A: their [rank, in] factors.
        lora_B: their [out, rank] factors.
    """

    names: tuple[str, ...]
    layers: tuple[AdaptedLayer, ...]
    lora_A: tuple[nn.Parameter, ...]  # noqa: N815
    lora_B: tuple[nn.Parameter, ...]  # noqa: N815

    @property
    def scaling(self) -> float:
        """The multiplier that all of them share."""
        return self.layers[0].scaling

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.lora_A[0].device

    @property
    def in_features(self) -> int:
        """Columns of the weights."""
        return self.layers[0].base.shape.in_features

    def factors(self) -> tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]:
        """lora_A and lora_B."""
        return stacked(self.lora_A), stacked(self.lora_B)

    def gradients(self) -> tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]:
        """Their gradients; 0 where there is none."""
        A, B = (
            [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in side]
            for side in (self.lora_A, self.lora_B)
        )
        return stacked(A), stacked(B)

    def reached(self) -> "LayerStack":
        """Those of them of which a factor has a gradient."""
        return self.only(
            a.grad is not None or b.grad is not None for a, b in zip(self.lora_A, self.lora_B, strict=True)
        )

    def only(self, wanted: Iterable[bool]) -> "LayerStack":
        """Those of them that are wanted, one answer a layer."""
        kept = list(wanted)
        if all(kept):
            return self
        parts = (self.names, self.layers, self.lora_A, self.lora_B)
        names, layers, lora_A, lora_B = (
            tuple(value for value, keep in zip(part, kept, strict=True) if keep) for part in parts
        )
        return LayerStack(names, layers, lora_A, lora_B)  # type: ignore[arg-type]

    def of(self, values: Mapping[str, Tensor]) -> Float[Tensor, "n *k"]:
        """What is known of each layer by name."""
        return stacked([values[name] for name in self.names])


def stack_layers(layers: Mapping[str, AdaptedLayer], kinds: Mapping[str, int] | None = None) -> list[LayerStack]:
    """The layers in as few stacks as possible; what `kinds` tells apart is kept apart."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, layer in layers.items():
        A, B = layer.lora_A, layer.lora_B
        kind = (A.shape, B.shape, layer.scaling, A.device, A.dtype, B.dtype, (kinds or {}).get(name))
        found.setdefault(kind, []).append(name)
    return [
        LayerStack(
            tuple(names),
            tuple(layers[name] for name in names),
            tuple(layers[name].lora_A for name in names),
            tuple(layers[name].lora_B for name in names),
        )
        for names in found.values()
    ]


def stacked(tensors: Iterable[Tensor]) -> Float[Tensor, "n *k"]:
    """One tensor of them all, detached, float32 or wider."""
    whole = [gathered(tensor.detach()) for tensor in tensors]
    return torch.stack(whole).to(torch.promote_types(whole[0].dtype, torch.float32))
