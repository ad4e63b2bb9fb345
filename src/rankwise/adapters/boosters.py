"""Frozen pairs that are added to a layer, of a rank that grows while training goes on and shapes that stay.

    y = W x + scaling * (lora_B lora_A dropout(x) + B_acc A_acc x)

Dropout does not reach the sum. In `adapter` B_acc [out, capacity] and A_acc [capacity, in] are buffers filled from the
left; what is not used yet is zero, so that nothing is compiled again when a pair is added. The sum joins the output of
lora_B, before PEFT multiplies by its scaling, rounds and adds: it acts exactly where PEFT's own product acts (adapter
active, not disabled, not merged; mixed batches; autocast; quantized bases), and nowhere else.

In `base` the pairs are kept on the CPU and their product is written into W itself, which `close` gives back. Then they
act wherever W does: with the adapter disabled too, and rounded wherever W is (16-bit autocast).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import CONTAINER
from rankwise.adapters.state import FactorPair
from rankwise.adapters.written import WrittenBase, written_back
from rankwise.errors import ModelError
from rankwise.linalg.factors import compress

__all__ = ["Boosters", "live_boosters", "restart_pair"]


def live_boosters(model: nn.Module) -> "Boosters | None":
    """The boosters of a model whose schedule keeps them beside its gates, None if there are none."""
    beside: nn.Module | None = getattr(model, CONTAINER, None)
    return None if beside is None else next((one for one in beside.children() if isinstance(one, Boosters)), None)


class Boosters(nn.Module):
    """The accumulated pairs of a model's layers, float32 or wider, on the layers' devices (`base`: on the CPU).

    The buffers are in no state dict: whoever owns them stores `pair`.

    Args:
        layers: the layers that will get pairs, by full name.
        capacities: by name, ranks that will be added in all; 0 leaves a layer alone. A layer gets room for at most
            min(in, out), beyond which its pairs are written as fewer ranks without loss.
        place: where they act: beside the `adapter`, or in the `base` weights, of which `unwritable` must have nothing
            to say.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLayer],
        capacities: Mapping[str, int],
        place: Literal["adapter", "base"] = "adapter",
    ) -> None:
        super().__init__()
        self._sites: dict[str, _Hooked | _Written] = {}
        for index, (name, layer) in enumerate(layers.items()):
            capacity = min(capacities.get(name, 0), layer.base.shape.max_rank)
            if capacity:
                made = _Hooked(self, index, layer, capacity) if place == "adapter" else _Written(layer, capacity)
                self._sites[name] = made

    @property
    def capacities(self) -> dict[str, int]:
        """By layer, the ranks that there is room for."""
        return {name: site.capacity for name, site in self._sites.items()}

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pairs once they have their full size."""
        return sum(site.memory_bytes for site in self._sites.values())

    def rank(self, name: str) -> int:
        """The ranks that a layer has accumulated; 0 for one that has no room."""
        return self._sites[name].used if name in self._sites else 0

    def pair(self, name: str) -> FactorPair | None:
        """A copy on the CPU of what a layer has accumulated, in the dtype that it is kept in; None if nothing."""
        site = self._sites.get(name)
        return None if site is None or not site.used else site.pair()

    @torch.no_grad()
    def add(self, name: str, lora_A: Float[Tensor, "k in"], lora_B: Float[Tensor, "out k"]) -> None:
        """Adds lora_B @ lora_A, scaled like the layer's own pair.

        Raises:
            ModelError: the layer has no room, or the pair does not fit it.
        """
        site = self._sites.get(name)
        if site is None or (lora_B.shape[0], lora_A.shape[1]) != site.size:
            raise ModelError(f"{name}: no room for a pair of {tuple(lora_B.shape)} and {tuple(lora_A.shape)}")
        site.add(lora_A, lora_B)

    def close(self) -> None:
        """Takes every hook off and gives written weights back; called any number of times."""
        with ExitStack() as stack:  # all of them, whatever goes wrong with one
            for site in self._sites.values():
                stack.callback(site.remove)

    @property
    def base_copy_bytes(self) -> int:
        """Bytes of the base weights as they were found, on the CPU; 0 under `adapter`."""
        return sum(site.base.copy_bytes for site in self._written())

    def rewrite(self) -> None:
        """Writes the base weights again, where they are now: a product on another device has other bits."""
        for site in self._written():
            site.base.reapply()

    def write_seconds(self) -> dict[str, float]:
        """By layer, what adding to its base weight takes, timed once for each size; empty under `adapter`.

        The weights are as before afterwards.
        """
        timed: dict[tuple[int, int], float] = {}
        for site in self._written():
            if site.size not in timed:
                timed[site.size] = site.write_seconds()
        return {site.name: timed[site.size] for site in self._written()}

    def _written(self) -> list["_Written"]:
        return [site for site in self._sites.values() if isinstance(site, _Written)]

    @contextmanager
    def base_as_found(self) -> Iterator[None]:
        """Inside, the base weights are the untouched ones, bit for bit; under `adapter` they always are."""
        with written_back([site.base for site in self._written()]):
            yield


class _Site:
    """The pairs of one layer."""

    def __init__(self, layer: AdaptedLayer, capacity: int) -> None:
        shape = layer.base.shape
        self.name, self.capacity, self.used = layer.name, capacity, 0
        self.size = (shape.out_features, shape.in_features)
        self.full_size = capacity == shape.max_rank
        self.dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pairs at their full size."""
        return self.capacity * sum(self.size) * self.dtype.itemsize

    def _together(self, mine: FactorPair, lora_A: Tensor, lora_B: Tensor) -> FactorPair:
        """One pair of both, on the CPU.

        Raises:
            ModelError: there is no room for it.
        """
        both = FactorPair(torch.cat([mine.lora_A, lora_A.cpu()]), torch.cat([mine.lora_B, lora_B.cpu()], dim=1))
        ranks = len(both.lora_A)
        if ranks <= self.capacity:
            return both
        if not self.full_size:
            raise ModelError(f"{self.name}: {ranks} ranks of boosters, and there is room for {self.capacity}")
        fewer = compress(both.lora_A, both.lora_B, self.capacity)  # of the layer's own size: nothing is lost
        return FactorPair(fewer.lora_A, fewer.lora_B)


