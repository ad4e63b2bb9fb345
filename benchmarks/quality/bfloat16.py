"""Products of bfloat16 matrices on processors that have no instructions for them.

There torch multiplies bfloat16 about forty times as slowly as float32 (measured: 1.6 against 62 GF/s on an AVX2
processor). A product of two bfloat16 numbers is exact in float32, so the same matrices multiplied in float32 and
rounded once give what the instructions give, up to the order of the sum. Uniform r = 1, learning rate 6e-3, seed 0:
69.99 % / 1.0849 by this way, 70.00 % / 1.0857 by the instructions.
"""

import warnings

import torch
from torch import Tensor

__all__ = ["bfloat16_products"]

_kept: list[torch.library.Library] = []  # the kernels live as long as their library


def bfloat16_products() -> str:
    """Sees to it that bfloat16 products are fast; returns how they are computed: "native" or "float32"."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "native"
    if not _kept:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
            library.impl("mm", _mm, "CPU")
            library.impl("addmm", _addmm, "CPU")
        _kept.append(library)
    return "float32"


def _mm(a: Tensor, b: Tensor) -> Tensor:
    wide = _wide(a.dtype)
    out = torch.empty(a.shape[0], b.shape[1], dtype=wide)
    return torch.ops.aten.mm.out(a.to(wide), b.to(wide), out=out).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    wide = _wide(a.dtype)
    out = torch.empty(a.shape[0], b.shape[1], dtype=wide)
    torch.ops.aten.addmm.out(bias.to(wide), a.to(wide), b.to(wide), beta=beta, alpha=alpha, out=out)
    return out.to(a.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.bfloat16 else dtype
