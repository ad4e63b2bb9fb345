"""A frozen pair whose update is subtracted again, so that an adapter with a start of its own computes the base model.

    y = W x + s (B A x - B0 A0 x)          (lora_ga.md 3.3)

`adapter` takes B0 A0 x off the output of lora_B, before PEFT multiplies by s, rounds and adds: so it acts exactly where
PEFT's own product acts (adapter active, not disabled, not merged; mixed batches; autocast; quantized bases), reads the
same s, and while B A = B0 A0 without dropout the difference is exactly zero in every dtype. x is what PEFT hands to
lora_dropout, cast as lora_A wants it. `base` writes W - s B0 A0 into the base weight and gives W back on close; on a
base narrower than float32 the rounding of that sum is measured, because no adapter can hold it.

The factors alone are then another function, so merging is refused, and `save_pretrained` writes the pairs beside them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.adapters.attach import AdaptedLayer, peft_model_of
from rankwise.adapters.state import FactorPair, FoldState
from rankwise.adapters.unfolded import Unfolded
from rankwise.adapters.written import WrittenBase, unwritable, written_back
from rankwise.errors import ArtifactError, ConfigError, ModelError

__all__ = ["LiveOffset", "OffsetSite", "live_offset"]

OffsetSite = Literal["adapter", "base"]


def live_offset(model: nn.Module, adapter_name: str = "default") -> "LiveOffset | None":
    """The offset that is in place on a PEFT model beside this adapter, None if there is none."""
    shadow = getattr(model.__dict__.get("save_pretrained"), "__self__", None)
    found = getattr(shadow, "owner", None)
    return found if isinstance(found, LiveOffset) and found.adapter_name == adapter_name else None


class LiveOffset:
    """The offset of a model in training; put in place on construction, taken off by `close`.

    The pairs are plain tensors of this object: no parameter or buffer of the model, in no state dict, never trained.
    They stay float32; a copy in the dtype and on the device of lora_A's input is made where they differ.

    Args:
        model: the attached model.
        layers: its adapted layers by full name.
        pairs: by layer, the pair to subtract, scaled like the layer's own; layers without one are left alone.
        place: `adapter` (the base weights are never written) or `base` (they are, in float32, and restored).

    Raises:
        ArtifactError: a pair for a layer that is not there, or of another size.
        ConfigError: `base` on weights that are quantized or sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLayer],
        pairs: Mapping[str, FactorPair],
        place: OffsetSite,
    ) -> None:
        faults = [fault for name, pair in pairs.items() if (fault := _misfit(name, pair, layers.get(name)))]
        if faults:
            raise ArtifactError("\n".join(faults))
        self.pairs: dict[str, FactorPair] = {
            name: FactorPair(_frozen(pair.lora_A), _frozen(pair.lora_B)) for name, pair in pairs.items()
        }
        self.place = place
        self.adapter_name = next((layer.adapter_name for layer in layers.values()), "default")
        self._model = peft_model_of(model)
        self._undo: list[Callable[[], None]] = []
        self._moved: list[_MovedBase] = []
        live = {name: pair for name, pair in self.pairs.items() if bool(pair.lora_A.any()) and bool(pair.lora_B.any())}
        if place == "base":
            _refuse_base([layers[name] for name in live])
            self._moved = [_MovedBase(layers[name], pair) for name, pair in live.items()]
            self._undo += [moved.base.close for moved in self._moved]
        else:
            self._undo += [_Subtraction(layers[name], pair).remove for name, pair in live.items()]
        # PEFT would merge or save s B A alone, or drop the adapter and leave a moved base behind.
        shadows = Unfolded(
            self._model,
            [layers[name] for name in self.pairs],
            self.adapter_name,
            lambda: FoldState(offsets=self.pairs),
            "an offset (lora-ga)",
            owner=self,
        )
        self._undo.append(shadows.close)

    @property
    def cast_errors(self) -> dict[str, float]:
        """By layer, ||W' - W + s B0 A0||_F of the weight W' that `base` wrote; only layers narrower than float32."""
        return {moved.name: moved.cast_error for moved in self._moved if moved.cast_error is not None}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: the largest rounding of a base weight that was written."""
        shares = {m.name: (m.cast_error / m.start_norm, m.dtype) for m in self._moved if m.cast_error is not None}
        if not shares:
            return ()
        worst = max(shares, key=lambda name: shares[name][0])
        share, dtype = shares[worst]
        return (
            f"lora-ga.offset: base: rounding W - s B0 A0 to {str(dtype).removeprefix('torch.')} changed the weights by "
            f"up to {share:.2g} of the start's update ({worst}); training sees that change and an exported adapter "
            "cannot hold it: offset: adapter makes none",
        )

    def close(self) -> None:
        """Takes every hook off, gives the base its own weights back, and lets the adapter be merged again."""
        while self._undo:
            self._undo.pop()()
        self._moved = []

    @contextmanager
    def base_as_found(self) -> Iterator[None]:
        """Inside, the base weights are the untouched ones, bit for bit; under `adapter` they always are."""
        with written_back([moved.base for moved in self._moved]):
            yield


class _Subtraction:
    """The hooks of one layer in `adapter` mode."""

    def __init__(self, layer: AdaptedLayer, pair: FactorPair) -> None:
        self._name = layer.name
        self._pair = (pair.lora_A, pair.lora_B)
        self._cast: tuple[Tensor, Tensor] | None = None
        # Weak, because a recomputation of activation checkpointing may stop between the two hooks, and whatever was
        # left here would hold that block's activations until the next forward pass. PEFT's frame holds the input.
        self._seen: weakref.ref[Tensor] | None = None
        module: Any = layer.module
        self._handles = [
            module.lora_dropout[layer.adapter_name].register_forward_pre_hook(self._see),
            module.lora_B[layer.adapter_name].register_forward_hook(self._subtract),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = weakref.ref(args[0])

    def _subtract(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        x = None if self._seen is None else self._seen()
        self._seen = None
        if x is None:
            raise ModelError(
                f"{self._name}: lora_B ran without the layer's lora_dropout before it, so that the start of lora-ga "
                "cannot be subtracted: call the layer itself, or train with lora-ga.offset: base"
            )
        lora_A, lora_B = self._pair_for(x)
        return output - functional.linear(functional.linear(x, lora_A), lora_B)

    def _pair_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pair on the device and in the dtype of x, as lora_A and lora_B are."""
        cast = self._pair if self._cast is None else self._cast
        if cast[0].device != x.device or cast[0].dtype != x.dtype:
            cast = (self._pair[0].to(x.device, x.dtype), self._pair[1].to(x.device, x.dtype))
            self._cast = cast
        return cast


