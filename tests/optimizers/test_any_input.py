"""Whatever factors and gradients come, a step neither raises nor leaves a factor or a state that is not finite."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.optimizers.support import MAKERS, Pair, factors, make, new_pair, random

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
STARTS = st.sampled_from(
    ["normal", "zero B", "zero A", "zero both", "equal rows", "dead index", "huge", "tiny", "uneven"]
)
GRADIENTS = st.sampled_from(["normal", "zero", "none", "A none", "B none", "NaN", "Inf", "huge", "tiny", "rank one"])


def start(shape: tuple[int, int, int], kind: str, seed: int, dtype: torch.dtype) -> Pair:
    pair = new_pair(shape, seed=seed, dtype=dtype)
    A, B = pair.A.data, pair.B.data
    changes = {
        "zero B": lambda: B.zero_(),
        "zero A": lambda: A.zero_(),
        "zero both": lambda: (A.zero_(), B.zero_()),
        "equal rows": lambda: (A.copy_(A[:1].expand_as(A)), B.copy_(B[:, :1].expand_as(B))),
        "dead index": lambda: (A[-1].zero_(), B[:, -1].zero_()),
        "huge": lambda: (A.mul_(1e3), B.mul_(1e3)),
        "tiny": lambda: (A.mul_(1e-10), B.mul_(1e-10)),
        "uneven": lambda: (A.mul_(1e8), B.mul_(1e-8)),
    }
    changes.get(kind, lambda: None)()
    return pair


def give(pair: Pair, kind: str, seed: int) -> None:
    out_features, in_features = pair.B.shape[0], pair.A.shape[1]
    dense = random(out_features, in_features, seed=seed)
    if kind == "rank one":
        dense = random(out_features, 1, seed=seed) @ random(1, in_features, seed=seed + 1)
    pair.give(dense * {"zero": 0.0, "huge": 1e6, "tiny": 1e-12}.get(kind, 0.1))
    if kind in ("none", "A none"):
        pair.A.grad = None
    if kind in ("none", "B none"):
        pair.B.grad = None
    if kind in ("NaN", "Inf"):
        pair.B.grad[0, 0] = float(kind.lower())


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for entry in optimizer.state.values():
        yield from entry.values()


@pytest.mark.parametrize("kind", sorted(MAKERS))
@settings(max_examples=25)
@given(
    DTYPES,
    st.lists(st.tuples(SHAPES, STARTS), min_size=1, max_size=3),
    st.lists(GRADIENTS, min_size=3, max_size=6),
    st.integers(0, 2**16),
)
def test_a_step_never_raises_and_everything_stays_finite(kind, dtype, pairs_drawn, gradients, seed) -> None:
    pairs = [start(shape, made, seed + 31 * k, dtype) for k, (shape, made) in enumerate(pairs_drawn)]
    optimizer = make(kind, pairs, lr=1e-4, weight_decay=0.01)
    for step, one in enumerate(gradients):
        for number, pair in enumerate(pairs):
            give(pair, one if number == 0 else gradients[-1 - step], seed + 17 * step + number)
        optimizer.step()
        optimizer.zero_grad()
    assert all(factor.isfinite().all() for factor in factors(pairs))
    assert all(value.isfinite().all() for value in state_tensors(optimizer))
