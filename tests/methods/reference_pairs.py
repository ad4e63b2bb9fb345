"""Slow float64 references of LoRA-Pro and LoRA-RITE, one pair at a time, written from the equations alone.

Every inverse goes through a singular value decomposition of the tall factor itself, never through a Gram matrix, and
nothing is stacked, transported ahead of time or saved: what the product's engine does to be fast is absent here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Basis = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Splits a tall matrix [n, r] into orthonormal columns U [n, r] and a magnitude R [r, r] with U R = the matrix."""


# LoRA-Pro, arXiv 2407.18242.


def gram_spectrum(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [r] and eigenvectors [r, r] of columns^T columns, also where r exceeds the number of rows."""
    _, singular, Vh = torch.linalg.svd(columns, full_matrices=True)
    values = torch.zeros(columns.shape[1], dtype=columns.dtype)
    values[: len(singular)] = singular**2
    return values, Vh.mT


def damped_inverse(columns: Tensor, delta: float) -> Tensor:
    """(columns^T columns + delta I)^-1."""
    values, vectors = gram_spectrum(columns)
    return (vectors / (values + delta)) @ vectors.mT


def closed_form(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, delta: float) -> tuple[Tensor, Tensor]:
    """Section 3.1: hA0 and hB0, the solution with X = 0."""
    inverse_B, inverse_A = damped_inverse(B, delta), damped_inverse(A.mT, delta)
    T = gB @ inverse_A
    return inverse_B @ gA / s**2, (T - B @ (inverse_B @ (B.mT @ T))) / s**2


def free_matrix(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, delta: float, x_mode: str) -> Tensor:
    """Section 3.2: the X that `x_mode` names."""
    rank = A.shape[0]
    if x_mode == "zero":
        return torch.zeros(rank, rank, dtype=A.dtype)
    inverse_B = damped_inverse(B, delta)
    if x_mode == "symmetry":
        return -(inverse_B @ (B.mT @ gB) @ damped_inverse(A.mT, delta)) / (2 * s**2)
    C = -(inverse_B @ gA @ A.mT) / s**2
    b, U = gram_spectrum(B)
    a, V = gram_spectrum(A.mT)
    return U @ ((U.mT @ C @ V) / (b[:, None] + a[None, :] + 2 * delta)) @ V.mT


def adjusted(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float, delta: float = 1e-8, x_mode: str = "sylvester"
) -> tuple[Tensor, Tensor]:
    """Sections 3.1 and 3.2: hA [r, in] and hB [out, r], with the indices that both factors lack kept at zero."""
    hA, hB = closed_form(A, B, gA, gB, s, delta)
    X = free_matrix(A, B, gA, gB, s, delta, x_mode)
    live = ~((A == 0).all(dim=1) & (B == 0).all(dim=0))
    return (hA + X @ A) * live[:, None], (hB - B @ X) * live[None, :]


def one_sided(A: Tensor, B: Tensor, gA: Tensor | None, gB: Tensor | None, s: float, delta: float = 1e-8) -> Tensor:
    """Section 11 of the common rules: the optimum where only one factor moves."""
    if gB is not None:
        return gB @ damped_inverse(A.mT, delta) / s**2
    assert gA is not None
    return damped_inverse(B, delta) @ gA / s**2


def equivalent_gradient(A: Tensor, B: Tensor, hA: Tensor, hB: Tensor, s: float) -> Tensor:
    """s (B hA + hB A): what W sees of a step along (hA, hB)."""
    return s * (B @ hA + hB @ A)


@dataclass
class Moments:
    """Adam's two moments of one tensor, with its own count of steps."""

    betas: tuple[float, float]
    eps: float
    step: int = 0
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def direction(self, gradient: Tensor) -> Tensor:
        """(m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps)."""
        b1, b2 = self.betas
        self.step += 1
        self.mean = b1 * self.mean + (1 - b1) * gradient
        self.square = b2 * self.square + (1 - b2) * gradient**2
        root = torch.as_tensor(self.square).sqrt() / math.sqrt(1 - b2**self.step)
        return self.mean / (1 - b1**self.step) / (root + self.eps)


@dataclass
class ProPair:
    """LoRA-Pro on one pair: `step(gA, gB)` moves A and B.

    `mode`: sgd (3.3), efficient (3.5), full (3.4).
    """

    A: Tensor
    B: Tensor
    scaling: float
    lr: float
    mode: str = "efficient"
    x_mode: str = "sylvester"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    delta: float = 1e-8
    moments: dict[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.A, self.B = self.A.double().clone(), self.B.double().clone()
        self.moments = {key: Moments(self.betas, self.eps) for key in ("A", "B", "W")}

    def adjusted(self, gA: Tensor, gB: Tensor) -> tuple[Tensor, Tensor]:
        return adjusted(self.A, self.B, gA.double(), gB.double(), self.scaling, self.delta, self.x_mode)

    def step(self, gA: Tensor, gB: Tensor) -> None:
        decay = 1 - self.lr * self.weight_decay
        if self.mode == "full":
            hA, hB = closed_form(self.A, self.B, gA.double(), gB.double(), self.scaling, self.delta)
            N = self.moments["W"].direction(equivalent_gradient(self.A, self.B, hA, hB, self.scaling))
            hA, hB = self.adjusted(self.scaling * self.B.mT @ N, self.scaling * N @ self.A.mT)
            decay = math.sqrt(decay)
        else:
            hA, hB = self.adjusted(gA, gB)
            if self.mode == "efficient":
                hA, hB = self.moments["A"].direction(hA), self.moments["B"].direction(hB)
        self.A = decay * self.A - self.lr * hA
        self.B = decay * self.B - self.lr * hB


@dataclass
class PlainAdamW:
    """AdamW with decoupled decay, for parameters that are no pair."""

    value: Tensor
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.value = self.value.double().clone()
        self.moments = Moments(self.betas, self.eps)

    def step(self, gradient: Tensor) -> None:
        self.value = (1 - self.lr * self.weight_decay) * self.value
        self.value = self.value - self.lr * self.moments.direction(gradient.double())


# LoRA-RITE, arXiv 2410.20625v2.


def svd_basis(tall: Tensor) -> tuple[Tensor, Tensor]:
    """U and R by a singular value decomposition; directions below r * eps of the largest are zero in both."""
    rows, rank = tall.shape
    U, singular, Vh = torch.linalg.svd(tall, full_matrices=False)
    kept = singular > rank * torch.finfo(tall.dtype).eps * singular.max()
    U, singular = U * kept, singular * kept
    if rows < rank:  # the missing directions
        U = torch.cat([U, torch.zeros(rows, rank - rows, dtype=tall.dtype)], dim=1)
        lower = torch.zeros(rank - rows, rank, dtype=tall.dtype)
        return U, torch.cat([singular[:, None] * Vh, lower])
    return U, singular[:, None] * Vh


def qr_basis(tall: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(tall)


def cholesky_basis(tall: Tensor) -> tuple[Tensor, Tensor]:
    R = torch.linalg.cholesky(tall.mT @ tall).mT
    return torch.linalg.solve_triangular(R, tall, upper=True, left=False), R


def polar_basis(tall: Tensor) -> tuple[Tensor, Tensor]:
    values, Q = torch.linalg.eigh(tall.mT @ tall)
    root = (Q * values.sqrt()) @ Q.mT
    return tall @ torch.linalg.inv(root), root


def eigen_basis(tall: Tensor) -> tuple[Tensor, Tensor]:
    values, Q = torch.linalg.eigh(tall.mT @ tall)
    return tall @ (Q / values.sqrt()), values.sqrt()[:, None] * Q.mT


def pseudo_inverse(R: Tensor) -> Tensor:
    return torch.linalg.pinv(R, rtol=R.shape[0] * torch.finfo(R.dtype).eps)


def rms(matrix: Tensor) -> float:
    return matrix.square().mean().sqrt().item()


def debiased(beta: float, step: int) -> float:
    """b_hat(b, t) = b (1 - b^(t-1)) / (1 - b^t)."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


@dataclass
class Side:
    """One factor's half of the state, seen from the other factor's basis: gradients are [r, n]."""

    precond: Tensor
    momentum: Tensor
    escape: float = 0.0

    def transport(self, overlap: Tensor, beta2: float, *, escape: bool) -> Tensor:
        """Lines 4 and 5: the transported V; the escaped mass is added to rho."""
        moved = symmetric(overlap @ self.precond @ overlap.mT)
        if escape:
            gaps = torch.linalg.eigvalsh(self.precond) - torch.linalg.eigvalsh(moved)
            lost = (self.precond.trace() - moved.trace()).clamp(min=0).item()
            self.escape = beta2 * (self.escape + min(max(0.0, gaps.max().item()), lost))
        return moved

    def update(self, moved: Tensor, overlap: Tensor, gbar: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Lines 6 to 8."""
        b1, b2 = betas
        self.precond = b2 * moved + (1 - b2) * gbar @ gbar.mT / gbar.shape[1]
        values, Q = torch.linalg.eigh(symmetric(self.precond))
        root = (values.clamp(min=0) + self.escape).sqrt() + eps
        self.momentum = b1 * overlap @ self.momentum + (1 - b1) * (Q / root) @ Q.mT @ gbar


@dataclass
class RitePair:
    """A, B and the state of one pair."""

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        self.A, self.B = self.A.double().clone(), self.B.double().clone()
        rank, in_features = self.A.shape
        square = torch.zeros(rank, rank, dtype=torch.float64)
        self.side_A = Side(square, torch.zeros(rank, in_features, dtype=torch.float64))
        self.side_B = Side(square, torch.zeros(rank, self.B.shape[0], dtype=torch.float64))
        self.old_A, self.old_B = torch.zeros_like(self.A.mT), torch.zeros_like(self.B)


@dataclass
class Rite:
    """LoRA-RITE on a list of pairs (the clip norm is shared): `step([(gA, gB), ...])`. Limits <= 0 are off."""

    pairs: Sequence[RitePair]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    clip: float = 1.0
    skip: float = 1.0
    cap: float = 0.0
    weight_decay: float = 0.0
    escape: bool = False
    balance: bool = False
    basis: Basis = svd_basis
    steps: int = 0

    def step(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.steps += 1
        bases = [(self.basis(pair.A.mT), self.basis(pair.B)) for pair in self.pairs]
        unmagnified = []
        for ((_, R_A), (_, R_B)), (gA, gB) in zip(bases, gradients, strict=True):
            gbars = (pseudo_inverse(R_B).mT @ gA.double(), (gB.double() @ pseudo_inverse(R_A)).mT)  # line 1, B turned
            unmagnified.append([gbar * (not self.skip > 0 or rms(gbar) <= self.skip) for gbar in gbars])  # line 2
        norm = math.sqrt(sum(gbar.square().sum().item() for both in unmagnified for gbar in both))  # line 3
        shrink = self.clip / norm if 0 < self.clip < norm else 1.0
        for pair, ((U_A, R_A), (U_B, R_B)), (gbar_A, gbar_B) in zip(self.pairs, bases, unmagnified, strict=True):
            self._move(pair, pair.side_A, U_B.mT @ pair.old_B, gbar_A * shrink)
            self._move(pair, pair.side_B, U_A.mT @ pair.old_A, gbar_B * shrink)
            Y_A, Y_B = self._capped(pair.side_A.momentum), self._capped(pair.side_B.momentum)
            step_A = pseudo_inverse(R_B) @ Y_A + self.weight_decay * pair.A  # line 10
            step_B = Y_B.mT @ pseudo_inverse(R_A).mT + self.weight_decay * pair.B
            pair.A, pair.B = pair.A - self.lr * step_A, pair.B - self.lr * step_B
            if self.balance:  # line 11
                norms = pair.A.norm() + 1e-6, pair.B.norm() + 1e-6
                pair.A, pair.B = pair.A * (norms[1] / norms[0]).sqrt(), pair.B * (norms[0] / norms[1]).sqrt()
            pair.old_A, pair.old_B = U_A, U_B  # line 12

    def _move(self, pair: RitePair, side: Side, overlap: Tensor, gbar: Tensor) -> None:
        b1, b2 = (debiased(beta, self.steps) for beta in self.betas)
        moved = side.transport(overlap, b2, escape=self.escape)
        side.update(moved, overlap, gbar, (b1, b2), self.eps)

    def _capped(self, momentum: Tensor) -> Tensor:  # line 9
        return momentum / max(1.0, rms(momentum) / self.cap) if self.cap > 0 else momentum