class _MovedBase:
    """One base weight in `base` mode: W - s B0 A0, and W to go back to."""

    def __init__(self, layer: AdaptedLayer, pair: FactorPair) -> None:
        self.name = layer.name
        self.base = WrittenBase(layer, "lora-ga", "lora-ga.offset: adapter")
        self.dtype = self.base.dtype
        self.cast_error: float | None = None
        self.start_norm = 0.0
        update = self.base.add(pair, -1.0)
        if self.dtype.itemsize < 4:
            moved = self.base.weight.detach().to(update.dtype) - self.base.original.to(update.device, update.dtype)
            self.cast_error = float(torch.linalg.vector_norm(moved - update))
            self.start_norm = float(torch.linalg.vector_norm(update))


def _frozen(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.promote_types(factor.dtype, torch.float32), copy=True).contiguous()


def _misfit(name: str, pair: FactorPair, layer: AdaptedLayer | None) -> str | None:
    if layer is None:
        return f"{name}: there is an offset for this layer, and the model has no adapter on it: give the run's own plan"
    found = (pair.lora_B.shape[0], pair.lora_A.shape[1])
    shape = layer.base.shape
    if found != (shape.out_features, shape.in_features):
        return (
            f"{name}: the offset is for a layer of [{found[0]}, {found[1]}], this one has "
            f"[{shape.out_features}, {shape.in_features}]: give the model that the run was started on"
        )
    return None


def _refuse_base(layers: list[AdaptedLayer]) -> None:
    faults = [
        f"{layer.name}: lora-ga.offset: base would write a weight that is {why}"
        for layer in layers
        if (why := unwritable(layer)) is not None
    ]
    if faults:
        more = f" (and {len(faults) - 1} more layers)" if len(faults) > 1 else ""
        raise ConfigError(f"{faults[0]}{more}; use lora-ga.offset: adapter, which leaves the base weights alone")
