"""LoRA-RITE: an adaptive optimizer whose update of lora_B @ lora_A does not depend on how the product is factored.

"LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", arXiv 2410.20625v2 (ICLR 2025).

The idea: the same product has infinitely many factorizations, and Adam moves it differently for each. RITE divides the
other factor's magnitude out of each gradient, which leaves what depends on column spaces alone, and preconditions that
"unmagnified" gradient by the inverse root of its rank x rank second moment. Both moments live in a basis that moves,
so they are carried from each step's basis to the next.

| paper and authors' code | here |
|---|---|
| A^T = U_A R_A, B = U_B R_B | `basis` |
| unmagnified gradients R_B^-T gA, gB R_A^-1 | `RiteRule.measure` (their Gram matrices) |
| clipping and skipping of unmagnified gradients | `unmagnified_factor` |
| transport P V P^T and P M by P = U_new^T U_old | `transported`, `RiteRule.solve` |
| escaped mass rho | `escaped_mass` |
| second moment, bias-corrected decay | `decay_rate`, `RiteRule.solve` |
| H = V^(-1/2) | `inverse_root` |
| A <- A - lr (R_B^-1 Y_A + wd A) | `RiteRule.apply` |
| balance | `balance_factors` |

The full text could not be obtained: the paper is read through its abstract and secondary sources, the formulas through
the authors' torch code (gkevinyen5418/LoRA-RITE c9bb451), which they say differs from the paper's JAX original.

How it is computed. Nothing of size [n, rank] is decomposed: with A A^T = R^T R (Cholesky) the basis is U_A = A^T R^-1,
any orthonormal basis gives the same steps, and every unmagnified quantity is a small matrix times a gradient. The last
step's A is known from this step's A and the moment that moved it, so that the overlap of the new and the old basis
follows from A M_A^T and no basis is stored. Where the other factor is well-conditioned the moment is kept as
L_A = R_B^-1 M_A, the direction that A moves along: then A itself needs no product, and ten products of rank x n x rank
make a step. Elsewhere it is kept as M_A (twelve products), since L_A would carry the condition number in its rounding.

Departures, with reasons:
- Eigenvalues of V are cut at 0 before the root. The code lets rounding make them negative, whose NaN it replaces by 0:
  with a rank-one gradient in float32, 79 of 80 updates were silently lost.
- R^-1 is a pseudo-inverse with a cutoff, so that rank-deficient factors, rank above in or out, and B = 0 work.
- State survives `load_state_dict` (the code starts it anew), groups have their own settings, a missing or non-finite
  gradient leaves its pair alone (the code crashes or is poisoned).
- Small matrices are float64; tall products are float32, or float64 for float64 parameters and on accelerators. On a
  CPU a pair of a condition above 50 (the float32 Gram matrix has lost three of its seven digits there), and every
  float64 pair, gets a second pass over orthogonalized factors, which takes about four times as long.
- After something else wrote to a factor between steps (its version counter tells; a write through `.data` is not
  seen), moments are carried by the rotation nearest to what the overlap of the bases would be.
- A half without a gradient in one step stays; its moments are carried on, without decay.
- The paper's unconditional escaped mass is off by default, as in the code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from rankwise.errors import ConfigError
from rankwise.linalg.solve import trace
from rankwise.methods.base import Method, Slot, setting_faults
from rankwise.optimizers.engine import PairOptimizer, Source
from rankwise.optimizers.orthogonal import nearly_orthonormal
from rankwise.optimizers.rule import SIDES, Block, Coefficients, Half, Measured, PairView, Side, other
from rankwise.optimizers.tall import Amount, Tall

__all__ = ["LoRARITE", "LoRARITEOptimizer"]

_DOUBTFUL = 50.0
_WELL_CONDITIONED = 10.0
_SEEN = 1e-6
_PLAIN_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class LoRARITE(Method):
    """Moves lora_A and lora_B so that their product moves the same for every factorization.

    Args:
        betas: decays of the first and the second moment, both in [0, 1).
        eps: added to the root of the second moment, >= 0 (code: 1e-6).
        clip_unmagnified_grad: largest norm of all unmagnified gradients together; 0 is off (code: 1).
        update_skipping: a factor whose unmagnified gradient has an RMS above this sits out; 0 is off (code: 1).
        update_capping: largest RMS of a moment before it is applied; 0 is off (code).
        apply_escape: add the second moment that transport loses as a scalar (paper: always; code: off).
        balance_param: give both factors equal norms after each step; the product stays (code: off).
    """

    id: ClassVar[str] = "lora-rite"
    title: ClassVar[str] = "LoRA-RITE: Robust Invariant Transformation Equilibration for LoRA Optimization"
    source: ClassVar[str] = "arXiv:2410.20625v2"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (5e-5, 2e-4, 5e-4)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"official": {}}
    unclipped: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    clip_unmagnified_grad: float = 1.0
    update_skipping: float = 1.0
    update_capping: float = 0.0
    apply_escape: bool = False
    balance_param: bool = False

    def __post_init__(self) -> None:
        numbers = ("eps", "clip_unmagnified_grad", "update_skipping", "update_capping")
        faults = setting_faults(
            self, choices={}, numbers=dict.fromkeys(numbers, 0), wholes={}, flags=("apply_escape", "balance_param")
        )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"lora-rite.betas: {self.betas!r} are out of range; use two numbers in [0, 1)")
        if faults:
            raise ConfigError(faults)

    def make_optimizer(self, groups: Sequence[dict[str, Any]], *, lr: float) -> Optimizer:
        """The optimizer over these groups; pairs take the method's betas."""
        return LoRARITEOptimizer(
            groups,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            clip_unmagnified_grad=self.clip_unmagnified_grad,
            update_skipping=self.update_skipping,
            update_capping=self.update_capping,
            apply_escape=self.apply_escape,
            balance_param=self.balance_param,
        )


