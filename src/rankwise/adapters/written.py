"""A base weight that is written while training lasts, W + t s B A, and given back bit for bit.

W is copied before the first write, and every write starts from that copy: nothing is ever subtracted again, and one
pair always leaves the same bits, however the weight came to it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.layers import LinearLayer
from rankwise.adapters.state import FactorPair
from rankwise.errors import ModelError
from rankwise.linalg.precision import full_float32

__all__ = ["WrittenBase", "narrow_dtype", "unwritable", "written_back"]


class WrittenBase:
    """The base weight of one layer; the copy of it lies on the CPU.

    Args:
        layer: the adapted layer, whose weight `unwritable` says nothing against.
        who: the method that has it written, for messages.
        instead: its setting that never writes it ("lora-ga.offset: adapter").
    """

    def __init__(self, layer: AdaptedLayer, who: str, instead: str) -> None:
        self.name = layer.name
        self._layer, self._who, self._instead = layer, who, instead
        self._original = self.weight.detach().to("cpu", copy=True)
        self.dtype = self._original.dtype
        self._pair: tuple[FactorPair, float] | None = None
        self.written = self._closed = False

    @property
    def weight(self) -> Tensor:
        """The weight as the layer stores it."""
        weight = self._layer.base.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def original(self) -> Tensor:
        """W as it was found, on the CPU; empty after `close`."""
        return self._original

    @property
    def copy_bytes(self) -> int:
        """Bytes of that copy."""
        return self._original.nbytes

    def add(self, pair: FactorPair, times: float = 1.0) -> Float[Tensor, "rows columns"]:
        """W + times * scaling * lora_B lora_A, in full float32 (or wider), rounded to the dtype of W.

        Returns:
            The update before it was rounded, laid out as the weight is, on its device.

        Raises:
            ModelError: the weight was sharded in the meantime, or given back for good.
        """
        if self._closed:
            raise ModelError(
                f"{self.name}: the base weight was given back and is not written again: end the training before the "
                "session is closed"
            )
        self._pair = (pair, times * self._layer.scaling)
        return self._write_pair()

    def restore(self) -> None:
        """W, bit for bit; `reapply` brings the update back."""
        self._write(self._original)
        self.written = False

    def reapply(self) -> None:
        """The update of the last `add` again, the same bits as then; nothing after `close`."""
        if self._pair is not None:
            self._write_pair()

    def close(self) -> None:
        """W, bit for bit, for good; a weight that was never written is left alone."""
        if self.written:
            self.restore()
        self._pair, self._closed = None, True
        self._original = self._original.new_empty(0)

    def _write_pair(self) -> Tensor:
        assert self._pair is not None
        pair, scaling = self._pair
        device, dtype = self._layer.base.device, torch.promote_types(self.dtype, torch.float32)
        lora_A, lora_B = (factor.to(device, dtype) for factor in (pair.lora_A, pair.lora_B))
        with full_float32(), torch.autocast(device.type, enabled=False):
            update = scaling * (lora_B @ lora_A)
        if self._layer.base.kind == "conv1d":
            update = update.T
        value = self._original.to(device, dtype) + update
        self.written = True  # before it is: an interrupt between the two would leave it so after `close`
        self._write(value)
        return update

    def _write(self, value: Float[Tensor, "rows columns"]) -> None:
        weight = self.weight
        if _is_sharded(weight):
            raise ModelError(
                f"{self.name}: the base weight was sharded after {self._who} moved it, so that it cannot be given "
                f"back: use {self._instead}, which never writes it"
            )
        with torch.no_grad():
            weight.copy_(value)


@contextmanager
def written_back(weights: Sequence[WrittenBase]) -> Iterator[None]:
    """Inside, these weights are the untouched ones, bit for bit; one that is closed inside stays so."""
    written = [weight for weight in weights if weight.written]
    try:
        for weight in written:
            weight.restore()
        yield
    finally:
        for weight in written:
            weight.reapply()


def narrow_dtype(layers: Iterable[LinearLayer]) -> str:
    """The dtype of the first weight narrower than float32 ("bfloat16"), packed ones left out; empty if none."""
    weights = (layer.module.weight for layer in layers if not layer.quantized)
    dtypes = (weight.dtype for weight in weights if isinstance(weight, Tensor))
    return next((str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.itemsize < 4), "")


def unwritable(layer: AdaptedLayer) -> str | None:
    """Why the base weight cannot be written, in words that end "a weight that is"; None if it can."""
    weight = layer.base.module.weight
    assert isinstance(weight, Tensor)
    if layer.base.quantized or not weight.is_floating_point() or weight.element_size() < 2:
        return f"quantized ({layer.base.kind}, {weight.dtype})"
    return "sharded" if _is_sharded(weight) else None


def _is_sharded(weight: Tensor) -> bool:
    """FSDP2 (DTensor), FSDP1 (flattened) or ZeRO-3 (empty, with an id of its engine)."""
    return isinstance(weight, DTensor) or weight.dim() != 2 or hasattr(weight, "ds_id")
