"""SoRA: learned gates on the ranks, driven to exact zeros by a proximal step.

"Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696v1 (EMNLP 2023).

The idea: put one number between lora_A and lora_B for every rank, at a generous rank. Train these gates with a step of
Adam followed by a soft threshold, so that gates nobody needs become exactly zero. At the end the ranks behind zeros are
dropped, and what is left is an ordinary LoRA with a rank of its own for each layer.

| paper and official code | here |
|---|---|
| y = W x + s lora_B (g * lora_A x) | `adapters.gates.RankGates` |
| g <- T_xi(g - eta grad) | `gate_adam`, then `soft_threshold` |
| three in-place lines of the official optimizer | `official_threshold` |
| sparse_lambda sum |g| in the loss | `l1_gradient` |
| threshold schedules | `threshold_path` |

The paper's text could not be obtained beyond its abstract: the method is read from the official code,
TsinghuaC3I/SoRA c275ac2.

Departures, with reasons:
- The threshold is lambda times the learning rate of the step, as the paper's proximal step has it; the code's scripts
  use a constant, with which the number of steps decides the sparsity more than the task does.
- By default lambda follows a wanted density (`target_density`), because no source gives a value for it.
- The textbook soft threshold by default. The code's own has a dead zone twice as wide, and a point that never moves.
- No L1 term in the loss: the threshold is its proximal form, and the code applies both. Where it is asked for, its
  gradient is added after clipping, not before.
- Every stage of a threshold schedule has a learning-rate schedule of its own. The code reuses an exhausted one, so that
  nothing learns in later stages and the threshold alone shrinks the gates.
- Counts are exact: in + out parameters for every gate that is not zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeGuard, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rankwise.adapters.gates import RankGates
from rankwise.adapters.state import FoldState
from rankwise.calibration.processes import assert_equal_everywhere
from rankwise.errors import CheckpointError, ConfigError
from rankwise.linalg.random import generator
from rankwise.methods.base import Budget, Method, Slot, setting_faults
from rankwise.methods.schedule import RankEvent, Scene, Schedule, ScheduleFault, stage_ends
from rankwise.optimizers.gated import GATE

__all__ = [
    "SoRA",
    "density_aim",
    "gate_adam",
    "l1_gradient",
    "official_threshold",
    "soft_threshold",
    "steered",
    "threshold_path",
]

Path = Literal["linear", "log_linear", "exp_linear"]

_WARM_SHARE: Final = 1 / 6
_SETTLED_SHARE: Final = 5 / 6
_LOOKS: Final = 50
_FACTOR: Final = 1.5
_LEAST, _MOST = 1e-2, 1e3
_PLAIN_EPS: Final = 1e-8


@dataclass(frozen=True, kw_only=True)
class SoRA(Method):
    """Trains a gate for every rank and drops the ranks whose gates become zero.

    Args:
        target_density: the share of lora_A and lora_B parameters that should be left, in (0, 1]; 0.7 [abstract]. It
            steers the threshold; not used where `threshold` is given.
        threshold: lambda by hand, >= 0 (the threshold itself where `threshold_scale` is `constant`); a list gives one
            value for each stage of the run.
        threshold_end: the last value of a path from `threshold` over `threshold_stages` stages.
        threshold_stages: how many values the path has, >= 2; 0 without a path.
        threshold_path: how the values in between lie [official code].
        threshold_scale: `lr` multiplies by the learning rate of the step, `constant` does not (official scripts).
        prox: `soft` is the textbook threshold, `official` that of the authors' code.
        l1: weight of the mean |g| in the loss, >= 0 (official scripts: 10).
        gate_init: `normal` is N(0, 1) [official code], `ones` starts as plain LoRA.
        gate_lr: the gates' learning rate; by default the run's.
        gate_betas: decays of the gates' moments, both in [0, 1).
        gate_eps: added to the root of the gates' second moment, >= 0 (official: 1e-6).
        gate_weight_decay: decoupled, >= 0.
        bias_correction: correct the moments' bias.
        freeze_dead: a gate that became zero stays zero; otherwise it may come back.
        train_gates: move the gates at all; without it and at `gate_init: ones` this is plain LoRA.
        plan_as_caps: let an allocator's ranks be the ranks to prune from.
    """

    id: ClassVar[str] = "sora"
    title: ClassVar[str] = "SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models"
    source: ClassVar[str] = "arXiv:2311.11696v1"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-4, 8e-4, 2e-3)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "official": {
            "threshold": 3e-4,
            "threshold_scale": "constant",
            "prox": "official",
            "l1": 10.0,
            "gate_eps": 1e-6,
        },
        "official-path": {
            "threshold": 0.0,
            "threshold_end": 7e-4,
            "threshold_stages": 7,
            "threshold_scale": "constant",
            "prox": "official",
            "l1": 1e-3,
            "gate_eps": 1e-6,
        },
    }

    target_density: float = 0.7
    threshold: float | tuple[float, ...] | None = None
    threshold_end: float | None = None
    threshold_stages: int = 0
    threshold_path: Path = "linear"
    threshold_scale: Literal["lr", "constant"] = "lr"
    prox: Literal["soft", "official"] = "soft"
    l1: float = 0.0
    gate_init: Literal["normal", "ones"] = "normal"
    gate_lr: float | None = None
    gate_betas: tuple[float, float] = (0.9, 0.999)
    gate_eps: float = _PLAIN_EPS
    gate_weight_decay: float = 0.0
    bias_correction: bool = True
    freeze_dead: bool = False
    train_gates: bool = True
    plan_as_caps: bool = False

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={
                "threshold_path": get_args(Path),
                "threshold_scale": ("lr", "constant"),
                "prox": ("soft", "official"),
                "gate_init": ("normal", "ones"),
            },
            numbers={"l1": 0, "gate_eps": 0, "gate_weight_decay": 0},
            wholes={"threshold_stages": 0},
            flags=("bias_correction", "freeze_dead", "train_gates", "plan_as_caps"),
        )
        faults += _number_faults(self)
        if len(self.gate_betas) != 2 or not all(_number(beta) and 0 <= beta < 1 for beta in self.gate_betas):
            faults.append(f"sora.gate_betas: {self.gate_betas!r} are out of range; use two numbers in [0, 1)")
        if not faults:
            faults = _path_faults(self)
        if faults:
            raise ConfigError(faults)

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """The values of lambda by hand, one a stage; None where a density is aimed at."""
        if self.threshold is None:
            return None
        if isinstance(self.threshold, tuple):
            return self.threshold
        if self.threshold_end is None:
            return (float(self.threshold),)
        return threshold_path(
            self.threshold_path, float(self.threshold), float(self.threshold_end), self.threshold_stages
        )

    def make_schedule(self, scene: Scene) -> Schedule:
        """Gates on every layer, moved beside the factors."""
        return SoRASchedule(self, scene)

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What is aimed at, and what the official settings want of the trainer."""
        if not self.train_gates:
            return ("sora: the gates are not trained, so no rank will be dropped",)
        values = self.thresholds
        told: tuple[str, ...]
        if values is None:
            told = (f"sora: the threshold is steered to leave {self.target_density:.0%} of the parameters",)
        else:
            listed = ", ".join(f"{value:g}" for value in values)
            told = (f"sora: thresholds by hand: {listed}; how many ranks they drop shows only in training",)
        if self.l1:
            told += (
                "sora: the official scripts train with weight_decay 0.1 and max_grad_norm 0.1: set them under training",
            )
        return told


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number_faults(method: SoRA) -> list[str]:
    faults = []
    if not _number(method.target_density) or not 0 < method.target_density <= 1:
        faults.append(f"sora.target_density: {method.target_density!r} is out of range; use a number in (0, 1]")
    values = method.threshold if isinstance(method.threshold, tuple) else (method.threshold,)
    if method.threshold is not None and (not values or not all(_number(v) and v >= 0 for v in values)):
        faults.append(f"sora.threshold: {method.threshold!r} is out of range; use a number >= 0, or a list of them")
    end, rate = method.threshold_end, method.gate_lr
    if end is not None and not (_number(end) and end >= 0):
        faults.append(f"sora.threshold_end: {end!r} is out of range; use a number >= 0, or leave it out")
    if rate is not None and not (_number(rate) and rate > 0):
        faults.append(
            f"sora.gate_lr: {rate!r} is out of range; use a number above 0, leave it out for the run's rate, or set "
            "train_gates: false"
        )
    return faults


