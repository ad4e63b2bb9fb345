"""LoRA-Pro: gradients of lora_A and lora_B adjusted so that the product moves as close to full fine-tuning as it can.

"LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242v3 (ICLR 2025).

The idea: changing the factors by -lr (hA, hB) changes W to first order by -lr g with the equivalent gradient
g = s (B hA + hB A), so LoRA is full fine-tuning with a low-rank gradient. The (hA, hB) whose g is closest to the full
gradient G have a closed form in gA, gB, A and B alone. It leaves an r x r matrix X free, which is chosen to keep the
adjusted gradients closest to the raw ones: a Sylvester equation.

| paper | here |
|---|---|
| Theorem 1, the closed form with X | `adjusted` |
| choice of X (Sylvester) | `free_matrix` |
| Theorem 2, descent | tested (tests/methods/test_lora_pro.py) |
| AdamW on the equivalent gradient (full mode) | `ProFull` |
| AdamW on the adjusted gradients (authors' efficient mode) | `ProEfficient` |
| SGD | `ProSGD` |

The full text could not be obtained; the closed form is re-derived and agrees with the authors' code, mrflogs/LoRA-Pro
85d74c9 (with HEAD fe26027 beside it).

With S_A = A A^T, S_B = B^T B and inverses of S + delta I,
    hA = S_B^-1 gA / s^2 + X A,    hB = (gB - B S_B^-1 B^T gB) S_A^-1 / s^2 - B X.
No [out, out] projector is formed: all that is solved for is r x r.

Departures, with reasons:
- Bias correction counts from t = 1. The newer code's first update uses t = 2 (0.74 of Adam's direction).
- The scaling is each layer's own. The newer code has a constant 2, the older an argument.
- The regularized inverse comes from an eigendecomposition with delta = 1e-8, not from pinv(S + 1e-8 I), and the
  Sylvester equation from the same two decompositions, with 0 in place of 1 / delta in directions that rounding alone
  fills (the code has 1e8 there): 2 delta stands in its denominators, and indices whose row of A
  and column of B are zero are masked, so that they stay exactly zero (the code divides 0 by 0).
- The symmetric choice of X uses S_A^-1; the code uses S_A there.
- Weight decay never touches the base weight (the older code's full mode decays it too).
- Full-mode moments are float32 by default; the code's bfloat16 average rounds away most increments of 1 - beta2 = 1e-3.
- B^T gB stands for gA A^T as well, which it equals: one product less.
- Clipping is left to the trainer, on raw gradients. The newer code clips the adjusted step by the raw norm.
- SGD refuses momentum, which the code accepts and ignores. Pairs are explicit; the code pairs consecutive parameters,
  and one missing gradient shifts all later pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from rankwise.errors import ConfigError
from rankwise.linalg.solve import trace
from rankwise.methods.base import Method, Slot, setting_faults
from rankwise.optimizers.engine import PairOptimizer, Source
from rankwise.optimizers.orthogonal import nearly_orthonormal
from rankwise.optimizers.plain import descend_plain
from rankwise.optimizers.rule import SIDES, Block, Coefficients, Measured, PairView, Side
from rankwise.optimizers.tall import Amount, Tall
from rankwise.ranks.shapes import LayerShape

__all__ = ["LoRAPro", "LoRAProOptimizer"]

Mode = Literal["efficient", "full", "sgd"]
FreeMatrix = Literal["sylvester", "zero", "symmetry"]
StateDtype = Literal["float32", "bfloat16"]

_DOUBTFUL = 50.0
_NUMBERS = ("steps", "correction1", "correction2", "moves", "move", "shrink")
_BLOCK_BYTES = 1 << 26  # of one dense temporary; about four live at once


@dataclass(frozen=True, kw_only=True)
class LoRAPro(Method):
    """Adjusts the gradients of lora_A and lora_B so that the update comes closest to full fine-tuning's.

    Args:
        mode: `efficient` keeps Adam's moments of the adjusted gradients (as much memory as AdamW); `full` those of the
            equivalent gradient, two [out, in] matrices a layer; `sgd` none.
        x_mode: the free matrix: `sylvester` (paper), `zero`, or `symmetry`.
        betas: decays of the moments, both in [0, 1).
        eps: added to the root of the second moment, >= 0.
        delta: added to S_A and S_B before they are inverted, > 0 (code: 1e-8).
        delta_rel: the same relative to the mean of their diagonals, >= 0 (1e-6 to 1e-3 is a reasonable experiment).
        amsgrad: keep the largest second moment (full mode).
        state_dtype: of full mode's moments; arithmetic is float32.
    """

    id: ClassVar[str] = "lora-pro"
    title: ClassVar[str] = "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?"
    source: ClassVar[str] = "arXiv:2407.18242v3"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 5e-4)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"mode": "full"},
        "official": {"mode": "efficient", "x_mode": "sylvester", "delta": 1e-8},
    }
    leaner: ClassVar[str] = "lora-pro.mode: efficient"

    mode: Mode = "efficient"
    x_mode: FreeMatrix = "sylvester"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 1e-8
    delta_rel: float = 0.0
    amsgrad: bool = False
    state_dtype: StateDtype = "float32"

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={"mode": get_args(Mode), "x_mode": get_args(FreeMatrix), "state_dtype": get_args(StateDtype)},
            numbers={"eps": 0, "delta": 1e-30, "delta_rel": 0},
            wholes={},
            flags=("amsgrad",),
        )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"lora-pro.betas: {self.betas!r} are out of range; use two numbers in [0, 1)")
        for key, unset in (("amsgrad", False), ("state_dtype", "float32")):
            if self.mode != "full" and getattr(self, key) != unset:
                faults.append(f"lora-pro.{key}: it is for mode full, and mode is {self.mode}; leave it out")
        if faults:
            raise ConfigError(faults)

    def make_optimizer(self, groups: Sequence[dict[str, Any]], *, lr: float) -> Optimizer:
        """The optimizer over these groups; pairs take the method's betas and eps."""
        return LoRAProOptimizer(
            groups,
            lr=lr,
            mode=self.mode,
            x_mode=self.x_mode,
            betas=self.betas,
            eps=self.eps,
            delta=self.delta,
            delta_rel=self.delta_rel,
            amsgrad=self.amsgrad,
            state_dtype=getattr(torch, self.state_dtype),
        )

    def state_bytes(self, ranks: Mapping[LayerShape, int]) -> int | None:
        """What full mode keeps, two or three [out, in] matrices a layer; None in the other modes (AdamW's, or less)."""
        if self.mode != "full":
            return None
        size = (2 + self.amsgrad) * (2 if self.state_dtype == "bfloat16" else 4)
        return sum(size * shape.out_features * shape.in_features for shape, rank in ranks.items() if rank)