class LoRARITEOptimizer(PairOptimizer):
    """LoRA-RITE over the pairs of a PEFT model, AdamW over whatever else is trainable.

    Leave the trainer's gradient clipping off: clipping raw gradients is not invariant, and RITE clips by itself.

    Args:
        model_or_groups: any PEFT model with a LoRA adapter, or parameter groups (see PairOptimizer).
        lr: learning rate, >= 0; the product moves by about lr * scaling * (sqrt(in) + sqrt(out)) in spectral norm.
        betas: decays of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, >= 0.
        clip_unmagnified_grad: largest norm of all unmagnified gradients together; <= 0 is off.
        update_skipping: RMS of an unmagnified gradient above which a factor sits out; <= 0 is off.
        update_capping: largest RMS of a moment before it is applied; <= 0 is off.
        apply_escape: add the second moment that transport loses.
        balance_param: give both factors equal norms after each step.
        adapter_name: which adapter of the model.

    Raises:
        ConfigError: settings out of range, no pairs, or learning rates that differ between the halves of pairs (LoRA+).

    Source: arXiv 2410.20625v2; gkevinyen5418/LoRA-RITE c9bb451.

    Example:
        >>> import torch
        >>> A, B = torch.nn.Parameter(torch.eye(2, 3)), torch.nn.Parameter(torch.eye(4, 2))
        >>> pairs = {"kind": "lora_pair", "params": [A, B], "scaling": [2.0]}
        >>> optimizer = LoRARITEOptimizer([pairs], lr=1e-3)
        >>> (2.0 * B @ A).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model_or_groups: Source,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_unmagnified_grad: float = 1.0,
        update_skipping: float = 1.0,
        update_capping: float = 0.0,
        apply_escape: bool = False,
        balance_param: bool = False,
        adapter_name: str = "default",
    ) -> None:
        settings = {"clip_unmagnified_grad": clip_unmagnified_grad, "update_skipping": update_skipping}
        faults = [
            f"{name} is {value!r}: it must be a number; 0 is off"
            for name, value in {**settings, "update_capping": update_capping}.items()
            if not isinstance(value, int | float) or math.isnan(value)
        ]
        if faults:
            raise ConfigError(faults)
        rule = RiteRule(clip_unmagnified_grad, update_skipping, update_capping, apply_escape, balance_param)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "plain_eps": _PLAIN_EPS}
        told = {"rule": LoRARITE.id, "rule_settings": asdict(rule)}
        super().__init__(model_or_groups, rule, {**defaults, **told}, adapter_name)

    def _check_pair_group(self, group: Mapping[str, Any]) -> None:
        ratio = group.get("lr_ratio", group.get("loraplus_lr_ratio", 1.0))
        if ratio != 1:
            raise ConfigError(
                f"a learning-rate ratio of {ratio!r} between lora_B and lora_A (LoRA+) cannot be used with lora-rite: "
                "its step has no separate magnitudes to weigh; leave the ratio out"
            )


# --- equations ----------------------------------------------------------------------------------------------------


def basis(gram: Float[Tensor, "*b r r"], cutoff: float, *, on_host: bool) -> tuple[Tensor, Tensor]:
    """(R^-1, condition) with R^T R = gram: the columns of F^T R^-1 are an orthonormal basis of F's rows.

    R is triangular (Cholesky) where the Gram matrix allows it, else the symmetric root; on an accelerator, which would
    have to be waited for to know, it is always the root.

    Args:
        gram: F F^T [..., r, r], float64.
        cutoff: singular values of F at or below cutoff * (the largest) count as 0, and R^-1 is a pseudo-inverse.
        on_host: whether looking at the outcome costs no wait.

    Returns:
        R^-1 [..., r, r], and ||R|| ||R^-1|| / sqrt(r) [...] in Frobenius norms, between condition / sqrt(r) and
        condition * sqrt(r) (inf where a direction is missing, 1 for F = 0).

    Source: the decomposition A^T = U R of arXiv 2410.20625v2; which basis is free.
    """
    if not on_host:
        return _symmetric_basis(gram, cutoff)
    lower, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False).mT
    size = inverse.square().sum((-2, -1)) * trace(gram) / gram.shape[-1]
    condition = size.sqrt()
    doubtful = (failed > 0) | ~(condition * cutoff < 1)
    if bool(doubtful.any()):
        inverse[doubtful], condition[doubtful] = _symmetric_basis(gram[doubtful], cutoff)
    return inverse, condition


def _symmetric_basis(gram: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    largest = values[..., -1:].clamp(min=0)
    rounding = gram.shape[-1] * torch.finfo(gram.dtype).eps
    kept = values > max(cutoff**2, rounding) * largest
    root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    condition = (root.square().sum(-1) * values.clamp(min=0).sum(-1) / values.shape[-1]).sqrt()
    whole = kept.all(-1) | (largest[..., 0] == 0)
    condition = torch.where(whole, condition.clamp(min=1), torch.inf)
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, condition


def decay_rate(beta: Tensor, step: Tensor) -> Tensor:
    """Adam's bias correction folded into the decay: beta (1 - beta^(t-1)) / (1 - beta^t), 0 at t = 1."""
    t = step.clamp(min=1)
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def transported(overlap: Float[Tensor, "*b r r"], second: Float[Tensor, "*b r r"]) -> Float[Tensor, "*b r r"]:
    """sym(P V P^T): the second moment in the new basis."""
    moved = overlap @ second @ overlap.mT
    return (moved + moved.mT) / 2


