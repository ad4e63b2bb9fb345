"""LoRA-GGPO and LoRA-MGPO: train at a perturbed weight, so that the minimum found is a flat one.

Version 1 of arXiv 2502.14538 (20 Feb 2025): "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via
Gradient-Guided Perturbation Optimization". Version 2 (29 May 2025) and later, EMNLP Findings 2025: "LoRA-MGPO:
Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation Optimization". One arXiv number names
two algorithms: sigma and the small beta belong to GGPO (`GGPO`, id ggpo), rho and the decay of a gradient norm to MGPO
(`MGPO`, id mgpo).

The idea: a low-rank update can end in a sharp minimum of the full weight space, which a search for flatness in the
space of the two factors does not see. So loss and gradients are taken at W' + E with W' = W + s B A, in the one forward
and backward pass of an ordinary step. GGPO draws E at random, larger in rows with a large weight or gradient; MGPO
takes the optimizer's momentum for a direction and the inverse of a mean gradient norm for a size.

| paper | here |
|---|---|
| v1, eq. 6 and 8: E_ij ~ N(0, sigma^2 / n (norm(W'_i)^2 + beta norm(G^_i)^2)) | `noise_std` |
| v1: norm(W'_i) of the merged weight | `linalg.gram.updated_row_squares` |
| v1: G^ = s (dB A + B dA), the product rule's surrogate of the gradient | `surrogate_gradient` |
| Flat-LoRA, arXiv 2409.14396: cosine ramp of the noise | `cosine_ramp` |
| v2: E = -rho D / norm(D) min(1 / gbar, 10), D = s (M_B A + B M_A) | `momentum_factor` |
| v2: gbar, running mean of norm(G^) | `running_mean` |

Only abstracts of the papers could be obtained. GGPO has no code of its authors: formula and defaults are those of a
third-party implementation that cites eq. 6 and 8, not verified against the paper. MGPO follows its authors' code,
llm172/LoRA-MGPO b45656c.

Departures from that code and from third-party GGPOs, with reasons:
- The weight is never written; E lives in the two passes alone. Adding and subtracting it in the weight's own dtype
  leaves rounding behind at every step (60 % of the entries after 100 steps), so that the base drifts away.
- The gradient E^T g that flows through E is kept, and row norms are those of the merged weight without the dense
  product (Gram forms). One third-party GGPO drops the first and takes one mean norm a layer for the second.
- gbar is updated once an optimizer step, from the clipped gradient; the code does it at every micro-batch.
- An optimizer without a momentum of gradients gets one of our own, said in the log; the code then does not perturb.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.perturbation import (
    LowRank,
    RowNoise,
    Scratch,
    base_products,
    perturbed_layers,
    weight_row_squares,
)
from rankwise.adapters.stacks import LayerStack, stack_layers, stacked
from rankwise.calibration.processes import process_index
from rankwise.errors import CheckpointError, ConfigError
from rankwise.linalg.gram import gram_norm, gram_row_squares, updated_row_squares
from rankwise.linalg.random import derived_seed
from rankwise.methods.base import Budget, Method, Slot, setting_faults
from rankwise.methods.perturbing import PerturbationSchedule, like, state_faults
from rankwise.methods.schedule import Scene, Schedule

__all__ = ["GGPO", "MGPO", "cosine_ramp", "momentum_factor", "noise_std", "running_mean", "surrogate_gradient"]

_TINY: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class GGPO(Method):
    """Trains under random noise on every adapted weight, sized row by row by weight and gradient norms.

    Args:
        sigma: relative size of the noise, >= 0; 0 is plain LoRA. 0.03 [secondary: third-party code, not verified].
        beta: weight of the squared gradient norm, >= 0; 0 is Flat-LoRA. 0.01 [secondary, as sigma].
        norm_ema: decay of a running mean of the squared gradient norms, in [0, 1); 0 takes the last step's alone (v1).
        ramp: `cosine` lets sigma grow from 0 over the run, as Flat-LoRA's code does; `none` keeps it.
        noise_scope: `shared` draws one noise for all processes, so that they equal one process with the global batch;
            `rank` one for each, so that their mean gradient varies less.
    """

    id: ClassVar[str] = "ggpo"
    title: ClassVar[str] = (
        "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization"
    )
    source: ClassVar[str] = "arXiv:2502.14538v1"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (5e-5, 2e-4, 1e-3)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "flat-lora": {"sigma": 0.05, "beta": 0.0, "ramp": "cosine"}
    }

    sigma: float = 0.03
    beta: float = 0.01
    norm_ema: float = 0.0
    ramp: Literal["none", "cosine"] = "none"
    noise_scope: Literal["shared", "rank"] = "shared"

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={"ramp": ("none", "cosine"), "noise_scope": ("shared", "rank")},
            numbers={"sigma": 0, "beta": 0, "norm_ema": 0},
            wholes={},
        )
        if faults := [*faults, *_decay_faults(self, "norm_ema")]:
            raise ConfigError(faults)

    def make_schedule(self, scene: Scene) -> Schedule:
        """Noise around the passes of every step; nothing at all at sigma 0.

        Raises:
            ModelError: a base weight that is sharded already, trained, or not in memory.
        """
        return PerturbationSchedule(self.id, _Noise(self, scene))

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What a step will cost, and a warning of a sigma that drowns the weights."""
        if self.sigma == 0:
            return ("ggpo: sigma is 0, so this is plain LoRA",)
        told: tuple[str, ...] = (
            "ggpo: a training step takes about 1.4 times as long as with plain LoRA (2.1 times over 4-bit or 8-bit "
            "layers, where a second product carries the noise), measured on a CPU",
        )
        if self.sigma > 0.2:
            told += (f"ggpo: warning: sigma {self.sigma:g} is noise of that share of every weight; use 0.2 or less",)
        return told