class LoRAProOptimizer(PairOptimizer):
    """LoRA-Pro over the pairs of a PEFT model, AdamW over whatever else is trainable.

    Args:
        model_or_groups: any PEFT model with a LoRA adapter, or parameter groups (see PairOptimizer).
        lr: learning rate, >= 0.
        mode: `efficient`, `full` or `sgd`.
        x_mode: the free matrix: `sylvester`, `zero` or `symmetry`.
        betas: decays of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, >= 0; the product shrinks by (1 - lr * weight_decay) in full mode, by its square in the
            others. In `sgd` and `efficient` each factor shrinks before its step.
        delta: added to S_A and S_B before they are inverted, > 0.
        delta_rel: the same relative to the mean of their diagonals.
        amsgrad: keep the largest second moment (full mode only).
        state_dtype: of full mode's moments (float64 for float64 parameters).
        adapter_name: which adapter of the model.
        momentum: refused: SGD on adjusted gradients has none.

    Raises:
        ConfigError: settings out of range, amsgrad outside full mode, momentum, or no pairs.

    Source: arXiv 2407.18242v3, Theorem 1; mrflogs/LoRA-Pro 85d74c9.

    Example:
        >>> import torch
        >>> A, B = torch.nn.Parameter(torch.eye(2, 3)), torch.nn.Parameter(torch.zeros(4, 2))
        >>> pairs = {"kind": "lora_pair", "params": [A, B], "scaling": [2.0]}
        >>> optimizer = LoRAProOptimizer([pairs], lr=1e-3)
        >>> (2.0 * B @ A).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model_or_groups: Source,
        lr: float,
        mode: Mode = "efficient",
        x_mode: FreeMatrix = "sylvester",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 1e-8,
        delta_rel: float = 0.0,
        amsgrad: bool = False,
        state_dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
        momentum: float = 0.0,
    ) -> None:
        faults = [
            f"{key} is {value!r}: use one of {', '.join(known)}"
            for key, value, known in (("mode", mode, get_args(Mode)), ("x_mode", x_mode, get_args(FreeMatrix)))
            if value not in known
        ]
        if momentum:
            faults.append(f"momentum is {momentum!r}: LoRA-Pro has none of its own; leave it out")
        if mode != "full" and (amsgrad or state_dtype != torch.float32):
            faults.append(f"amsgrad and state_dtype are for mode 'full', and mode is {mode!r}: leave them out")
        if not 0 < delta < math.inf or not 0 <= delta_rel < math.inf:
            faults.append(
                f"delta is {delta!r} and delta_rel {delta_rel!r}: delta must be above 0, delta_rel at least 0"
            )
        if state_dtype not in (torch.float32, torch.bfloat16, torch.float64):
            faults.append(f"state_dtype is {state_dtype}: use torch.float32, or torch.bfloat16 to save memory")
        if faults:
            raise ConfigError(faults)
        solution = _Solution(x_mode, delta, delta_rel)
        rule: ProSGD | ProEfficient | ProFull
        if mode == "full":
            rule = ProFull(solution, amsgrad, state_dtype)
        else:
            rule = ProEfficient(solution) if mode == "efficient" else ProSGD(solution)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings = {**asdict(solution), "amsgrad": amsgrad, "state_dtype": str(state_dtype)}
        told = {"rule": f"{LoRAPro.id} {mode}", "rule_settings": settings}
        super().__init__(model_or_groups, rule, {**defaults, **told}, adapter_name)

    def _check_pair_group(self, group: Mapping[str, Any]) -> None:
        said = [f"{key} is {group[key]!r}" for key in ("momentum", "dampening", "nesterov") if group.get(key)]
        if said:
            raise ConfigError(f"{' and '.join(said)}: LoRA-Pro has no momentum of its own; leave it out")

    def _step_plain(self, group: dict[str, Any]) -> None:
        if isinstance(self._rule, ProSGD):
            descend_plain(group)
        else:
            super()._step_plain(group)


# --- equations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spectra:
    """S_A = V diag(a) V^T and S_B = U diag(b) U^T, the deltas included in a and b; [..., r] and [..., r, r].

    `seen_a` and `seen_b` are 1 where an eigenvalue is above rounding, else 0. The raw gradients have nothing in the
    other directions, and 1 / delta must not blow their rounding up.
    """

    a: Tensor
    V: Tensor
    seen_a: Tensor
    b: Tensor
    U: Tensor
    seen_b: Tensor

    @classmethod
    def of(
        cls, values: Mapping[Side, Tensor], vectors: Mapping[Side, Tensor], delta: Mapping[Side, Tensor], epsilon: float
    ) -> Self:
        """Cuts eigenvalues at or below (r eps)^2 * (the largest) off, and adds the deltas [..., 1]."""
        parts: dict[Side, tuple[Tensor, Tensor]] = {}
        for side in SIDES:
            own = values[side]
            seen = own > (epsilon * own.shape[-1]) ** 2 * own.amax(-1, keepdim=True).clamp(min=0)
            parts[side] = (torch.where(seen, own, 0.0) + delta[side], seen.to(own.dtype))
        return cls(parts["A"][0], vectors["A"], parts["A"][1], parts["B"][0], vectors["B"], parts["B"][1])

    @property
    def inverse_A(self) -> Tensor:  # noqa: N802
        """(S_A + delta I)^-1."""
        return (self.V * (self.seen_a / self.a).unsqueeze(-2)) @ self.V.mT

    @property
    def inverse_B(self) -> Tensor:  # noqa: N802
        """(S_B + delta I)^-1."""
        return (self.U * (self.seen_b / self.b).unsqueeze(-2)) @ self.U.mT


def free_matrix(
    mode: FreeMatrix, spectra: Spectra, cross: Float[Tensor, "*b r r"], weight: Tensor
) -> Float[Tensor, "*b r r"]:
    """The matrix X that both adjusted gradients share.

    `sylvester` solves S_B X + X S_A = -S_B^-1 gA A^T / s^2, which keeps (hA, hB) closest to (gA, gB); `symmetry` brings
    B hA and hB A as close together as they can be; `zero` makes the product's step independent of the factorization
    (in `sgd` and `full` mode).

    Args:
        mode: which.
        spectra: of S_A and S_B.
        cross: B^T gB, which is gA A^T too (both are s B^T G A^T).
        weight: 1 / s^2, [..., 1, 1].

    Source: arXiv 2407.18242v3, the choice of X; the symmetric choice as in mrflogs/LoRA-Pro 85d74c9, with S_A^-1.
    """
    if mode == "zero":
        return torch.zeros_like(cross)
    if mode == "symmetry":
        return -0.5 * weight * spectra.inverse_B @ cross @ spectra.inverse_A
    right = -weight * spectra.inverse_B @ cross
    turned = spectra.U.mT @ right @ spectra.V
    return spectra.U @ (turned / (spectra.b.unsqueeze(-1) + spectra.a.unsqueeze(-2))) @ spectra.V.mT


def adjusted(
    spectra: Spectra, cross: Float[Tensor, "*b r r"], X: Tensor, weight: Tensor
) -> dict[Side, tuple[Float[Tensor, "*b r r"], Float[Tensor, "*b r r"]]]:
    """By side (own, mixed) with h = own g + mixed F: hA = own gA + mixed A, hB^T = own gB^T + mixed B^T.

    Source: arXiv 2407.18242v3, Theorem 1.
    """
    inverse_A, inverse_B = spectra.inverse_A, spectra.inverse_B
    return {
        "A": (weight * inverse_B, X),
        "B": (weight * inverse_A, -(weight * inverse_B @ cross @ inverse_A + X).mT),
    }


@dataclass(frozen=True)
class _Solution:
    """What all three modes share: the small algebra from Gram matrices to coefficients."""

    x_mode: FreeMatrix
    delta: float
    delta_rel: float

    def measure(self, block: Block) -> tuple[Measured, Tensor]:
        """Spectra of both Gram matrices and the cross product B^T gB."""
        values, vectors = torch.linalg.eigh(torch.cat([block.gram(side) for side in SIDES]))
        measured: Measured = {}
        doubtful = torch.zeros_like(block.pair_moves)
        for side, own, Q in zip(SIDES, values.chunk(2), vectors.chunk(2), strict=True):
            measured[f"values_{side}"], measured[f"vectors_{side}"] = own.clone(), Q.clone()
            doubtful |= (own[:, -1] > 0) & ~(own[:, -1] < _DOUBTFUL**2 * own[:, 0])
        measured["cross"] = block.halves["B"].products["grad"].clone()
        return measured, doubtful

    def look_again(self, pair: PairView) -> Measured:
        """The same from nearly orthonormal factors: S = W^-T (W^T F)(W^T F)^T W^-1 keeps small directions' digits."""
        measured: Measured = {}
        first = {side: nearly_orthonormal(pair.tall[side], pair.epsilon) for side in SIDES}
        outer = {side: torch.linalg.pinv(first[side][0]) for side in SIDES}
        for side in SIDES:
            tall, rows = pair.tall[side], first[side][1]
            near = tall.product(rows, rows).double()
            gram = outer[side].mT @ near @ outer[side]
            measured[f"values_{side}"], measured[f"vectors_{side}"] = torch.linalg.eigh((gram + gram.mT) / 2)
        # gB is small where A is: turned by both, the cross product keeps the digits of small directions too.
        tall = pair.tall["B"]
        turned = tall.combine(first["A"][0].mT.to(tall.grad.dtype), tall.grad)
        measured["cross"] = outer["B"].mT @ tall.product(first["B"][1], turned).double() @ outer["A"]
        return measured

    def deltas(self, block: Block) -> dict[Side, Tensor]:
        """What is added to the eigenvalues of both sides: delta + delta_rel * trace(S) / r, [N, 1]."""
        means = {side: trace(block.halves[side].products["gram"]) / block.rank for side in SIDES}
        return {side: (self.delta + self.delta_rel * means[side])[:, None] for side in SIDES}

    def spectra(self, block: Block, found: Measured) -> Spectra:
        """The spectra with rounding cut off and the deltas added."""
        values, vectors = ({side: found[f"{name}_{side}"] for side in SIDES} for name in ("values", "vectors"))
        return Spectra.of(values, vectors, self.deltas(block), block.epsilon)

    def coefficients(self, block: Block, spectra: Spectra, cross: Tensor, X: Tensor) -> dict[Side, Coefficients]:
        """(own, mixed) of both sides; one-sided where only one factor moves; 0 for indices that are zero in both."""
        both = (block.halves["A"].moves & block.halves["B"].moves)[:, None, None]
        alive = ~block.dead
        mask = (alive[:, :, None] & alive[:, None, :]).double()
        weight = _weight(block)
        found = adjusted(spectra, cross, X, weight)
        decided: dict[Side, Coefficients] = {}
        for side in SIDES:
            own, mixed = found[side]
            half = block.halves[side]
            moves = half.moves.double()
            decided[side] = Coefficients(
                {"own": own * mask, "mixed": torch.where(both, mixed, 0.0) * mask},
                {
                    "steps": half.steps,
                    "correction1": 1 - block.hyper["beta1"] ** half.steps.clamp(min=1),
                    "correction2": 1 - block.hyper["beta2"] ** half.steps.clamp(min=1),
                    "moves": moves,
                    "move": half.rate * moves,
                    "shrink": 1 - half.rate * block.hyper["weight_decay"] * moves,
                },
            )
        return decided

    def solve(self, blocks: Sequence[Block], measured: Sequence[Measured]) -> list[dict[Side, Coefficients]]:
        """The adjusted gradients of every pair."""
        decided = []
        for block, found in zip(blocks, measured, strict=True):
            spectra = self.spectra(block, found)
            X = free_matrix(self.x_mode, spectra, found["cross"], _weight(block))
            decided.append(self.coefficients(block, spectra, found["cross"], X))
        return decided


