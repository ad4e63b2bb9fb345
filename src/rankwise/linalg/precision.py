"""Float32 products in full float32, whatever speed-up the caller has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, no TensorFloat-32 and no bfloat16 in float32 products, and no autocast; the settings come back."""
    with _ieee(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _ieee() -> Iterator[None]:
    """Each back end is set by itself: torch's older setting for all of them raises once anybody used the newer ones.

    Transformers does, for `tf32=True`. Torch before 2.9 has the older setting alone.
    """
    owners: tuple[Any, Any] = (torch.backends.cuda, torch.backends.mkldnn)
    backends = [owner.matmul for owner in owners if hasattr(getattr(owner, "matmul", None), "fp32_precision")]
    if not backends:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
