"""Perturbations of an adapted layer that live in its forward and backward pass alone: no weight is ever written.

A `PerturbedLayer` evaluates its base layer at W + E, where E is random (`RowNoise`: it is never stored for the backward
pass, which draws it again from its seed) or a product of two thin factors (`LowRank`). It acts while it is switched on
and the layer trains with its adapter; that is decided by an explicit switch and not by whether gradients are recorded,
because reentrant checkpointing runs the first forward pass without.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.layers import LinearLayer
from rankwise.errors import ModelError
from rankwise.linalg.normal import NormalStream

__all__ = [
    "LowRank",
    "PerturbedLayer",
    "RowNoise",
    "Scratch",
    "base_products",
    "gathered",
    "perturbed_layers",
    "weight_row_squares",
    "without_autocast",
]

_CACHE_BLOCK = 2**16
"""Noise values drawn at once on the CPU, so that they stay in its cache."""
_WIDE_BLOCK = 2**24
"""Values widened or drawn at once elsewhere, where few launches count and whole float32 copies do not fit."""
_KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class RowNoise:
    """E [out, in] with independent E_ij ~ N(0, std_i^2).

    Args:
        seed: of the draw, different for every layer and step. The same seed is the same E, in the forward pass, the
            backward pass and a recomputation.
        std: [out], float32 or wider, on the layer's device.
    """

    seed: int
    std: Float[Tensor, " out"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """E = left @ right; both are constants, float32 or wider, on the layer's device."""

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]


