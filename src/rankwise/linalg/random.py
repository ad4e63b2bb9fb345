"""Random draws that depend on what they are for, never on the order in which they are made."""

import hashlib

import torch

__all__ = ["derived_seed", "generator"]


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
