"""Pairs with known gradients, both optimizers over them, and the figures that tests compare."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "rite": LoRARITEOptimizer,
    "rite-escape": lambda groups, **settings: LoRARITEOptimizer(groups, apply_escape=True, **settings),
    "pro-efficient": lambda groups, **settings: LoRAProOptimizer(groups, mode="efficient", **settings),
    "pro-full": lambda groups, **settings: LoRAProOptimizer(groups, mode="full", **settings),
    "pro-sgd": lambda groups, **settings: LoRAProOptimizer(groups, mode="sgd", **settings),
}
"""Every kind of pair optimizer, by name."""

Shape = tuple[int, int, int]
"""out, in, rank."""

MIXED: tuple[Shape, ...] = ((10, 6, 2), (6, 12, 4), (8, 8, 1), (10, 6, 2), (7, 9, 4), (16, 11, 3), (10, 6, 4))


@dataclass
class Pair:
    """Trainable factors and the multiplier of their update."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    def product(self) -> Tensor:
        """s B A in float64."""
        return self.scaling * self.B.detach().double() @ self.A.detach().double()

    def give(self, G: Tensor) -> None:
        """The gradients that autograd would leave for dLoss/dW = G, in the parameters' dtype."""
        G = G.to(torch.promote_types(self.A.dtype, torch.float32))
        A, B = self.A.detach().to(G.dtype), self.B.detach().to(G.dtype)
        self.A.grad = (self.scaling * B.mT @ G).to(self.A.dtype)
        self.B.grad = (self.scaling * G @ A.mT).to(self.B.dtype)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def new_pair(
    shape: Shape = (10, 6, 2),
    *,
    seed: int = 0,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float64,
    zero_B: bool = False,
) -> Pair:
    out_features, in_features, rank = shape
    A = random(rank, in_features, seed=1000 + seed, dtype=dtype) * in_features**-0.5
    B = random(out_features, rank, seed=2000 + seed, dtype=dtype) * out_features**-0.5
    return Pair(nn.Parameter(A), nn.Parameter(torch.zeros_like(B) if zero_B else B), scaling)


def new_pairs(shapes: Iterable[Shape] = MIXED, **settings: Any) -> list[Pair]:
    return [new_pair(shape, seed=10 * number, **settings) for number, shape in enumerate(shapes)]


def copied(pairs: Sequence[Pair], dtype: torch.dtype | None = None) -> list[Pair]:
    """Fresh parameters with the same values."""
    return [
        Pair(*(nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in (pair.A, pair.B)), pair.scaling)
        for pair in pairs
    ]


def dense_gradients(pairs: Sequence[Pair], steps: int, *, seed: int = 0, size: float = 0.05) -> list[list[Tensor]]:
    """G of each pair at each step."""
    return [
        [
            size * random(pair.B.shape[0], pair.A.shape[1], seed=77 * step + 7 * number + seed)
            for number, pair in enumerate(pairs)
        ]
        for step in range(steps)
    ]


def group_of(pairs: Sequence[Pair], **settings: Any) -> dict[str, Any]:
    return {
        "params": [factor for pair in pairs for factor in (pair.A, pair.B)],
        "kind": "lora_pair",
        "scaling": [pair.scaling for pair in pairs],
        **settings,
    }


def make(kind: str, pairs: Sequence[Pair], *, lr: float = 1e-2, **settings: Any) -> Optimizer:
    return MAKERS[kind]([group_of(pairs)], lr=lr, **settings)


def walk(optimizer: Optimizer, pairs: Sequence[Pair], gradients: Iterable[Sequence[Tensor]]) -> None:
    """One step for each list of dense gradients."""
    for G in gradients:
        for pair, one in zip(pairs, G, strict=True):
            pair.give(one)
        optimizer.step()
        optimizer.zero_grad()


def one_step(kind: str, pair: Pair, G: Tensor, *, lr: float = 1.0, **settings: Any) -> tuple[Tensor, Tensor]:
    """The directions (A - A_new) / lr and (B - B_new) / lr of one step from this pair, which stays as it is."""
    (moved,) = copied([pair])
    walk(make(kind, [moved], lr=lr, **settings), [moved], [[G]])
    return (pair.A - moved.A).detach() / lr, (pair.B - moved.B).detach() / lr


def factors(pairs: Sequence[Pair]) -> list[Tensor]:
    return [factor.detach().clone() for pair in pairs for factor in (pair.A, pair.B)]


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    different = [number for number, (x, y) in enumerate(zip(found, expected, strict=True)) if not torch.equal(x, y)]
    assert different == []


def relative(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|."""
    found, reference = found.detach().double(), reference.detach().double()
    assert found.isfinite().all()
    return ((found - reference).abs().max() / reference.abs().max()).item()


def with_condition(rank: int, condition: float, *, seed: int = 0) -> Tensor:
    """A random [rank, rank] float64 matrix of this condition number, its singular values around 1."""
    left, _ = torch.linalg.qr(random(rank, rank, seed=seed))
    right, _ = torch.linalg.qr(random(rank, rank, seed=seed + 1))
    exponents = torch.linspace(0.5, -0.5, rank, dtype=torch.float64)
    return (left * condition**exponents) @ right


def transformed(pair: Pair, R: Tensor) -> Pair:
    """The same product from (R A, B R^-1)."""
    A, B = R @ pair.A.detach().double(), torch.linalg.solve(R, pair.B.detach().double(), left=False)
    return Pair(nn.Parameter(A.to(pair.A.dtype)), nn.Parameter(B.to(pair.B.dtype)), pair.scaling)