@dataclass(frozen=True)
class _ProRule:
    """What the modes have in common; each moves the factors in its own way."""

    solution: _Solution

    reduced_state: ClassVar[tuple[str, ...]] = ()
    square_state: ClassVar[tuple[str, ...]] = ()
    number_state: ClassVar[Mapping[str, float]] = {}

    def reduce(self, tall: Tall) -> dict[str, Tensor]:
        """F F^T; of lora_B the cross product B^T gB, and of lora_A, whose A gA^T is its transpose, only a sum of gA.

        The sum tells whether gA is finite.
        """
        gram = tall.product(tall.factor, tall.factor)
        if not tall.wide:
            return {"gram": gram, "grad": tall.product(tall.factor, tall.grad)}
        return {"gram": gram, "grad": tall.grad.sum(dim=(-2, -1), keepdim=True).expand(gram.shape)}

    def measure(self, block: Block) -> tuple[Measured, Tensor]:
        """See `_Solution.measure`."""
        return self.solution.measure(block)

    def look_again(self, pair: PairView) -> Measured:
        """See `_Solution.look_again`."""
        return self.solution.look_again(pair)

    def solve(self, blocks: Sequence[Block], measured: Sequence[Measured]) -> list[dict[Side, Coefficients]]:
        """See `_Solution.solve`."""
        return self.solution.solve(blocks, measured)

    def still(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Coefficients under which nothing moves."""
        return {"own": 0.0, "mixed": 0.0}, dict.fromkeys(_NUMBERS, 1.0) | {"moves": 0.0, "move": 0.0}

    def adjusted_grad(self, tall: Tall, matrices: Mapping[str, Tensor]) -> Tensor:
        """H = own g + mixed F, in scratch memory."""
        h = tall.combine(matrices["own"], tall.grad, tall.room("adjusted"))
        tall.add_combined(h, matrices["mixed"], tall.factor)
        return h


@dataclass(frozen=True)
class ProSGD(_ProRule):
    """F <- (1 - lr wd) F - lr h."""

    tall_state: ClassVar[tuple[str, ...]] = ()

    def apply(self, tall: Tall, matrices: Mapping[str, Tensor], numbers: Mapping[str, Amount]) -> None:
        """Moves the factors; those that stand have a rate of 0."""
        h = self.adjusted_grad(tall, matrices)
        tall.shrink(numbers["shrink"])
        tall.subtract(h, numbers["move"])


@dataclass(frozen=True)
class ProEfficient(_ProRule):
    """AdamW on the adjusted gradients, each factor with its own count of steps."""

    tall_state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def apply(self, tall: Tall, matrices: Mapping[str, Tensor], numbers: Mapping[str, Amount]) -> None:
        """One AdamW step: torch's fused one on a CPU, masked arithmetic where only the device knows who moves."""
        h = self.adjusted_grad(tall, matrices)
        first, second = tall.state["exp_avg"], tall.state["exp_avg_sq"]
        if tall.steps is not None:
            _fused(tall, h, first, second, tall.steps)
        else:
            _masked(tall, h, first, second, numbers)


@dataclass(frozen=True)
class ProFull(_ProRule):
    """AdamW on the equivalent gradient E = s (B hA + hB A), projected back on the factors (the paper's mode)."""

    tall_state: ClassVar[tuple[str, ...]] = ()

    amsgrad: bool
    state_dtype: torch.dtype

    def pair_state(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """Moments [out, in] of the equivalent gradient."""
        dtype = torch.float64 if lora_A.dtype == torch.float64 else self.state_dtype
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))
        shape = (lora_B.shape[0], lora_A.shape[1])
        return {name: torch.zeros(shape, dtype=dtype, device=lora_A.device) for name in names}

    def solve(self, blocks: Sequence[Block], measured: Sequence[Measured]) -> list[dict[Side, Coefficients]]:
        """The closed form with X = 0 (X cancels in E), and the Gram matrices for the second solution."""
        decided = []
        for block, found in zip(blocks, measured, strict=True):
            spectra = self.solution.spectra(block, found)
            own = self.solution.coefficients(block, spectra, found["cross"], torch.zeros_like(found["cross"]))
            alive, deltas = torch.diag_embed((~block.dead).double()), self.solution.deltas(block)
            grams = torch.cat([_padded_last(block, found, side) for side in SIDES])
            values, vectors = (part.chunk(2) for part in torch.linalg.eigh(grams))
            for index, side in enumerate(SIDES):
                own[side].matrices |= {"values": torch.diag_embed(values[index]), "vectors": vectors[index]}
                own[side].matrices["alive"] = alive
                own[side].numbers |= {"scaling": block.scaling, "delta": deltas[side][:, 0]}
            decided.append(own)
        return decided

    def apply_pair(
        self,
        tall: Mapping[Side, Tall],
        matrices: Mapping[Side, Mapping[str, Tensor]],
        numbers: Mapping[Side, Mapping[str, float]],
        state: Mapping[str, Tensor],
    ) -> None:
        """Steps 1 to 7 of the full mode for one pair."""
        A, B = tall["A"].factor, tall["B"].factor
        moving = {side: numbers[side]["moves"] > 0 for side in SIDES}
        h = {side: self._adjusted_of(tall[side], matrices[side]) * float(moving[side]) for side in SIDES}
        steps = int(max(numbers[side]["steps"] for side in SIDES if moving[side]))
        scaling = numbers["A"]["scaling"]
        grad_A, grad_B = _through_moments(A, B, h["A"], h["B"], scaling, steps, tall["A"].hyper, state)
        cross = (B.mT @ grad_B).double()
        spectra = Spectra.of(
            {side: matrices[side]["values"].diagonal() for side in SIDES},
            {side: matrices[side]["vectors"] for side in SIDES},
            {side: torch.full((1,), numbers[side]["delta"], dtype=torch.float64, device=A.device) for side in SIDES},
            torch.finfo(A.dtype).eps,
        )
        weight = torch.full((1, 1), scaling**-2, dtype=torch.float64, device=A.device)
        X = free_matrix(self.solution.x_mode, spectra, cross, weight)
        found = adjusted(spectra, cross, X, weight)
        alive = matrices["A"]["alive"]
        hyper = tall["A"].hyper
        both = moving["A"] and moving["B"]
        shrink = 1 - hyper["lr"] * hyper["weight_decay"]
        shrink = math.sqrt(shrink) if both else shrink
        moves = {}
        for side, grad in (("A", grad_A), ("B", grad_B)):
            own, mixed = (alive @ matrix @ alive for matrix in found[side])  # type: ignore[index]
            one = Tall(tall[side].factor, grad, {}, side == "A")  # type: ignore[index]
            move = one.combine(own.to(grad.dtype), grad)
            if both:
                one.add_combined(move, mixed.to(grad.dtype), one.factor)
            moves[side] = move
        for side in SIDES:
            if moving[side]:
                tall[side].shrink(shrink)
                tall[side].subtract(moves[side], tall[side].hyper["lr"])

    def _adjusted_of(self, tall: Tall, matrices: Mapping[str, Tensor]) -> Tensor:
        return self.adjusted_grad(tall, {n: matrices[n].to(tall.factor.dtype) for n in ("own", "mixed")})