def _path_faults(method: SoRA) -> list[str]:
    if (method.threshold_end is None) != (method.threshold_stages == 0):
        return ["sora.threshold_end and sora.threshold_stages: a path needs both; give both, or neither"]
    if method.threshold_end is None:
        return []
    if method.threshold is None or isinstance(method.threshold, tuple):
        return ["sora.threshold_end: a path goes from one threshold to another; give sora.threshold as one number"]
    if method.threshold_stages < 2:
        return [f"sora.threshold_stages: {method.threshold_stages} is no path; use 2 or more"]
    if method.threshold_path == "exp_linear" and not (method.threshold > 0 and method.threshold_end > 0):
        return ["sora.threshold_path: exp_linear needs thresholds above 0; use linear, or start above 0"]
    return []


# --- equations ----------------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, xi: float) -> Tensor:
    """T_xi(x): x moved towards 0 by xi, and 0 where |x| <= xi; the proximal map of xi |x|.

    Source: arXiv 2311.11696v1 [secondary: abstract and authors' code].
    """
    return torch.sign(x) * (x.abs() - xi).clamp(min=0)


def official_threshold(x: Tensor, xi: float) -> Tensor:
    """The map of the authors' code: 0 for |x| < 2 xi but for |x| = xi, which stays; else x moved towards 0 by xi.

    Source: TsinghuaC3I/SoRA c275ac2, the in-place lines of its optimizer.
    """
    moved = torch.where(x > xi, x - xi, x)
    moved = torch.where(moved < -xi, moved + xi, moved)
    return torch.where(moved.abs() < xi, torch.zeros_like(moved), moved)