def escaped_mass(before: Float[Tensor, "*b r r"], after: Float[Tensor, "*b r r"]) -> Float[Tensor, "*b"]:
    """What transport lost: the smaller of the largest eigenvalue gap and of the gap of the traces, both at least 0.

    Source: gkevinyen5418/LoRA-RITE c9bb451.
    """
    gap = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax(-1).clamp(min=0)
    return torch.minimum(gap, (trace(before) - trace(after)).clamp(min=0))


def inverse_root(
    second: Float[Tensor, "*b r r"], escaped: Float[Tensor, "*b"], eps: Float[Tensor, "*b"]
) -> tuple[Tensor, Tensor]:
    """(Q, h) with H = Q diag(h) Q^T and h = 1 / (sqrt(max(l, 0) + rho) + eps) over the eigenvalues l of V."""
    values, vectors = torch.linalg.eigh(second)
    root = (values.clamp(min=0) + escaped.unsqueeze(-1)).sqrt()
    return vectors, 1.0 / (root + eps.unsqueeze(-1))


def unmagnified_factor(squares: Sequence[Tensor], limit: float) -> Float[Tensor, ""]:
    """What all unmagnified gradients are multiplied by: limit / norm where their common norm is above the limit."""
    if limit <= 0:
        return torch.ones((), dtype=torch.float64)
    norm = torch.stack([square.sum().to(squares[0].device) for square in squares]).sum().sqrt()
    return torch.where(norm > limit, limit / norm, torch.ones_like(norm))


