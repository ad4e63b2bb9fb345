"""Float32 products in full float32, whatever speed-up the caller has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, no TensorFloat-32 and no bfloat16 in float32 products, and no autocast; the settings come back.

    The settings of the back ends are set, not torch's older one for all of them, which raises once anybody (transformers'
    `tf32=True`) has used the newer ones.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
