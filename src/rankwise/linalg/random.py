"""Random draws that depend on what they are for, never on the order in which they are made."""

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["derived_seed", "generator", "kaiming_uniform"]


def derived_seed(seed: int, purpose: str, *names: str | int) -> int:
    """A 63-bit seed that is a stable hash of its arguments, equal on every machine and in every process.

    Args:
        seed: the run's seed, any integer.
        purpose: what the draw is for, for example `"lora_A"`.
        names: what tells this draw from others of the same purpose: a layer's name, a round, a step.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join([str(seed), purpose, *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose; the global random state is neither read nor moved."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *names))


def kaiming_uniform(rows: int, in_features: int, source: torch.Generator) -> Float[Tensor, "rows in"]:
    """Draws U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's Kaiming-uniform with a = sqrt(5).

    Args:
        rows: rank of the factor, >= 1.
        in_features: columns, >= 1.
        source: the CPU generator of this draw.

    Returns:
        float32 on the CPU.

    Source: He et al., arXiv 1502.01852, equation 14 with the gain sqrt(2 / (1 + 5)); PEFT's `reset_lora_parameters`.
    """
    bound = 1.0 / math.sqrt(in_features)
    drawn = torch.empty(rows, in_features)
    for row in drawn:  # row by row, so that fewer rows are the first of more
        row.uniform_(-bound, bound, generator=source)
    return drawn