def balance_factors(norm_A: Tensor, norm_B: Tensor) -> tuple[Tensor, Tensor]:
    """(c_A, c_B) with c_A c_B = 1 that give both factors the same norm; 1e-6 keeps the ratio finite."""
    ratio = ((norm_B + 1e-6) / (norm_A + 1e-6)).sqrt()
    return ratio, 1.0 / ratio


@dataclass(frozen=True, slots=True)
class _Moment:
    """The new first moment, M = keep X + fresh gbar, from the stored one and the unmagnified gradient."""

    keep: Tensor
    fresh: Tensor

    def square(self, block: Block, found: Measured, side: Side) -> Tensor:
        """M M^T."""
        mixed = self.keep @ found[f"moment_grad_{side}"] @ self.fresh.mT
        old = self.keep @ block.halves[side].products["moments"] @ self.keep.mT
        return old + mixed + mixed.mT + self.fresh @ found[f"grad_{side}"] @ self.fresh.mT


@dataclass(frozen=True)
class RiteRule:
    """One step of LoRA-RITE; the fields are the settings of LoRARITEOptimizer, of which <= 0 is off."""

    clip: float
    skip: float
    cap: float
    escape: bool
    balance: bool

    tall_state: ClassVar[tuple[str, ...]] = ("exp_avg",)
    """L = R_other^-1 M where `along` is 1 (the direction of the last step), else M."""
    reduced_state: ClassVar[tuple[str, ...]] = ("exp_avg",)
    square_state: ClassVar[tuple[str, ...]] = ("precond", "basis")
    """V in the basis of the other factor, and R^-1 of this side's own factor at the last step."""
    number_state: ClassVar[Mapping[str, float]] = {
        "escape": 0.0,
        "along": 0.0,
        "moved": 0.0,
        "shrunk": 1.0,
        "balanced": 1.0,
    }
    """rho; how the moment is kept; and what the last step did: F <- balanced (shrunk F - moved L)."""

    def reduce(self, tall: Tall) -> dict[str, Tensor]:
        """F F^T, g g^T and F X^T with the moment X; capping and balancing need three more."""
        F, g, X = tall.factor, tall.grad, tall.state["exp_avg"]
        found = {"gram": tall.product(F, F), "grad": tall.product(g, g), "moment": tall.product(F, X)}
        if self.cap > 0 or self.balance:
            found["moments"] = tall.product(X, X)
            found |= {"moment_grad": tall.product(X, g), "factor_grad": tall.product(F, g)}
        return found

    def measure(self, block: Block) -> tuple[Measured, Tensor]:
        """R^-1 of both factors, Gram matrices of unmagnified gradients, and U^T F_old (step 1 and half of step 4)."""
        grams = torch.cat([block.gram(side) for side in SIDES])
        inverses, conditions = basis(grams, block.epsilon * grams.shape[-1], on_host=block.on_host)
        halves = dict(zip(SIDES, inverses.chunk(2), strict=True))
        measured: Measured = {}
        for side, condition in zip(SIDES, conditions.chunk(2), strict=True):
            across, own = halves[other(side)], block.halves[side]
            measured[f"inverse_{side}"] = halves[side]
            measured[f"grad_{side}"] = across.mT @ own.products["grad"] @ across
            out = _outward(own.state["along"], block.halves[other(side)].state["basis"])
            old = _old_factor(own.products["gram"], own.products["moment"] @ out.mT, own.state)
            measured[f"old_{side}"] = halves[side].mT @ old
            measured[f"condition_{side}"] = condition.clone()
            if self.cap > 0 or self.balance:
                measured[f"moment_grad_{side}"] = own.products["moment_grad"] @ across
                measured[f"factor_grad_{side}"] = own.products["factor_grad"] @ across
        doubtful = conditions.reshape(2, -1).amax(0) > _DOUBTFUL
        if block.epsilon < torch.finfo(torch.float32).eps:  # float64 parameters deserve float64 results
            doubtful = torch.ones_like(doubtful)
        return measured, doubtful

    def look_again(self, pair: PairView) -> Measured:
        """The same from orthogonalized factors, whose Gram matrices do not square the condition number."""
        measured: Measured = {}
        rows = {side: nearly_orthonormal(pair.tall[side], pair.epsilon)[1] for side in SIDES}
        turned = {side: _orthonormal(pair.tall[side], rows[side], pair.epsilon) for side in SIDES}
        for side in SIDES:
            tall, state, across = pair.tall[side], pair.state[side], other(side)
            measured[f"inverse_{side}"] = turned[side][1]
            gbar = tall.combine(turned[across][1].mT.to(tall.grad.dtype), tall.grad)
            measured[f"grad_{side}"] = tall.product(gbar, gbar).double()
            out = _outward(state["along"], pair.state[across]["basis"])
            direction = tall.combine(out.to(tall.grad.dtype), tall.state["exp_avg"])
            old = _old_factor(tall.product(rows[side], tall.factor), tall.product(rows[side], direction), state)
            measured[f"old_{side}"] = turned[side][0].mT @ old.double()
            measured[f"condition_{side}"] = torch.full((), torch.inf, dtype=torch.float64)
            if self.cap > 0 or self.balance:
                measured[f"moment_grad_{side}"] = tall.product(tall.state["exp_avg"], gbar).double()
                measured[f"factor_grad_{side}"] = tall.product(tall.factor, gbar).double()
        return measured

    def solve(self, blocks: Sequence[Block], measured: Sequence[Measured]) -> list[dict[Side, Coefficients]]:
        """Steps 2 to 9 of every pair; clipping looks at all blocks together."""
        for block, found in zip(blocks, measured, strict=True):
            alive = (~block.dead).double()
            for side in SIDES:
                _nearest_rotation(block.halves[side], found, f"old_{side}")
                found[f"inverse_{side}"] *= alive[:, :, None]  # rounding must not reach indices that are zero in both
        squares = [
            {side: trace(found[f"grad_{side}"]) * self._taken(block, found, side) for side in SIDES}
            for block, found in zip(blocks, measured, strict=True)
        ]
        factor = unmagnified_factor([s for one in squares for s in one.values()], self.clip)
        return [
            self._solved(block, found, factor.to(block.rank.device))
            for block, found in zip(blocks, measured, strict=True)
        ]

    def _taken(self, block: Block, found: Measured, side: Side) -> Tensor:
        """1 where the unmagnified gradient is used, 0 where it is skipped (step 2) or the factor does not move."""
        half = block.halves[side]
        taken = half.moves
        if self.skip > 0:
            mean = trace(found[f"grad_{side}"]) / (block.rank * half.length)
            taken = taken & (mean.clamp(min=0).sqrt() <= self.skip)
        return taken.double()

    def _solved(self, block: Block, found: Measured, clip: Tensor) -> dict[Side, Coefficients]:
        taken = {side: self._taken(block, found, side) * clip for side in SIDES}
        second = {side: self._second_moment(block, found, side, taken[side]) for side in SIDES}
        roots, powers = inverse_root(
            torch.cat([second[side] for side in SIDES]),
            torch.cat([block.halves[side].state["escape"] for side in SIDES]),
            block.hyper["eps"].repeat(2),
        )
        decided: dict[Side, Coefficients] = {}
        moments: dict[Side, _Moment] = {}
        for side, Q, h in zip(SIDES, roots.chunk(2), powers.chunk(2), strict=True):
            half, across = block.halves[side], found[f"inverse_{other(side)}"]
            rate = torch.where(half.moves, decay_rate(block.hyper["beta1"], half.steps), 1.0)
            along = found[f"condition_{other(side)}"] <= _WELL_CONDITIONED if block.on_host else half.moves & False
            stored = _outward(half.state["along"], block.halves[other(side)].state["basis"])
            moment = _Moment(
                keep=found[f"old_{other(side)}"] @ stored * rate[:, None, None],
                fresh=(Q * h[:, None, :]) @ Q.mT * ((1 - rate) * taken[side])[:, None, None],
            )
            inward, moments[side] = _outward(~along, across), moment
            decided[side] = Coefficients(
                {
                    "keep": inward @ moment.keep,
                    "fresh": inward @ moment.fresh @ across.mT,
                    "out": _outward(along, across),
                },
                {
                    "along": along.double(),
                    "move": torch.where(half.moves, half.rate, 0.0),
                    "shrink": torch.where(half.moves, 1 - half.rate * block.hyper["weight_decay"], 1.0),
                    "balance": torch.ones_like(block.rank),
                },
            )
        if self.cap > 0:
            for side in SIDES:
                mean = trace(moments[side].square(block, found, side)) / (block.rank * block.halves[side].length)
                decided[side].numbers["move"] /= (mean.clamp(min=0).sqrt() / self.cap).clamp(min=1)
        if self.balance:
            self._balance(block, found, decided, moments)
        for side in SIDES:
            numbers = decided[side].numbers
            block.keep_state(side, "precond", second[side])
            block.keep_state(side, "along", numbers["along"])
            block.keep_state(side, "moved", numbers["move"])
            block.keep_state(side, "shrunk", numbers["shrink"])
            block.keep_state(side, "balanced", numbers["balance"])
            block.keep_state(side, "basis", found[f"inverse_{side}"])
        return decided

    def _second_moment(self, block: Block, found: Measured, side: Side, taken: Tensor) -> Tensor:
        """V after transport, escape and this step's gradient (steps 4 to 6)."""
        half, across = block.halves[side], block.halves[other(side)]
        P = _contraction(found[f"old_{other(side)}"] @ across.state["basis"], block.rank)
        before = half.state["precond"]
        after = transported(P, before)
        rate = torch.where(half.moves, decay_rate(block.hyper["beta2"], half.steps), 1.0)
        if self.escape:
            block.keep_state(side, "escape", rate * (half.state["escape"] + escaped_mass(before, after)))
        fresh = found[f"grad_{side}"] * (taken.square() / half.length)[:, None, None]
        return rate[:, None, None] * after + (1 - rate)[:, None, None] * fresh

    def _balance(
        self,
        block: Block,
        found: Measured,
        decided: Mapping[Side, Coefficients],
        moments: Mapping[Side, "_Moment"],
    ) -> None:
        """Step 11, from the norms that the moved factors will have."""
        norms = {}
        for side in SIDES:
            products, across, moment = block.halves[side].products, found[f"inverse_{other(side)}"], moments[side]
            move, shrink = decided[side].numbers["move"], decided[side].numbers["shrink"]
            along = products["moment"] @ moment.keep.mT + found[f"factor_grad_{side}"] @ moment.fresh.mT
            cross = trace(along @ across.mT)
            direction = trace(across @ moment.square(block, found, side) @ across.mT)
            square = shrink.square() * trace(products["gram"]) - 2 * shrink * move * cross + move.square() * direction
            norms[side] = square.clamp(min=0).sqrt()
        both = block.halves["A"].moves & block.halves["B"].moves
        for side, scale in zip(SIDES, balance_factors(norms["A"], norms["B"]), strict=True):
            decided[side].numbers["balance"] = torch.where(both, scale, torch.ones_like(scale))

    def still(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Coefficients under which nothing moves."""
        return {"keep": 1.0, "fresh": 0.0, "out": 1.0}, {"along": 1.0, "move": 0.0, "shrink": 1.0, "balance": 1.0}

    def apply(self, tall: Tall, matrices: Mapping[str, Tensor], numbers: Mapping[str, Amount]) -> None:
        """X <- keep X + fresh g (steps 7 and 8), F <- shrink F - move out X (step 10), F <- balance F (step 11)."""
        moment, along = tall.state["exp_avg"], numbers["along"]
        new = tall.combine(matrices["fresh"], tall.grad, tall.room("new"))
        tall.add_combined(new, matrices["keep"], moment)
        moment.copy_(new)
        tall.shrink(numbers["shrink"])
        direct = along == 1 if isinstance(along, float) else tall.scratch is not None and bool((along == 1).all())
        tall.subtract(moment if direct else tall.combine(matrices["out"], moment, new), numbers["move"])
        if self.balance:
            tall.shrink(numbers["balance"])


def _outward(along: Tensor, inverse: Tensor) -> Tensor:
    """What turns a stored moment into the direction of its step: nothing where it lies along it, or R_other^-1."""
    return torch.where(
        along[..., None, None] != 0, torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device), inverse
    )


def _old_factor(own: Tensor, along: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Y F_old^T from Y F^T and Y L^T, with F_old = (F / balanced + moved L) / shrunk."""
    balanced, moved, shrunk = (state[name][..., None, None] for name in ("balanced", "moved", "shrunk"))
    return (own / balanced + moved * along) / shrunk


def _orthonormal(tall: Tall, rows: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(T, R^-1): T^T makes nearly orthonormal rows of F exactly so, U^T = T^T rows, and R = U^T F^T.

    R is measured against F itself, so that R^-1 has nothing outside F's own directions. Those with a singular value at
    or below r eps * (the largest) are left out of both.
    """
    r = tall.rank
    near, turn = torch.linalg.eigh(tall.product(rows, rows).double())
    inverse = turn * torch.where(near > r * epsilon * near[-1], near.clamp(min=1e-300).rsqrt(), 0.0)
    R = inverse.mT @ tall.product(rows, tall.factor).double()
    left, sizes, right = torch.linalg.svd(R)
    held = sizes > r * epsilon * sizes[0]
    return inverse @ (left * held), right.mT * torch.where(held, 1.0 / torch.where(held, sizes, 1.0), 0.0)


def _nearest_rotation(half: Half, found: Measured, name: str) -> None:
    """For edited factors, U^T F_old such that the overlap with the old basis is the rotation nearest to it.

    How far an edit turned the basis is not known apart from the step before it: the polar factor keeps the moments'
    directions and sizes where the edit left the factor's column space alone.
    """
    if half.edited is None:
        return
    left, sizes, right = torch.linalg.svd(found[name] @ half.state["basis"])
    turned = (left * (sizes > _SEEN).to(left)[:, None, :]) @ right @ torch.linalg.pinv(half.state["basis"])
    found[name] = torch.where(half.edited[:, None, None], turned, found[name])


def _contraction(overlap: Tensor, rank: Tensor) -> Tensor:
    """The overlap of two orthonormal bases, scaled down where its norm is above any that such an overlap can have.

    It is so after an edit that nobody saw (through `.data`): moments must not grow by it.
    """
    size = overlap.square().sum((-2, -1))
    return overlap * torch.where(size > 1.01 * rank, (rank / size).sqrt(), 1.0)[:, None, None]