@dataclass(frozen=True, kw_only=True)
class MGPO(Method):
    """Trains at a step along the optimizer's momentum, sized by the inverse of each layer's mean gradient norm.

    Args:
        rho: size of the step, >= 0; 0 is plain LoRA.
        norm_decay: b, decay of the running mean of the gradient norm, in [0, 1).
        max_scale: the largest inverse of the mean gradient norm, > 0; 10 [official code].
        direction: -1 looks ahead along the descent, as the authors' code; 1 climbs, as SAM does.
        own_momentum: `auto` keeps a momentum of our own where the optimizer has none of the gradients (8-bit,
            Adafactor, Lion, pair optimizers), `always` everywhere, `never` refuses such an optimizer.
        mu: decay of our own momentum, in [0, 1). The authors set Adam's beta1 to it; that is the trainer's
            (`adam_beta1`) and no preset changes it.
    """

    id: ClassVar[str] = "mgpo"
    title: ClassVar[str] = (
        "LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation Optimization"
    )
    source: ClassVar[str] = "arXiv:2502.14538v2"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (2e-5, 1e-4, 1e-3)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "mgpo-nlu": {"rho": 0.05, "norm_decay": 0.9, "mu": 0.9},
        "mgpo-nlg": {"rho": 0.01, "norm_decay": 0.8, "mu": 0.8},
    }

    rho: float = 0.05
    norm_decay: float = 0.9
    max_scale: float = 10.0
    direction: Literal[-1, 1] = -1
    own_momentum: Literal["auto", "always", "never"] = "auto"
    mu: float = 0.9

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={"direction": (-1, 1), "own_momentum": ("auto", "always", "never")},
            numbers={"rho": 0, "norm_decay": 0, "max_scale": 0, "mu": 0},
            wholes={},
        )
        faults += _decay_faults(self, "norm_decay", "mu")
        if self.max_scale == 0:
            faults.append("mgpo.max_scale: 0 leaves no perturbation; use a number above 0, or rho: 0 for plain LoRA")
        if faults:
            raise ConfigError(faults)

    def make_schedule(self, scene: Scene) -> Schedule:
        """A low-rank term around the passes of every step but the first; nothing at all at rho 0."""
        return PerturbationSchedule(self.id, _Momentum(self, scene))

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What a step will cost, and that beta1 is the trainer's."""
        if self.rho == 0:
            return ("mgpo: rho is 0, so this is plain LoRA",)
        return (
            "mgpo: a training step takes about 1.1 times as long as with plain LoRA, measured on a CPU",
            f"mgpo: the authors train with Adam's beta1 = mu ({self.mu:g} here); beta1 is the trainer's (adam_beta1) "
            "and is left alone: give plain LoRA the same before you compare",
        )


# --- equations, in the papers' order ------------------------------------------------------------------------------