def gate_adam(
    gate: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
) -> None:
    """One step of Adam in place, with eps outside the bias correction and decay from the gate before the step.

    Args:
        gate: what moves.
        grad: its gradient.
        exp_avg: first moment, updated.
        exp_avg_sq: second moment, updated.
        step: steps of this gate, this one included.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        bias_correction: whether the moments' bias is corrected.

    Source: TsinghuaC3I/SoRA c275ac2, whose optimizer is that of transformers 4.
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) if bias_correction else lr
    decay = gate * (lr * weight_decay)
    gate.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-size).sub_(decay)


def l1_gradient(gate: Tensor, weight: float, entries: int) -> Tensor:
    """The gradient of weight * mean |g| over all gates of the model: weight sign(g) / entries, 0 at g = 0.

    Source: TsinghuaC3I/SoRA c275ac2, `compute_loss`.
    """
    return torch.sign(gate) * (weight / entries)


def threshold_path(kind: Path, first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` values from `first` to `last`: evenly, evenly in their exponentials, or evenly in their logarithms.

    Source: TsinghuaC3I/SoRA c275ac2, `lambda_schedule`.
    """
    shares = [index / (count - 1) for index in range(count)] if count > 1 else [0.0]
    if kind == "log_linear":
        low, high = math.exp(first), math.exp(last)
        return tuple(math.log(low + (high - low) * share) for share in shares)
    if kind == "exp_linear":
        low, high = math.log(first), math.log(last)
        return tuple(math.exp(low + (high - low) * share) for share in shares)
    return tuple(first + (last - first) * share for share in shares)


def density_aim(step: int, max_steps: int, target: float) -> float:
    """The density that step asks for: 1 up to a sixth of the run, `target` from five sixths on, a line in between."""
    share = (step / max_steps - _WARM_SHARE) / (_SETTLED_SHARE - _WARM_SHARE)
    return 1 - (1 - target) * min(1.0, max(0.0, share))