class _Written(_Site):
    """One layer whose base weight holds its pairs."""

    def __init__(self, layer: AdaptedLayer, capacity: int) -> None:
        super().__init__(layer, capacity)
        self.base = WrittenBase(layer, "xgblora", "xgblora.accumulate: factors")
        self._pair = FactorPair(
            torch.zeros(0, self.size[1], dtype=self.dtype), torch.zeros(self.size[0], 0, dtype=self.dtype)
        )

    def pair(self) -> FactorPair:
        return FactorPair(self._pair.lora_A.clone(), self._pair.lora_B.clone())

    def add(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self._pair = self._together(self._pair, lora_A.to(self.dtype), lora_B.to(self.dtype))
        self.used = len(self._pair.lora_A)
        self.base.add(self._pair)

    def write_seconds(self) -> float:
        begun = time.perf_counter()
        if self.used:
            self.base.reapply()
        else:  # of nothing: a negative zero in W would become a positive one, which is taken back below
            self.base.add(FactorPair(torch.zeros(1, self.size[1]), torch.zeros(self.size[0], 1)))
        if self.base.weight.device.type == "cuda":
            torch.cuda.synchronize(self.base.weight.device)
        seconds = time.perf_counter() - begun
        if not self.used:
            self.base.restore()
        return seconds

    def remove(self) -> None:
        self.base.close()


class _Hooked(_Site):
    """One layer: its hooks, and how far its buffers are filled."""

    def __init__(self, owner: Boosters, index: int, layer: AdaptedLayer, capacity: int) -> None:
        super().__init__(layer, capacity)
        self._owner, self._places = owner, (f"rows_{index}", f"columns_{index}")
        shape, like = layer.base.shape, layer.lora_A
        sizes = ((capacity, shape.in_features), (shape.out_features, capacity))
        for place, size in zip(self._places, sizes, strict=True):
            owner.register_buffer(place, torch.zeros(size, dtype=self.dtype, device=like.device), persistent=False)
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

    def pair(self) -> FactorPair:
        rows, columns = self.rows[: self.used], self.columns[:, : self.used]
        return FactorPair(rows.cpu().clone(), columns.cpu().contiguous().clone())

    def add(self, lora_A: Tensor, lora_B: Tensor) -> None:
        rows, columns = self.rows, self.columns
        new = (lora_A.to(rows.device, rows.dtype), lora_B.to(rows.device, rows.dtype))
        end = self.used + len(lora_A)
        if end <= self.capacity:
            rows[self.used : end], columns[:, self.used : end] = new
            self.used = end
            return
        both = self._together(self.pair(), *new)
        self.used = len(both.lora_A)
        rows.zero_(), columns.zero_()
        rows[: self.used], columns[:, : self.used] = both.lora_A, both.lora_B

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