def surrogate_gradient(
    lora_A: Float[Tensor, "*b r in"],
    lora_B: Float[Tensor, "*b out r"],
    change_A: Float[Tensor, "*b r in"],
    change_B: Float[Tensor, "*b out r"],
) -> tuple[Float[Tensor, "*b out q"], Float[Tensor, "*b q in"]]:
    """Factors L = [dB, B] and R = [A; dA] of dB A + B dA, by the product rule; s L R is G^ of gradients, D of momenta.

    G^ is no estimate of the gradient G of the weight: its share of |G| falls with the rank and rises with alpha.

    Source: arXiv 2502.14538v1 [secondary: third-party code that cites eq. 6 and 8]; llm172/LoRA-MGPO b45656c.
    """
    return torch.cat([change_B, lora_B], dim=-1), torch.cat([lora_A, change_A], dim=-2)


def noise_std(
    weight_squares: Float[Tensor, "*b out"],
    gradient_squares: Float[Tensor, "*b out"],
    *,
    sigma: float,
    beta: float,
    in_features: int,
) -> Float[Tensor, "*b out"]:
    """Standard deviation of every entry of row i of E: sigma sqrt((|W'_i|^2 + beta |G^_i|^2) / in).

    Source: arXiv 2502.14538v1, eq. 6 and 8 [secondary]; with beta = 0 Flat-LoRA, arXiv 2409.14396.
    """
    return sigma * ((weight_squares + beta * gradient_squares) / in_features).sqrt()


def cosine_ramp(step: int, max_steps: int) -> float:
    """(1 - cos(pi t)) / 2 at step `step` (from 1), t the share of the run before it: 0 at the first step.

    Source: the authors' code of Flat-LoRA, arXiv 2409.14396.
    """
    return (1 - math.cos(math.pi * min(1.0, (step - 1) / max(1, max_steps)))) / 2


def running_mean(old: Float[Tensor, "n *k"], new: Float[Tensor, "n *k"], decay: float) -> Float[Tensor, "n *k"]:
    """The mean decay * old + (1 - decay) * new, layer by layer; the first value (old is NaN) is `new` itself.

    A layer with a non-finite number in `new` keeps its old entry, and is first reached by its next value.

    Source: llm172/LoRA-MGPO b45656c.
    """
    mean = torch.where(old.isnan(), new, decay * old + (1 - decay) * new)
    return torch.where(_finite(new), mean, old)


def momentum_factor(
    norm: Float[Tensor, "n"],
    gbar: Float[Tensor, "n"],
    *,
    rho: float,
    max_scale: float,
    direction: int,
) -> Float[Tensor, "n"]:
    """The c of E = c D: direction rho / |D| min(1 / (gbar + 1e-12), max_scale); 0 where it cannot be told.

    That is where |D| is at most 1e-12 or not finite, or gbar has no value yet (NaN).

    Source: llm172/LoRA-MGPO b45656c.
    """
    scale = (1 / (gbar + _TINY)).clamp(max=max_scale)
    return torch.where(norm.isfinite() & gbar.isfinite() & (norm > _TINY), direction * rho * scale / norm, 0.0)


def _finite(values: Float[Tensor, "n *k"]) -> Tensor:
    """Which layers hold finite numbers only, [n, 1, ...]."""
    return values.reshape(len(values), -1).isfinite().all(dim=1).view(-1, *[1] * (values.dim() - 1))


def _decay_faults(method: Method, *keys: str) -> list[str]:
    values = {key: getattr(method, key) for key in keys}
    return [
        f"{method.id}.{key}: {value!r} is out of range; use a number below 1"
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf
    ]


# --- the schedule slot --------------------------------------------------------------------------------------------