def _padded_last(block: Block, found: Measured, side: Side) -> Tensor:
    """The Gram matrix again, with padding above its largest eigenvalue, so that padding comes last in its spectrum."""
    values, vectors = found[f"values_{side}"].clamp(min=0), found[f"vectors_{side}"]
    gram = (vectors * values.unsqueeze(-2)) @ vectors.mT
    if block.padding is None:
        return gram
    fill = 2 * trace(gram) + 1
    return gram + torch.diag_embed(block.padding * fill[:, None])


def _through_moments(
    A: Tensor,
    B: Tensor,
    hA: Tensor,
    hB: Tensor,
    scaling: float,
    step: int,
    hyper: Mapping[str, float],
    state: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """(s B^T N, s N A^T) with N the Adam direction of E = s (B hA + hB A); row blocks keep dense temporaries small."""
    grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
    correction1, correction2 = 1 - hyper["beta1"] ** step, 1 - hyper["beta2"] ** step
    rows = max(1, _BLOCK_BYTES // (A.shape[1] * A.element_size()))
    for begin in range(0, B.shape[0], rows):
        part = slice(begin, begin + rows)
        E = torch.addmm(B[part] @ hA, hB[part], A).mul_(scaling)
        first = state["exp_avg"][part].to(E.dtype).lerp_(E, 1 - hyper["beta1"])
        second = state["exp_avg_sq"][part].to(E.dtype).mul_(hyper["beta2"]).addcmul_(E, E, value=1 - hyper["beta2"])
        state["exp_avg"][part].copy_(first)
        state["exp_avg_sq"][part].copy_(second)
        if "max_exp_avg_sq" in state:
            second = torch.maximum(state["max_exp_avg_sq"][part].to(E.dtype), second)
            state["max_exp_avg_sq"][part].copy_(second)
        root = second.sqrt().div_(math.sqrt(correction2)).add_(hyper["eps"])
        N = first.div(correction1).div_(root)
        grad_A.addmm_(B[part].mT, N, alpha=scaling)
        grad_B[part] = (N @ A.mT) * scaling
    return grad_A, grad_B


def _fused(tall: Tall, h: Tensor, first: Tensor, second: Tensor, steps: Sequence[Tensor]) -> None:
    """Torch's fused AdamW over the factors that move."""
    parts = [[one] if h.ndim == 2 else list(one.unbind(0)) for one in (tall.factor, h, first, second)]
    if tall.moving is not None:
        parts = [[part[i] for i in tall.moving] for part in parts]
        steps = [steps[i] for i in tall.moving]
        if not steps:
            return
    hyper = tall.hyper
    # The kernel under torch.optim.adamw: its wrapper, made for whole models, costs more than the step of one factor.
    factors, grads, firsts, seconds = parts
    torch._fused_adamw_(
        factors,
        grads,
        firsts,
        seconds,
        [],
        list(steps),
        amsgrad=False,
        lr=hyper["lr"],
        beta1=hyper["beta1"],
        beta2=hyper["beta2"],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        maximize=False,
    )


def _masked(tall: Tall, h: Tensor, first: Tensor, second: Tensor, numbers: Mapping[str, Amount]) -> None:
    """The same with a rate of 0 for factors that stand, whose moments stay."""
    hyper, (moves, move, shrink) = tall.hyper, (torch.as_tensor(numbers[n]) for n in ("moves", "move", "shrink"))
    first.lerp_(h, (1 - hyper["beta1"]) * moves)
    second.lerp_(h.square(), (1 - hyper["beta2"]) * moves)
    root = (second.sqrt() / torch.as_tensor(numbers["correction2"]).sqrt()).add_(hyper["eps"])
    tall.factor.mul_(shrink)
    tall.factor.addcdiv_(first * (move / torch.as_tensor(numbers["correction1"])), root, value=-1)


def _weight(block: Block) -> Tensor:
    return block.scaling.square().reciprocal()[:, None, None]