def steered(value: float, density: float, aim: float) -> float:
    """The next lambda: 1.5 times as large where more is left than aimed at, else 1.5 times smaller, in [0.01, 1000]."""
    return min(_MOST, max(_LEAST, value * _FACTOR if density > aim else value / _FACTOR))


# --- the schedule slot --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GateRule:
    """Adam, threshold, and what stays zero; `threshold` and `pinned` of the group are the schedule's word."""

    method: SoRA

    def __call__(self, gate: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        method = self.method
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(gate), "exp_avg_sq": torch.zeros_like(gate)}
        state["step"] += 1
        dead = gate == 0 if group["pinned"] or method.freeze_dead else None
        lr = float(group["lr"])
        gate_adam(
            gate,
            gate.grad,  # type: ignore[arg-type]
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=method.bias_correction,
        )
        xi = group["threshold"] * (lr if method.threshold_scale == "lr" else 1.0)
        if xi > 0:
            gate.copy_((soft_threshold if method.prox == "soft" else official_threshold)(gate, xi))
        if dead is not None:
            for tensor in (gate, state["exp_avg"], state["exp_avg_sq"]):
                tensor.masked_fill_(dead, 0.0)


class SoRASchedule:
    """Owns the gates, tells their rule the threshold of each step, and records which ranks went.

    Args:
        method: the settings.
        scene: the attached model.
    """

    def __init__(self, method: SoRA, scene: Scene) -> None:
        self._method = method
        self._costs = {name: layer.base.shape.cost for name, layer in scene.layers.items()}
        self._ranks = {name: layer.rank for name, layer in scene.layers.items()}
        start = {
            name: torch.ones(layer.rank)
            if method.gate_init == "ones"
            else torch.randn(layer.rank, generator=generator(scene.seed, "sora gate", name))
            for name, layer in scene.layers.items()
        }
        self.gates = RankGates(scene.model, scene.layers, start, trainable=method.train_gates)
        self._entries = sum(self._ranks.values())
        self._lambda = 0.0
        self._step = 0
        self._max_steps = 1
        self._threshold_applied = False
        self._told = dict(self._ranks)
        self._events: list[RankEvent] = []
        self._group: dict[str, Any] | None = None
        self._optimizer: Optimizer | None = None

    def gate_rule(self) -> _GateRule | None:
        """How the gates move; None where they do not."""
        return _GateRule(self._method) if self._method.train_gates else None

    def owned_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group of all gates."""
        method = self._method
        if not method.train_gates:
            return []
        return [
            {
                "params": list(self.gates.parameters()),
                "kind": GATE,
                "name": "gates",
                "lr": lr if method.gate_lr is None else method.gate_lr,
                "weight_decay": method.gate_weight_decay,
                "betas": method.gate_betas,
                "eps": method.gate_eps,
                "threshold": 0.0,
                "pinned": False,
            }
        ]

    def stages(self) -> int:
        """How many stages share the run, each with a learning-rate schedule of its own."""
        values = self._method.thresholds
        return 1 if values is None else len(values)

    def checkpoints(self, max_steps: int) -> tuple[int, ...]:
        """The last step of every stage, where there are several."""
        return stage_ends(self.stages(), max_steps) if self.stages() > 1 else ()

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """The stages, or when the density is steered."""
        method = self._method
        if not method.train_gates:
            return ()
        if method.thresholds is None:
            first, last = math.ceil(max_steps * _WARM_SHARE), math.ceil(max_steps * _SETTLED_SHARE)
            return (
                f"sora: every gate trains freely to step {first}; from there to step {last} the threshold is steered "
                f"until {method.target_density:.0%} of the parameters are left; then zeros stay",
            )
        if self.stages() > 1:
            ends = ", ".join(map(str, self.checkpoints(max_steps)))
            return (f"sora: {self.stages()} stages with a checkpoint each, after steps {ends}",)
        return ()

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Finds the group of gates.

        Raises:
            ConfigError: the optimizer does not hold the gates, or the run is too short for the stages.
        """
        self._max_steps = max_steps
        self._group = None
        if not self._method.train_gates:
            return
        if any(isinstance(gate, DTensor) for gate in self.gates.parameters()):
            raise ConfigError("sora's gates were sharded by FSDP, which was not tried: train under DDP")
        own = {id(gate) for gate in self.gates.parameters()}
        groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
        if len(groups) != 1 or groups[0].get("kind") != GATE or {id(p) for p in groups[0]["params"]} != own:
            raise ConfigError(
                f"sora's gates are not in a group of their own in {type(optimizer).__name__}, so that nothing would "
                "drive them to zero: pass optimizers=session.optimizers(args, num_training_steps) to the trainer"
            )
        if self.stages() > max_steps:
            raise ConfigError(
                f"sora: {self.stages()} stages need at least as many steps, and the run has {max_steps}: train longer, "
                "or use fewer stages"
            )
        self._group, self._optimizer = groups[0], optimizer

    def before_step(self, step: int) -> None:
        """Nothing."""

    @torch.no_grad()
    def before_optimizer_step(self, step: int) -> None:
        """Sets the threshold and the pins of this step, and adds the gradient of an L1 term."""
        if self._group is None:
            return
        values = self._method.thresholds
        if values is not None:
            self._lambda = values[sum(step > end for end in stage_ends(len(values), self._max_steps)[:-1])]
        settled = values is None and step > self._max_steps * _SETTLED_SHARE
        self._group["threshold"], self._group["pinned"] = self._lambda, settled
        if self._method.l1 > 0:
            for gate in self.gates.parameters():
                if gate.grad is not None:
                    gate.grad.add_(l1_gradient(gate, self._method.l1, self._entries))
        self._threshold_applied = self._threshold_applied or self._lambda > 0

    def after_step(self, step: int) -> None:
        """Steers lambda at every fiftieth of the run; records what became zero, there and at the end of a stage."""
        self._step = step
        if self._group is None:
            return
        looks = step * _LOOKS // self._max_steps > (step - 1) * _LOOKS // self._max_steps
        stage_end = step in self.checkpoints(self._max_steps)
        if not looks and not stage_end:
            return
        ranks = self.live_ranks()
        density = self._density(ranks)
        if self._method.thresholds is None and step >= self._max_steps * _WARM_SHARE:
            aim = density_aim(step, self._max_steps, self._method.target_density)
            self._lambda = 1.0 if self._lambda == 0 else steered(self._lambda, density, aim)
        self._record(step, ranks, density, "stage" if stage_end else "prune")

    def end(self, step: int) -> None:
        """Records the ranks that are left."""
        if self._group is not None:
            ranks = self.live_ranks()
            self._record(step, ranks, self._density(ranks), "prune")

    def live_ranks(self) -> dict[str, int]:
        """Gates that are not zero, by layer; waits for the device."""
        return {name: int(torch.count_nonzero(self.gates.value(name))) for name in self.gates.names}

    def fold_state(self) -> FoldState:
        """The gates."""
        return FoldState(gates=self.gates.effective())

    def events(self) -> tuple[RankEvent, ...]:
        """What became zero, or came back, since this was last asked."""
        found, self._events = tuple(self._events), []
        return found

    def figures(self) -> dict[str, float]:
        """The density and the threshold of the last step."""
        if self._group is None:
            return {}
        scale = float(self._group["lr"]) if self._method.threshold_scale == "lr" else 1.0
        ranks = self.live_ranks()
        return {
            "sora_density": self._density(ranks),
            "sora_live_ranks": float(sum(ranks.values())),
            "sora_threshold": float(self._group["threshold"]) * scale,
        }

    def remarks(self) -> tuple[str, ...]:
        """Settings that cannot drop a rank, or that drop all at once."""
        values = self._method.thresholds
        if self._group is None or values is None:
            return ()
        if not any(values):
            return ("sora.threshold is 0, so that no gate becomes zero but by chance",)
        lr = float(self._group.get("initial_lr", self._group["lr"]))
        first = values[0] * (lr if self._method.threshold_scale == "lr" else 1.0)
        largest = max(float(gate.detach().abs().max()) for gate in self.gates.parameters())
        if first >= largest:
            return (f"sora: the first threshold is {first:g} and no gate is above {largest:g}: one step drops all",)
        return ()

    def fault(self) -> ScheduleFault | None:
        """Gates that never moved, or a threshold that never came."""
        if self._group is None or self._optimizer is None:
            return None
        moved = any(self._optimizer.state.get(gate) for gate in self.gates.parameters())
        if not moved or (self._step * 2 >= self._max_steps and self._wanted() and not self._threshold_applied):
            what = "no threshold was ever applied" if moved else "the gates never moved"
            return ScheduleFault(
                f"{what} in {self._step} steps, so that the run is plain LoRA with fixed gates",
                "train with the session's optimizer and callback, to the end of the run",
            )
        return None

    def _wanted(self) -> bool:
        values = self._method.thresholds
        return any(values) if values is not None else self._method.target_density < 1

    def base_copy_bytes(self) -> int:
        """None: the base weights are not written."""
        return 0

    def event_seconds(self) -> float:
        """A look at the gates costs next to nothing."""
        return 0.0

    def memory_bytes(self) -> int:
        """The gates with gradient and moments."""
        return 4 * 4 * self._entries

    def close(self) -> None:
        """Takes the gates off the model."""
        self.gates.close()

    def state_dict(self) -> dict[str, Any]:
        """The gates, lambda, and what was recorded; the gates' moments are the optimizer's."""
        gates = {f"gate.{name}": self.gates.value(name).detach().clone() for name in self.gates.names}
        return {
            "method": self._method.id,
            "step": self._step,
            "lambda": self._lambda,
            "threshold_applied": self._threshold_applied,
            "told": dict(self._told),
            **gates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            CheckpointError: the state is another method's, or a gate is missing or of another rank.
        """
        faults = [] if state.get("method") == self._method.id else [f"it is of {state.get('method')!r}"]
        for name in self.gates.names:
            found = state.get(f"gate.{name}")
            if not isinstance(found, Tensor) or found.shape != self.gates.value(name).shape:
                faults.append(f"the gate of {name} is missing or of another rank")
        faults += [f"{key} is missing" for key in ("step", "lambda", "told") if key not in state]
        if faults:
            raise CheckpointError(
                f"the state of sora is not this plan's: {'; '.join(faults[:8])}: take the state of the run's own "
                "checkpoint"
            )
        for name in self.gates.names:
            self.gates.write(name, state[f"gate.{name}"])
        self._step, self._lambda = int(state["step"]), float(state["lambda"])
        self._threshold_applied = bool(state.get("threshold_applied", False))
        self._told = {str(name): int(rank) for name, rank in state["told"].items()}

    def _density(self, ranks: Mapping[str, int]) -> float:
        left = sum(rank * self._costs[name] for name, rank in ranks.items())
        return left / sum(rank * self._costs[name] for name, rank in self._ranks.items())

    def _record(self, step: int, ranks: Mapping[str, int], density: float, kind: str) -> None:
        changed = {name: rank for name, rank in ranks.items() if rank != self._told[name]}
        if not changed and kind != "stage":
            return
        lost = sum(max(0, self._told[name] - rank) for name, rank in changed.items())
        back = sum(max(0, rank - self._told[name]) for name, rank in changed.items())
        told = [f"{lost} gates became zero"] * bool(lost) + [f"{back} came back"] * bool(back)
        self._told = dict(ranks)
        assert_equal_everywhere(repr(sorted(ranks.items())), f"the gates after step {step}")
        assert self._group is not None
        self._events.append(
            RankEvent(
                step=step,
                kind="revive" if kind == "prune" and back > lost else kind,
                ranks=changed,
                reason=", ".join(told) or "no gate became zero",
                figures={"density": density, "lambda": self._lambda, "live_ranks": float(sum(ranks.values()))},
            )
        )