class _Noise:
    """GGPO: E is drawn for each layer and step; the norms of W' are of this step, those of G^ of the step before."""

    def __init__(self, method: GGPO, scene: Scene) -> None:
        self.layers: Mapping[str, AdaptedLayer] = dict(scene.layers) if method.sigma > 0 else {}
        self._method, self._seed, self._max_steps = method, scene.seed, 1
        self._weights = {name: weight_row_squares(layer) for name, layer in self.layers.items()}
        learned = self._weights if method.beta > 0 else {}
        self._gradients = {name: torch.full_like(squares, math.nan) for name, squares in learned.items()}
        self._offsets = {
            name: (pair.lora_A, -pair.lora_B, base_products(layer, pair.lora_A.to(layer.base.device)))
            for name, layer in self.layers.items()
            if (pair := scene.offsets.get(name)) is not None
        }
        self._stacks: list[LayerStack] = []
        self._sums: list[tuple[tuple[str, ...], Tensor]] = []
        self._lost: list[Tensor] = []
        self._scratch = Scratch()
        self.perturbed = perturbed_layers(self.layers, self._scratch)

    def begin(self, optimizer: Optimizer, max_steps: int, step: int) -> None:
        self._max_steps = max_steps
        self._weights, self._gradients = _beside(self._weights, self.layers), _beside(self._gradients, self.layers)
        for name, parts in self._offsets.items():
            A0, B0, products = (part.to(self.layers[name].lora_A.device) for part in parts)
            self._offsets[name] = (A0, B0, products)
        self._stacks = stack_layers(self.layers, {name: len(A0) for name, (A0, _, _) in self._offsets.items()})
        self._lost = [torch.zeros((), dtype=torch.bool, device=stack.device) for stack in self._stacks]

    def remarks(self) -> tuple[str, ...]:
        added = [name for name, one in self.perturbed.items() if one.way == "add"]
        if not added:
            return ()
        return (
            f"ggpo: the noise of {len(added)} of {len(self.perturbed)} layers ({added[0]} first) takes a second "
            "product: they are packed or have a forward of their own",
        )

    def switch_on(self, step: int) -> None:
        method = self._method
        sigma = method.sigma * (cosine_ramp(step, self._max_steps) if method.ramp == "cosine" else 1.0)
        scope = (process_index(),) if method.noise_scope == "rank" else ()
        self._sums = []
        for index, stack in enumerate(self._stacks if sigma > 0 else ()):
            weights, gradients = self._squares(stack)
            std = noise_std(weights, gradients, sigma=sigma, beta=method.beta, in_features=stack.in_features)
            usable = _finite(std)
            std = torch.where(usable, std, 0.0)
            for name, own in zip(stack.names, std, strict=True):
                self.perturbed[name].by = RowNoise(derived_seed(self._seed, "ggpo", step, name, *scope), own)
            parts = (weights, gradients, stack.in_features * std.square())
            self._sums.append((stack.names, torch.stack([torch.where(usable, part, 0.0).sum(dim=1) for part in parts])))
            self._lost[index] |= ~usable.all()

    def _squares(self, stack: LayerStack) -> tuple[Float[Tensor, "n out"], Float[Tensor, "n out"]]:
        """|W'_i|^2 and |G^_i|^2; before the first gradient G^ counts as 0 [inferred]."""
        A, B = stack.factors()
        products = torch.stack([base_products(layer, rows) for layer, rows in zip(stack.layers, A, strict=True)])
        if stack.names[0] in self._offsets:
            A0, B0, products0 = (stacked(p) for p in zip(*(self._offsets[n] for n in stack.names), strict=True))
            A, B, products = torch.cat([A, A0], -2), torch.cat([B, B0], -1), torch.cat([products, products0], -1)
        weights = updated_row_squares(stack.of(self._weights), products, A, B, stack.scaling)
        return weights, stack.of(self._gradients).nan_to_num(nan=0.0) if self._gradients else torch.zeros_like(weights)

    def switch_off(self) -> None:
        for one in self.perturbed.values():
            one.by = None
        self._scratch.forget()

    def learn(self) -> bool:
        reached = _reached(self._stacks if self._gradients else [])
        for stack in reached:
            found = stack.scaling**2 * gram_row_squares(*surrogate_gradient(*stack.factors(), *stack.gradients()))
            mean = running_mean(stack.of(self._gradients), found, self._method.norm_ema)
            self._gradients.update(zip(stack.names, mean, strict=True))
        return bool(reached or not self._gradients)

    def figures(self, layers: Collection[str]) -> dict[str, float]:
        if not self._sums:
            return {}
        weights, gradients, noise = _told(self._sums, layers).sum(dim=1).tolist()
        if not weights:
            return {}
        return {"gradient_share": self._method.beta * gradients / weights, "noise": math.sqrt(noise / weights)}

    def lost(self) -> bool:
        return any(bool(lost) for lost in self._lost)

    def memory_bytes(self) -> int:
        offsets = [part for parts in self._offsets.values() for part in parts]
        kept = [*self._weights.values(), *self._gradients.values(), *offsets]
        return sum(tensor.nbytes for tensor in kept) + self._scratch.memory_bytes

    def state(self) -> dict[str, Tensor]:
        return {f"gradient_squares.{name}": value.clone() for name, value in self._gradients.items()}

    def load(self, state: Mapping[str, Any]) -> list[str]:
        faults = state_faults(self.state(), state)
        if not faults:
            self._gradients = {n: like(state[f"gradient_squares.{n}"], old) for n, old in self._gradients.items()}
        return faults

    def close(self) -> None:
        for one in self.perturbed.values():
            one.close()
        self._scratch.release()