class PerturbedLayer:
    """One layer that can be evaluated at W + E: `by` switches it, None is off; `close` leaves it as it was found.

    Where the base layer is a plain floating-point one its own product is perturbed (`way` is "swap"). Other base layers
    (4-bit, 8-bit, classes with a forward of their own) get x E^T added to their output ("add"), which for noise costs a
    second product. x is the input of the layer, before dropout; the gradient through E reaches it.

    Args:
        layer: whose base weight is perturbed.
        scratch: shared by all layers.

    Raises:
        ModelError: the base weight is trained, so that its gradient would be lost.
    """

    way: Literal["swap", "add"]

    def __init__(self, layer: AdaptedLayer, scratch: "Scratch") -> None:
        self.by: RowNoise | LowRank | None = None
        self.acted = False
        """Whether a forward pass was perturbed since this was last set to False."""
        self._layer, self._scratch = layer, scratch
        self._base: Any = layer.base.module
        if self._base.weight.requires_grad:
            raise ModelError(
                f"{layer.name}: its base weight is trained, and a perturbed weight passes no gradient to it: freeze "
                "it, or leave the layer out of target_modules"
            )
        self.way = "swap" if _plain(layer.base) else "add"
        if self.way == "swap":
            self._plain_forward = self._base.forward
            self._base.forward = self._forward
        else:
            self._handle = self._base.register_forward_hook(self._add)

    def close(self) -> None:
        """Takes the perturbation off the layer, for good."""
        self.by = None
        if self.way == "add":
            self._handle.remove()
        elif self._base.__dict__.get("forward") == self._forward:  # else somebody wrapped it, and passes through it
            del self._base.forward

    # torch.compile leaves these out: what acts is another object at every step, and would be traced anew each time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, x: Tensor) -> Tensor:
        by, base = self.by, self._base
        if by is None or not _acts(self._layer):
            return self._plain(x)
        self.acted = True
        if isinstance(by, RowNoise):
            return self._noisy(x, base.weight, base.bias, by)
        if torch.is_autocast_enabled(x.device.type) or not x.dtype == base.weight.dtype == by.left.dtype:
            output = self._plain(x)
            return output + _term(x, by).to(output.dtype)
        weight = base.weight.T if self._layer.base.kind == "conv1d" else base.weight
        return _with_bias(
            lambda bias: _LowRankLinear.apply(x, weight, bias, by.left, by.right),  # type: ignore[no-untyped-call]
            base.bias,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        by = self.by
        if by is None or not _acts(self._layer):
            return None
        self.acted = True
        term = _term(args[0], by) if isinstance(by, LowRank) else self._noisy(args[0], None, None, by)
        return output + term.to(output.dtype)

    def _plain(self, x: Tensor) -> Tensor:
        output: Tensor = self._plain_forward(x)
        return output

    def _noisy(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, noise: RowNoise) -> Tensor:
        base = self._layer.base
        dtype = x.dtype if weight is None else weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        shape = (base.shape.out_features, base.shape.in_features)
        draw = _Draw(base.name, noise.seed, shape, base.kind == "conv1d", dtype, self._scratch)
        return _with_bias(
            lambda fixed: _NoisyLinear.apply(x, weight, fixed, noise.std, draw),  # type: ignore[no-untyped-call]
            bias,
        )


def perturbed_layers(layers: Mapping[str, AdaptedLayer], scratch: "Scratch") -> dict[str, PerturbedLayer]:
    """Every layer made perturbable, or none of them.

    Raises:
        ModelError: a base weight is trained.
    """
    done: dict[str, PerturbedLayer] = {}
    try:
        for name, layer in layers.items():
            done[name] = PerturbedLayer(layer, scratch)
    except BaseException:
        for one in done.values():
            one.close()
        raise
    return done


_Key = tuple[str, int, torch.dtype]
"""A layer, the seed of its noise, and the dtype."""


class Scratch:
    """Memory in which W + E is written: what was written last stays, as far as 128 MiB go, until `forget`.

    A layer that meets its E again soon (the last layers of a forward pass are the first of the backward pass, and
    checkpointing computes each block again just before) then needs no new draw. On accelerators nothing is kept: their
    allocator reuses memory and knows about streams.
    """

    def __init__(self) -> None:
        self._arena: Tensor | None = None
        self._next = 0
        self._kept: dict[_Key, tuple[int, int, Tensor]] = {}
        self._largest = 0

    @property
    def memory_bytes(self) -> int:
        """What was held at once, at most; on accelerators the largest W + E."""
        return self._largest

    def written(
        self,
        key: "_Key",
        shape: tuple[int, int],
        device: torch.device,
        write: Callable[[Tensor], None],
    ) -> Float[Tensor, "rows columns"]:
        """What `write` put into a tensor of this shape, now or the last time; valid until the next call."""
        dtype = key[-1]
        if device.type != "cpu":
            target = torch.empty(shape, dtype=dtype, device=device)
            self._largest = max(self._largest, target.nbytes)
            write(target)
            return target
        if key in self._kept:
            return self._kept[key][-1]
        values = math.prod(shape)
        size = -(-values * dtype.itemsize // 64) * 64
        if self._arena is None or self._arena.numel() < size:
            self.release()
            self._arena = torch.empty(max(size, _KEPT_BYTES), dtype=torch.uint8)
            self._largest = self._arena.nbytes
        start = self._next if self._next + size <= self._arena.numel() else 0
        self._next = start + size
        self._kept = {old: e for old, e in self._kept.items() if e[1] <= start or e[0] >= self._next}
        target = self._arena[start : self._next].view(dtype)[:values].view(shape)
        write(target)
        self._kept[key] = (start, self._next, target)
        return target

    def forget(self) -> None:
        """What was written is of no use any more: the weights move, or the step is over."""
        self._kept = {}

    def release(self) -> None:
        """Gives the memory back."""
        self._kept, self._arena, self._next = {}, None, 0


@dataclass(frozen=True, slots=True, eq=False)
class _Draw:
    """What is needed to draw E again; a transposed weight (Conv1D) lies as [in, out]."""

    name: str
    seed: int
    shape: tuple[int, int]
    transposed: bool
    dtype: torch.dtype
    scratch: Scratch

    def around(self, weight: Tensor | None, std: Tensor) -> Float[Tensor, "out in"]:
        """W + E (E alone without W) in `dtype`, summed in float32 or wider; valid until the next call."""
        shape = (self.shape[1], self.shape[0]) if self.transposed else self.shape
        found = self.scratch.written(
            (self.name, self.seed, self.dtype), shape, std.device, lambda target: self._write(target, weight, std)
        )
        return found.T if self.transposed else found

    def _write(self, target: Tensor, weight: Tensor | None, std: Tensor) -> None:
        wide = torch.promote_types(torch.promote_types(self.dtype, std.dtype), torch.float32)
        spread = std.to(wide).unsqueeze(0 if self.transposed else 1)
        stream = NormalStream(self.seed, std.device)
        step = max(1, (_CACHE_BLOCK if std.device.type == "cpu" else _WIDE_BLOCK) // target.shape[1])
        for start in range(0, len(target), step):
            block = target[start : start + step]
            drawn = block if self.dtype == torch.float32 else torch.empty(block.shape, device=std.device)
            stream.fill(drawn)
            mean = spread.new_zeros(()) if weight is None else weight[start : start + step].to(wide)
            each = spread if self.transposed else spread[start : start + step]
            if self.dtype == wide:
                torch.addcmul(mean, drawn.to(wide), each, out=block)
            else:
                block.copy_(torch.addcmul(mean, drawn.to(wide), each))


class _NoisyLinear(torch.autograd.Function):
    """x (W + E)^T + bias; the gradient of x is g (W + E). Saved are the seed and the standard deviations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, std: Tensor, draw: _Draw) -> Tensor:
        ctx.save_for_backward(weight, std)
        ctx.draw, ctx.x_dtype = draw, x.dtype
        with without_autocast(x.device.type):
            dense = draw.around(weight, std)
            return functional.linear(x.to(draw.dtype), dense, None if bias is None else bias.to(draw.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        with without_autocast(gradient.device.type):
            dense = ctx.draw.around(*ctx.saved_tensors)
            return (gradient.to(ctx.draw.dtype) @ dense).to(ctx.x_dtype), None, None, None, None


class _LowRankLinear(torch.autograd.Function):
    """x (W + L R)^T + bias; the gradient of x is g (W + L R). Both thin products are added in place, without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(weight, left, right)
        output = functional.linear(x, weight, bias)
        output.view(-1, len(left)).addmm_(functional.linear(x, right).view(-1, len(right)), left.T)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight, left, right = ctx.saved_tensors
        found = gradient @ weight
        found.view(-1, right.shape[1]).addmm_((gradient @ left).view(-1, len(right)), right)
        return found, None, None, None, None


def _term(x: Tensor, by: LowRank) -> Tensor:
    """X (L R)^T; x is cast to the factors' dtype as PEFT casts it for lora_A, unless autocast decides."""
    x = x if torch.is_autocast_enabled(x.device.type) else x.to(by.right.dtype)
    return functional.linear(functional.linear(x, by.right), by.left)


def _with_bias(linear: Callable[[Tensor | None], Any], bias: Tensor | None) -> Tensor:
    """The bias within the product, or after it where it is trained."""
    if bias is None or not bias.requires_grad:
        output: Tensor = linear(bias)
        return output
    output = linear(None)
    return output + bias.to(output.dtype)


def weight_row_squares(layer: AdaptedLayer) -> Float[Tensor, " out"]:
    """|W_i|^2 of every row (output channel) of the base weight, summed in float64, returned in float32 or wider.

    A packed weight is dequantized once; nothing of it is kept.

    Raises:
        ModelError: the weight is sharded already, or not in memory.
    """
    stored = layer.base.module.weight
    assert isinstance(stored, Tensor)
    if isinstance(stored, DTensor) or stored.dim() != 2 or hasattr(stored, "ds_id"):
        raise ModelError(
            f"{layer.name}: the norms of the base weight's rows are needed, and the weight is sharded already: attach "
            "before fully_shard or the engine takes the model"
        )
    weight = layer.base.weight(torch.float32 if layer.base.quantized else stored.dtype)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has no float64
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    return norms.square().to(torch.promote_types(weight.dtype, torch.float32))


def base_products(layer: AdaptedLayer, rows: Float[Tensor, "k in"]) -> Float[Tensor, "out k"]:
    """W rows^T without a dequantized or widened copy of W: packed layers compute it with their own kernel.

    Under FSDP2 a collective operation: every process multiplies its own part of W, and all get the whole.
    """
    module: Any = layer.base.module
    if layer.base.quantized:
        output: Tensor = module(rows)
        return (output if module.bias is None else output - module.bias.detach()).T.to(rows.dtype)
    weight: Tensor = module.weight.detach()
    weight = weight.T if layer.base.kind == "conv1d" else weight
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        everywhere = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return gathered(weight.to(rows.dtype) @ everywhere.T)
    if weight.dtype == rows.dtype:
        return functional.linear(rows, weight).T
    step = max(1, _WIDE_BLOCK // weight.shape[1])
    blocks = (weight[start : start + step] for start in range(0, len(weight), step))
    return torch.cat([block.to(rows.dtype) @ rows.T for block in blocks])


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(base: LinearLayer) -> bool:
    """Whether the layer's forward is x W^T + bias and nothing else, with a weight that can be read."""
    module = base.module
    weight = module.weight
    assert isinstance(weight, Tensor)
    own = base.kind == "conv1d" or (base.kind == "linear" and type(module).forward is nn.Linear.forward)
    return own and "forward" not in module.__dict__ and weight.is_floating_point() and weight.element_size() >= 2


def _acts(layer: AdaptedLayer) -> bool:
    """Whether the layer computes with this adapter, in training mode."""
    module: Any = layer.module
    switched_on = not module.disable_adapters and not module.merged and layer.adapter_name in module.active_adapters
    return bool(module.training and switched_on)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Inside, tensors are computed with as they are, also where autocast is on around it."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
