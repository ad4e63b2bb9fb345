"""Standard normal values from a seed, fast enough to draw a weight's worth of them twice in a training step."""

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["NormalStream"]

_SPAN = np.float32(2.0**32)
_TURN = np.float32(2.0 * math.pi / 2.0**32)
_TO_NATURAL = np.float32(2.0 * math.log(2.0))


class NormalStream:
    """Values of N(0, 1) in one order for each seed, without touching any global random state.

    On the CPU they are Box and Muller's transform of SFC64 words, computed by numpy: 2.6 ns a value on one thread where
    torch's own `normal_` takes 3.8, and tails up to 6.7 standard deviations instead of 5.8. Elsewhere they come from a
    generator of the device, whose values may differ between models of accelerators. The same seed and the same sizes
    of calls give the same bits on one kind of processor.

    Args:
        seed: in [0, 2**63), normally a `derived_seed`.
        device: where the values are wanted.

    Source: Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._words = np.random.SFC64(seed) if device.type == "cpu" else None
        self._device = None if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        self._uniform = np.empty(0, dtype=np.float32)

    def fill(self, out: Float[Tensor, "..."]) -> None:
        """Overwrites `out` (float32, contiguous) with the next values; blocks of some 2**16 stay in the cache."""
        if self._words is None:
            out.normal_(generator=self._device)
        else:
            self._box_muller(self._words, out.view(-1).numpy())

    def _box_muller(self, words: np.random.SFC64, out: npt.NDArray[np.float32]) -> None:
        """R cos(t) in the first half and R sin(t) in the second, R = sqrt(-2 ln u) and t = 2 pi v."""
        pairs = (out.size + 1) // 2
        if self._uniform.size < 2 * pairs:
            self._uniform = np.empty(2 * pairs, dtype=np.float32)
        radius, angle = self._uniform[:pairs], self._uniform[pairs : 2 * pairs]
        raw = words.random_raw(pairs)
        np.copyto(radius, raw.view(np.uint32)[:pairs], casting="unsafe")
        np.copyto(angle, raw.view(np.int32)[pairs:], casting="unsafe")
        radius += np.float32(0.5)  # never 0, and lost in rounding where it would not matter
        np.divide(_SPAN, radius, out=radius)  # 1 / u, u in (0, 1]
        np.log2(radius, out=radius)
        radius *= _TO_NATURAL
        np.sqrt(radius, out=radius)
        angle *= _TURN  # in [-pi, pi]
        first, second = out[:pairs], out[pairs:]
        np.cos(angle, out=first)
        np.sin(angle[: second.size], out=second)
        first *= radius
        second *= radius[: second.size]