class _Momentum:
    """MGPO: a term c D along the momentum that the last step left, as two factors of rank 2 r."""

    def __init__(self, method: MGPO, scene: Scene) -> None:
        self.layers: Mapping[str, AdaptedLayer] = dict(scene.layers) if method.rho > 0 else {}
        self._method = method
        self._gbar = {name: torch.tensor(math.nan) for name in self.layers}
        self._own_A: dict[str, Tensor] = {}
        self._own_B: dict[str, Tensor] = {}
        self._optimizer: Optimizer | None = None
        self._key: str | None = None
        self._stacks: list[LayerStack] = []
        self._sums: list[tuple[tuple[str, ...], Tensor]] = []
        self._lost: list[Tensor] = []
        self.perturbed = perturbed_layers(self.layers, Scratch())

    def begin(self, optimizer: Optimizer, max_steps: int, step: int) -> None:
        self._optimizer = optimizer
        self._key = None if self._method.own_momentum == "always" else _momentum_key(optimizer)
        self._gbar = _beside(self._gbar, self.layers)
        self._stacks = stack_layers(self.layers)
        self._lost = [torch.zeros((), dtype=torch.bool, device=stack.device) for stack in self._stacks]
        if self._key is not None:
            self._own_A, self._own_B = {}, {}
        elif self.layers:
            self._begin_own(type(optimizer).__name__, step)

    def _begin_own(self, kind: str, step: int) -> None:
        if self._method.own_momentum == "never":
            raise ConfigError(
                f"mgpo.own_momentum: never, and {kind} keeps no momentum of the gradients that could be read; use "
                "auto, or an optimizer such as AdamW or SGD with momentum"
            )
        if step > 0 and not self._own_A:
            raise CheckpointError(
                f"mgpo keeps a momentum of its own beside {kind}, and the state after step {step} has none: resume "
                "with the optimizer and the own_momentum of the run"
            )
        if not self._own_A:
            self._own_A, self._own_B = self._zeros("A"), self._zeros("B")
        self._own_A, self._own_B = _beside(self._own_A, self.layers), _beside(self._own_B, self.layers)

    def remarks(self) -> tuple[str, ...]:
        if not self._own_A:
            return ()
        kind = type(self._optimizer).__name__
        return (f"mgpo: a float32 momentum of our own, decay {self._method.mu:g}, stands in for one of {kind}",)

    def switch_on(self, step: int) -> None:
        method = self._method
        self._sums = []
        for index, whole in enumerate(self._stacks if step > 1 else ()):
            found = [self._momentum(*one) for one in zip(whole.names, whole.lora_A, whole.lora_B, strict=True)]
            momenta = [pair for pair in found if pair is not None]
            if not momenta:
                continue
            stack = whole.only(pair is not None for pair in found)
            M_A, M_B = (stacked([pair[side] for pair in momenta]) for side in (0, 1))
            left, right = surrogate_gradient(*stack.factors(), M_A, M_B)
            norm, gbar = stack.scaling * gram_norm(left, right), stack.of(self._gbar)
            factor = momentum_factor(norm, gbar, rho=method.rho, max_scale=method.max_scale, direction=method.direction)
            off = (factor == 0).view(-1, 1, 1)  # nothing is to be added there, and no NaN of a momentum either
            left.mul_(stack.scaling * factor.view(-1, 1, 1)).masked_fill_(off, 0.0)
            right.masked_fill_(off, 0.0)
            for name, *factors in zip(stack.names, left, right, strict=True):
                self.perturbed[name].by = LowRank(*factors)
            sizes = torch.where(factor != 0, factor.abs() * norm, 0.0)
            self._sums.append((stack.names, torch.stack([gbar, sizes])))
            self._lost[index] |= ~norm.isfinite().all()

    def _momentum(self, name: str, lora_A: Parameter, lora_B: Parameter) -> tuple[Tensor, Tensor] | None:
        """(M_A, M_B) of a layer; None before its first step. A frozen factor has a momentum of 0."""
        if self._own_A:
            return self._own_A[name], self._own_B[name]
        assert self._optimizer is not None
        M_A, M_B = (self._optimizer.state.get(factor, {}).get(self._key) for factor in (lora_A, lora_B))
        if M_A is None and M_B is None:
            return None
        return torch.zeros_like(lora_A) if M_A is None else M_A, torch.zeros_like(lora_B) if M_B is None else M_B

    def switch_off(self) -> None:
        for one in self.perturbed.values():
            one.by = None

    def learn(self) -> bool:
        reached = _reached(self._stacks)
        for stack in reached:
            dA, dB = stack.gradients()
            norm = stack.scaling * gram_norm(*surrogate_gradient(*stack.factors(), dA, dB))
            mean = running_mean(stack.of(self._gbar), norm, self._method.norm_decay)
            self._gbar.update(zip(stack.names, mean, strict=True))
            for kept, gradient in ((self._own_A, dA), (self._own_B, dB)):
                if kept:
                    kept.update(zip(stack.names, running_mean(stack.of(kept), gradient, self._method.mu), strict=True))
        return bool(reached or not self.layers)

    def figures(self, layers: Collection[str]) -> dict[str, float]:
        if not self._sums:
            return {}
        gbar, sizes = _told(self._sums, layers)
        if not len(sizes):
            return {}
        moved = sizes > 0
        limit = self._method.rho * self._method.max_scale * (1 - 1e-6)
        return {
            "gradient_norm": float(gbar.nanmean()),
            "perturbation": float(sizes.mean()),
            "perturbed": float(moved.double().mean()),
            "at_max_scale": float((sizes >= limit).double().mean()),
        }

    def lost(self) -> bool:
        return any(bool(lost) for lost in self._lost)

    def memory_bytes(self) -> int:
        kept = sum(value.nbytes for _, values in self._parts() for value in values.values())
        # The two factors of each term, of twice the rank, act throughout a step.
        return kept + sum(8 * (layer.lora_A.numel() + layer.lora_B.numel()) for layer in self.layers.values())

    def state(self) -> dict[str, Tensor]:
        return {f"{part}.{name}": value.clone() for part, kept in self._parts() for name, value in kept.items()}

    def load(self, state: Mapping[str, Any]) -> list[str]:
        own = any(name.startswith("momentum_") for name in state)
        self._own_A, self._own_B = (self._zeros("A"), self._zeros("B")) if own else ({}, {})
        faults = state_faults(self.state(), state)
        if not faults:
            for part, kept in self._parts():
                kept.update({name: like(state[f"{part}.{name}"], old) for name, old in kept.items()})
        return faults

    def _parts(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return ("gradient_norm", self._gbar), ("momentum_A", self._own_A), ("momentum_B", self._own_B)

    def _zeros(self, side: Literal["A", "B"]) -> dict[str, Tensor]:
        factors = {name: layer.lora_A if side == "A" else layer.lora_B for name, layer in self.layers.items()}
        return {name: torch.zeros(factor.shape, device=factor.device) for name, factor in factors.items()}

    def close(self) -> None:
        for one in self.perturbed.values():
            one.close()


def _momentum_key(optimizer: Optimizer) -> str | None:
    """The entry of the optimizer's state that is a momentum of the gradients; None where we know of none.

    Other optimizers use the same names for other things: a mean of updates, of signs, of rotated or packed gradients.
    """
    if isinstance(optimizer, Adam | AdamW | NAdam | RAdam | Adamax):
        return "exp_avg"
    if isinstance(optimizer, SGD) and all(group["momentum"] > 0 for group in optimizer.param_groups):
        return "momentum_buffer"
    return None


def _reached(stacks: Iterable[LayerStack]) -> list[LayerStack]:
    return [stack for whole in stacks if (stack := whole.reached()).names]


def _told(parts: Iterable[tuple[tuple[str, ...], Tensor]], layers: Collection[str]) -> Float[Tensor, "k n"]:
    """The columns of these layers, float64 on the CPU."""
    chosen = [part.cpu().double()[:, [name in layers for name in names]] for names, part in parts]
    return torch.cat(chosen, dim=1)


def _beside(values: Mapping[str, Tensor], layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """The values on the devices of their layers."""
    return {name: value.to(layers[name].lora_A.device) for name, value in values.items()}
