"""Frozen pairs that are added to a layer, of a rank that grows while training goes on and shapes that stay.

    y = W x + scaling * (lora_B lora_A dropout(x) + B_acc A_acc x)

B_acc [out, capacity] and A_acc [capacity, in] are buffers filled from the left; what is not used yet is zero, so that
nothing is compiled again when a pair is added. The sum joins the output of lora_B, before PEFT multiplies by its
scaling, rounds and adds: it acts exactly where PEFT's own product acts (adapter active, not disabled, not merged; mixed
batches; autocast; quantized bases), and nowhere else. Dropout does not reach it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.state import FactorPair
from rankwise.errors import ModelError
from rankwise.linalg.factors import compress

__all__ = ["Boosters", "restart_pair"]


class Boosters(nn.Module):
    """The accumulated pairs of a model's layers, float32 or wider, on the layers' devices.

    The buffers are in no state dict: whoever owns them stores `pair`.

    Args:
        layers: the layers that will get pairs, by full name.
        capacities: by name, ranks that will be added in all; 0 leaves a layer alone. A layer gets room for at most
            min(in, out), beyond which its pairs are written as fewer ranks without loss.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], capacities: Mapping[str, int]) -> None:
        super().__init__()
        self._sites: dict[str, _Site] = {}
        for index, (name, layer) in enumerate(layers.items()):
            capacity = min(capacities.get(name, 0), layer.base.shape.max_rank)
            if capacity:
                self._sites[name] = _Site(self, index, layer, capacity)

    @property
    def capacities(self) -> dict[str, int]:
        """By layer, the ranks that there is room for."""
        return {name: site.capacity for name, site in self._sites.items()}

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers, used or not."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def rank(self, name: str) -> int:
        """The ranks that a layer has accumulated; 0 for one that has no room."""
        return self._sites[name].used if name in self._sites else 0

    def pair(self, name: str) -> FactorPair | None:
        """A copy on the CPU of what a layer has accumulated, in the buffers' dtype; None if nothing."""
        site = self._sites.get(name)
        if site is None or not site.used:
            return None
        rows, columns = site.rows[: site.used], site.columns[:, : site.used]
        return FactorPair(rows.cpu().clone(), columns.cpu().contiguous().clone())

    @torch.no_grad()
    def add(self, name: str, lora_A: Float[Tensor, "k in"], lora_B: Float[Tensor, "out k"]) -> None:
        """Adds lora_B @ lora_A, scaled like the layer's own pair.

        Raises:
            ModelError: the layer has no room, or the pair does not fit it.
        """
        site = self._sites.get(name)
        shape = None if site is None else (site.columns.shape[0], site.rows.shape[1])
        if site is None or (lora_B.shape[0], lora_A.shape[1]) != shape:
            raise ModelError(f"{name}: no room for a pair of {tuple(lora_B.shape)} and {tuple(lora_A.shape)}")
        site.add(lora_A, lora_B)

    def close(self) -> None:
        """Takes every hook off; called any number of times."""
        for site in self._sites.values():
            site.remove()


class _Site:
    """One layer: its hooks, and how far its buffers are filled."""

    def __init__(self, owner: Boosters, index: int, layer: AdaptedLayer, capacity: int) -> None:
        self.name, self.capacity, self.used = layer.name, capacity, 0
        self._owner, self._places = owner, (f"rows_{index}", f"columns_{index}")
        self.full_size = capacity == layer.base.shape.max_rank
        shape, like = layer.base.shape, layer.lora_A
        dtype = torch.promote_types(like.dtype, torch.float32)
        sizes = ((capacity, shape.in_features), (shape.out_features, capacity))
        for place, size in zip(self._places, sizes, strict=True):
            owner.register_buffer(place, torch.zeros(size, dtype=dtype, device=like.device), persistent=False)
        # Held from lora_dropout to lora_B of one pass. A recomputation of activation checkpointing may stop early, at
        # the last tensor that a backward pass needs: that is one of this hook's own, after the input was let go.
        self._seen: Tensor | None = None
        module: Any = layer.module
        self._handles = [
            module.lora_dropout[layer.adapter_name].register_forward_pre_hook(self._see),
            module.lora_B[layer.adapter_name].register_forward_hook(self._sum),
        ]

    @property
    def rows(self) -> Float[Tensor, "capacity in"]:
        found: Tensor = getattr(self._owner, self._places[0])
        return found

    @property
    def columns(self) -> Float[Tensor, "out capacity"]:
        found: Tensor = getattr(self._owner, self._places[1])
        return found

    def add(self, lora_A: Tensor, lora_B: Tensor) -> None:
        rows, columns = self.rows, self.columns
        new = (lora_A.to(rows.device, rows.dtype), lora_B.to(rows.device, rows.dtype))
        end = self.used + len(lora_A)
        if end <= self.capacity:
            rows[self.used : end], columns[:, self.used : end] = new
            self.used = end
            return
        if not self.full_size:
            raise ModelError(f"{self.name}: {end} ranks of boosters, and there is room for {self.capacity}")
        together = (torch.cat([rows[: self.used], new[0]]), torch.cat([columns[:, : self.used], new[1]], dim=1))
        fewer = compress(
            together[0].cpu(), together[1].cpu(), self.capacity
        )  # of the layer's own size: nothing is lost
        self.used = len(fewer.lora_A)
        rows.zero_(), columns.zero_()
        rows[: self.used], columns[:, : self.used] = fewer.lora_A, fewer.lora_B

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], None

    def _see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = args[0]

    def _sum(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self._seen = self._seen, None
        if x is None:
            raise ModelError(
                f"{self.name}: lora_B ran without the layer's lora_dropout before it, so that earlier boosters cannot "
                "be added: call the layer itself"
            )
        return output + functional.linear(functional.linear(x, self.rows.to(x.dtype)), self.columns.to(x.dtype))


@torch.no_grad()
def restart_pair(layer: AdaptedLayer, lora_A: Float[Tensor, "rank in"]) -> None:
    """A new lora_A, rounded to its storage dtype, and zero lora_B; sharded factors (FSDP2) are written by shards."""
    target = layer.lora_A
    value = lora_A.to(target.device, target.dtype)
    target.copy_(
        distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value
    )
    layer.lora_B.zero_()
