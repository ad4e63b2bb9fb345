"""BeamLoRA: inside a fixed rank, overwrite the ranks that matter least with older copies of those that matter most.

"BeamLoRA: Beam-Constraint Low-Rank Adaptation", arXiv 2502.13604v2 (12 Jun 2025), ACL 2025.

The idea: the ranks of a module are not equally useful, so each gets a trained score, a softmax inside its module that
multiplies what lora_A puts out. Every so often the ranks of the whole model beyond a share p of the summed scores are
given up, and each becomes a copy, half a period old, of one of the best ranks of its own module, which then has two
ranks to develop. Shapes, ranks and the number of parameters never change.

| paper | here |
|---|---|
| score between lora_B and lora_A [figure]: r softmax(z / tau) | `scores` |
| p rises with the steps [figure]: 0.95 to 1 along a cosine | `kept_share` |
| when ranks are copied and when reset [code] | `due_after`, `snapshot_step` |
| Top-P over all modules | `pruned_masks` |
| prune and expand: the best ranks, paired at random | `source_ranks` |
| both ranks get the mean [figure] of the logits [code] | `mean_logits` |
| a copy of the past [figure] | `copy_ranks` |

Only abstract and figures of the paper could be obtained; the rest is that of the authors' code, gccnlp/BeamLoRA
2610c6a (PEFT 0.9.0). Departures from it, with reasons; `variant: official` takes back the first four:
- The moments of a copied rank are copied with it. The code means to, but writes to a temporary, so that AdamW goes on
  with those of the rank that was pruned.
- The moments of the scores are emptied in modules that lost ranks, not in all.
- A module loses at most half of its ranks, the lowest; else a source is itself overwritten.
- Of equal scores the lower rank counts as better; in the code it depends on the sort.
- p = 1 prunes nothing; rounding in the sum makes the code prune the last rank now and then.
- The past is as old for an odd period as for an even one; the code takes no copy then and stops at the first reset.
  A copy that no reset would read is not taken, and one is let go once it was read.
- Pairs are drawn from the run's seed, alike in all processes; the code draws in each process for itself.
- Scores are float32; in the code's bfloat16 runs a logit stops moving near 0.125.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import RankGates
from rankwise.adapters.state import FoldState
from rankwise.calibration.processes import assert_equal_everywhere
from rankwise.errors import CheckpointError, ConfigError, HealthError
from rankwise.linalg.random import generator
from rankwise.methods.base import Budget, Method, Slot, setting_faults
from rankwise.methods.perturbing import state_faults
from rankwise.methods.schedule import RankEvent, Scene, Schedule, ScheduleFault, SteadyRanks
from rankwise.ranks.shapes import LayerShape, ScalingRule

__all__ = [
    "BeamLoRA",
    "BeamLoRASchedule",
    "capped",
    "copy_ranks",
    "due_after",
    "halved_logits",
    "kept_share",
    "mean_logits",
    "pruned_masks",
    "scores",
    "seeded_permutation",
    "snapshot_step",
    "source_ranks",
]

logger = logging.getLogger(__name__)

Permutation = Callable[[int, int, int], Tensor]
"""By step, module index and n: a permutation of 0 ... n - 1."""

Event = Literal["snapshot", "reset"]

_MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_PAST: Final = "snapshot."
_LARGE_RATE: Final = 1e-4
_MOST_LOST: Final = 2


@dataclass(frozen=True, kw_only=True)
class BeamLoRA(Method):
    """Trains a score for every rank and lets copies of the best ranks take the places of the worst.

    Every layer has the same rank, >= 2; the scaling is alpha / rank; the optimizer is AdamW. The authors' runs: r 64,
    lora_alpha 128, lora_dropout 0.05, learning rate 3e-4 with cosine decay, all linear layers of the blocks.

    Args:
        tau: temperature of the softmax, > 0. 0.05 [official code]; its notes take 0.03 below a learning rate of 1e-4.
        cumsum_threshold: p at the first step, in (0, 1]; 1 prunes nothing. 0.95 [official code].
        reset_every: T, steps from one reset to the next, >= 2; by default the last even number up to a twelfth
            of the run [inferred from the official 3000 of 37031].
        reset_end_step: E, the step after which p is 1, >= 1; by default two thirds of the run [inferred, as above].
        scope: `global` cuts over the ranks of all modules at once [official code], `module` in each by itself.
        keep_boundary: keep the rank with which the sum passes p; the official code prunes it.
        reset_optimizer: touch moments at a reset; without it copies go on with those of the ranks that they replace.
        conserve: copy the present instead of the past, and give either rank of a pair half of the source's weight, so
            that the pair computes what the source did. Not in the paper.
        variant: `official` reproduces the code's moments, and prunes more than half of a module; see above.
        train_scores: move the scores at all; without it, and at `cumsum_threshold: 1`, this is plain LoRA.
    """

    id: ClassVar[str] = "beamlora"
    title: ClassVar[str] = "BeamLoRA: Beam-Constraint Low-Rank Adaptation"
    source: ClassVar[str] = "arXiv:2502.13604v2"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-4, 3e-4, 1e-3)
    scaling_rules: ClassVar[frozenset[ScalingRule]] = frozenset({ScalingRule.ALPHA_OVER_RANK, ScalingRule.ALPHA_OVER_R})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"tau": 0.05, "cumsum_threshold": 0.95, "reset_every": 3000, "reset_end_step": 24688},
        "official": {"tau": 0.05, "cumsum_threshold": 0.95, "variant": "official"},
    }

    tau: float = 0.05
    cumsum_threshold: float = 0.95
    reset_every: int | None = None
    reset_end_step: int | None = None
    scope: Literal["global", "module"] = "global"
    keep_boundary: bool = False
    reset_optimizer: bool = True
    conserve: bool = False
    variant: Literal["intended", "official"] = "intended"
    train_scores: bool = True

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={"scope": ("global", "module"), "variant": ("intended", "official")},
            numbers={"tau": 0, "cumsum_threshold": 0},
            wholes={"reset_every": 2, "reset_end_step": 1},
            flags=("keep_boundary", "reset_optimizer", "conserve", "train_scores"),
        )
        if not faults:
            faults = _value_faults(self)
        if faults:
            raise ConfigError(faults)

    def check_ranks(self, layers: Sequence[LayerShape], ranks: Sequence[int]) -> None:
        """Refuses layers of different ranks, and of rank 1.

        Raises:
            ConfigError: there are such layers.
        """
        _refuse_ranks({shape.name: rank for shape, rank in zip(layers, ranks, strict=True)})

    def make_schedule(self, scene: Scene) -> Schedule:
        """Scores on every layer, and resets between them.

        Raises:
            ConfigError: layers of different ranks, or of rank 1.
        """
        return BeamLoRASchedule(self, scene)

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What is trained beside the budget, and that a reset shows in the loss."""
        told: tuple[str, ...] = ()
        if self.train_scores:
            told += (f"beamlora: {sum(ranks.values())} scores are trained beside lora_A and lora_B",)
        if self.cumsum_threshold < 1:
            told += ("beamlora: every reset changes what the model computes, so the loss may jump there and come back",)
        return told


def _value_faults(method: BeamLoRA) -> list[str]:
    faults = []
    for key in ("tau", "cumsum_threshold"):
        if getattr(method, key) == 0:
            faults.append(f"beamlora.{key}: 0 is out of range; use a number above 0")
    if method.cumsum_threshold > 1:
        faults.append(f"beamlora.cumsum_threshold: {method.cumsum_threshold!r} is out of range; use a number in (0, 1]")
    if method.conserve and method.variant == "official":
        faults.append("beamlora.conserve: it is not in the official code; use variant: intended, or leave it out")
    if not method.train_scores and method.cumsum_threshold < 1:
        faults.append(
            "beamlora.train_scores: scores that are not trained are all alike, and ranks would be pruned by their "
            "position; set cumsum_threshold: 1 beside it, or leave it out"
        )
    return faults


# --- equations, in the order in which they act --------------------------------------------------------------------


def scores(logits: Float[Tensor, "*b rank"], tau: float) -> Float[Tensor, "*b rank"]:
    """The scores r softmax(z / tau) of a module, which gate its ranks and are their importance; they sum to r.

    Source: arXiv 2502.13604v2, figure; gccnlp/BeamLoRA 2610c6a.
    """
    return torch.softmax(logits / tau, dim=-1) * logits.shape[-1]


def kept_share(step: int, *, first: float, end_step: int) -> float:
    """The p of a reset after step `step` (from 1): from `first` along half a cosine to 1 at `end_step`, then 1.

    Source: gccnlp/BeamLoRA 2610c6a, whose counter moves after the event: t - 1.
    """
    done = step - 1
    if done > end_step:
        return 1.0
    return 1 - (1 - first) * (1 + math.cos(math.pi * done / end_step)) / 2


def due_after(step: int, *, period: int, max_steps: int) -> tuple[Event, ...]:
    """What falls due after a step, in order: a snapshot and a reset in every period, no reset in the last T steps.

    Args:
        step: steps made, from 1.
        period: T, >= 2.
        max_steps: optimizer steps of the run.

    Source: gccnlp/BeamLoRA 2610c6a, for even T.
    """
    end = -(-step // period) * period
    found: tuple[Event, ...] = ("snapshot",) if step == snapshot_step(end, period) else ()
    return (*found, "reset") if step == end and max_steps - step >= period else found


def snapshot_step(reset: int, period: int) -> int:
    """The step after which the past is kept that the reset after step `reset` copies from.

    It lies T/2 - 1 steps before the reset, (T - 1)/2 if T is odd; with T = 2 it is the same step.

    Source: gccnlp/BeamLoRA 2610c6a, for even T.
    """
    return reset - period + period // 2 + 1


def pruned_masks(
    importance: Float[Tensor, "modules rank"],
    share: float,
    *,
    scope: Literal["global", "module"] = "global",
    keep_boundary: bool = False,
) -> Bool[Tensor, "modules rank"]:
    """True at the ranks that are given up: in falling order, those from where the sum passes `share` of the whole.

    The one with which it passes is among them, but for `keep_boundary`. Equal scores go by module, then rank.

    Source: gccnlp/BeamLoRA 2610c6a; the sum in float32, as there.
    """
    if share >= 1:
        return torch.zeros_like(importance, dtype=torch.bool)
    rows = importance.reshape(1, -1) if scope == "global" else importance
    values, order = rows.sort(dim=-1, descending=True, stable=True)
    passed = (values.cumsum(dim=-1) > share * rows.shape[-1]).cumsum(dim=-1)
    beyond = passed > int(keep_boundary)
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, order, beyond).view_as(importance)


def capped(
    mask: Bool[Tensor, "modules rank"], importance: Float[Tensor, "modules rank"]
) -> Bool[Tensor, "modules rank"]:
    """The mask without all but the floor(r / 2) lowest ranks of each module, so that no source is pruned itself."""
    rank = importance.shape[-1]
    order = importance.argsort(dim=-1, descending=True, stable=True)
    lower = (torch.arange(rank) >= rank - rank // 2).expand_as(mask)
    return mask & torch.zeros_like(mask).scatter(-1, order, lower)


def source_ranks(
    importance: Float[Tensor, " rank"], permutation: Int[Tensor, " n"], *, stable: bool = True
) -> Int[Tensor, " n"]:
    """The n best ranks in the order of the permutation: the i-th replaces the i-th pruned rank, these ascending.

    Of equal scores the lower rank is better; without `stable` as torch's topk has it, which tells by nothing.

    Source: gccnlp/BeamLoRA 2610c6a, topk.
    """
    count = len(permutation)
    best = importance.argsort(descending=True, stable=True)[:count] if stable else importance.topk(count).indices
    return best[permutation]


def mean_logits(
    logits: Float[Tensor, " rank"], pruned: Int[Tensor, " n"], sources: Int[Tensor, " n"]
) -> Float[Tensor, " rank"]:
    """Both ranks of every pair get the mean of their two logits.

    Source: arXiv 2502.13604v2, figure (a mean; of what is left open); gccnlp/BeamLoRA 2610c6a (of the logits).
    """
    found = logits.clone()
    found[pruned] = (found[pruned] + found[sources]) / 2
    found[sources] = found[pruned]
    return found


def halved_logits(
    logits: Float[Tensor, " rank"], pruned: Int[Tensor, " n"], sources: Int[Tensor, " n"], tau: float
) -> Float[Tensor, " rank"]:
    """Both ranks of every pair get the source's logit less tau ln 2: together exp(z / tau) of the source as it was.

    Not in the paper; for sources that are not pruned themselves.
    """
    found = logits.clone()
    found[pruned] = found[sources] = logits[sources] - tau * math.log(2)
    return found


def copy_ranks(
    target: Tensor, history: Tensor, pruned: Int[Tensor, " n"], sources: Int[Tensor, " n"], dim: int
) -> None:
    """Overwrites the pruned ranks of a factor, or of a moment, with the sources' of `history`, in place.

    Args:
        target: [rank, in] with `dim` 0, or [out, rank] with 1.
        history: of the same shape, on any device.
        pruned: ranks that are overwritten.
        sources: what each is overwritten with.
        dim: where the ranks lie.

    Source: gccnlp/BeamLoRA 2610c6a.
    """
    rows = history.index_select(dim, sources.to(history.device)).to(target.device)
    target.index_copy_(dim, pruned.to(target.device), rows)


def seeded_permutation(seed: int, step: int, module: int, count: int) -> Int[Tensor, " count"]:
    """A permutation of 0 ... count - 1 that depends on the run's seed, the step and the module, int64 on the CPU."""
    return torch.randperm(count, generator=generator(seed, "beamlora", step, module))


# --- the schedule slot --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Course:
    """When resets fall due in a run, and how much they keep."""

    method: BeamLoRA
    max_steps: int
    period: int
    end_step: int

    @property
    def count(self) -> int:
        """How many resets the whole run has."""
        return max(0, self.max_steps // self.period - 1)

    @property
    def idle(self) -> bool:
        """Whether a reset would do nothing at all, at any time."""
        return self.method.cumsum_threshold == 1 and self.method.variant == "intended"

    def share(self, step: int) -> float:
        """What a reset after this step keeps."""
        return kept_share(step, first=self.method.cumsum_threshold, end_step=self.end_step)

    def due(self, step: int) -> tuple[Event, ...]:
        """What falls due after this step."""
        return () if self.idle else due_after(step, period=self.period, max_steps=self.max_steps)

    def coming(self, step: int) -> int:
        """The end of the period in which `step` lies."""
        return -(-step // self.period) * self.period

    def reads(self, step: int) -> bool:
        """Whether the reset at the end of the period will want the past."""
        reset = self.coming(step)
        return "reset" in self.due(reset) and self.share(reset) < 1 and not self.method.conserve


def _course(method: BeamLoRA, max_steps: int, period: int | None = None, end_step: int | None = None) -> _Course:
    """The course of a run; `period` and `end_step` are those that a checkpoint goes on with.

    Raises:
        ConfigError: no reset fits the run, or none would prune.
    """
    period = period or method.reset_every or max(2, max_steps // 24 * 2)
    course = _Course(method, max_steps, period, end_step or method.reset_end_step or max(1, -(-2 * max_steps // 3)))
    if method.cumsum_threshold == 1:
        return course
    if not course.count:
        can = f"set beamlora.reset_every to {max_steps // 2} or less, or train" if max_steps >= 4 else "train"
        raise ConfigError(
            f"beamlora.reset_every: {period}: a reset comes after every {period} steps but not in the last {period}, "
            f"so that a run of {max_steps} steps has none; {can} for {2 * period} steps or more"
        )
    if course.share(period) >= 1:
        raise ConfigError(
            f"beamlora.reset_end_step: {course.end_step}: nothing is pruned from there on, and the first reset comes "
            f"after step {period}; use {period} or more, or a smaller beamlora.reset_every"
        )
    return course


class BeamLoRASchedule(SteadyRanks):
    """Owns the scores, keeps the past on the CPU, and resets.

    Args:
        method: the settings.
        scene: the attached model.
        permutation: how pruned ranks and sources are paired; by default from the run's seed.

    Raises:
        ConfigError: layers of different ranks, or of rank 1.
    """

    def __init__(self, method: BeamLoRA, scene: Scene, *, permutation: Permutation | None = None) -> None:
        _refuse_ranks({name: layer.rank for name, layer in scene.layers.items()})
        self._method, self._layers = method, dict(scene.layers)
        self._permutation = permutation or partial(seeded_permutation, scene.seed)
        self.gates = RankGates(
            scene.model,
            scene.layers,
            {name: torch.zeros(layer.rank) for name, layer in scene.layers.items()},
            trainable=method.train_scores,
            activation=partial(scores, tau=method.tau),
        )
        self._course: _Course | None = None
        self._resumed: tuple[int, int] | None = None
        self._optimizer: Optimizer | None = None
        self._step = 0
        self._past: dict[str, Tensor] = {}
        self._past_step: int | None = None
        self._made = self._pruned = self._lost = self._unread = 0
        self._events: list[RankEvent] = []

    def owned_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group of all logits, with the rate and the decay of the factors, as in the official code."""
        if not self._method.train_scores:
            return []
        params = list(self.gates.parameters())
        return [{"params": params, "name": "scores", "lr": lr, "weight_decay": weight_decay}]

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """When resets come, and until when they prune.

        Raises:
            ConfigError: no reset fits a run of this length.
        """
        course = self._course_of(max_steps)
        if self._method.cumsum_threshold == 1:
            return ()
        last = course.count * course.period
        ends = f"1 after step {course.end_step}" if course.share(last) == 1 else f"{course.share(last):.4g} at the last"
        return (
            f"beamlora: {course.count} resets, one after every {course.period} steps to step {last}; the share of the "
            f"scores that is kept rises from {self._method.cumsum_threshold:g} to {ends}",
        )

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Finds the scores in the optimizer and settles the times of the resets; a resumed run keeps its own.

        Raises:
            ConfigError: no reset fits the run, another optimizer than Adam or AdamW, one that does not hold the scores,
                or factors that are sharded or flattened.
        """
        self._course = self._course_of(max_steps)
        faults = _engine_faults(optimizer, self._layers)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = list(self.gates.parameters())
        if any(id(parameter) not in held for parameter in trained):
            faults.append(
                f"beamlora's scores are in no group of {type(optimizer).__name__}, so that they would never move: pass "
                "optimizers=session.optimizers(args, num_training_steps) to the trainer"
            )
        if any(parameter.dtype != torch.float32 for parameter in trained):
            faults.append(
                f"beamlora's scores are {trained[0].dtype}, in which small steps are lost: leave them in torch.float32"
            )
        if faults:
            raise ConfigError(faults)
        self._optimizer = optimizer

    def before_step(self, step: int) -> None:
        """Nothing."""

    def before_optimizer_step(self, step: int) -> None:
        """Nothing."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keeps the past, or resets; both after one step where the period is 2.

        Raises:
            HealthError: at the second reset at which scores are not finite.
        """
        course = self._course
        if course is None or step <= self._step:
            return
        self._step = step
        for event in course.due(step):
            if event == "reset":
                self._reset(step, course.share(step))
            elif course.reads(step):
                self._keep_past(step)

    def end(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Takes the scores off the model and lets go of the past."""
        self.gates.close()
        self._forget_past()
        self._optimizer = None

    def live_ranks(self) -> dict[str, int]:
        """The ranks of the plan, always: a pruned rank lives on as a copy."""
        return {name: layer.rank for name, layer in self._layers.items()}

    def fold_state(self) -> FoldState:
        """The scores r softmax(z / tau), as gates."""
        return FoldState(gates=self.gates.effective())

    def events(self) -> tuple[RankEvent, ...]:
        """The resets since this was last asked: by layer, the pruned ranks, what they are copies of, and all scores."""
        found, self._events = tuple(self._events), []
        return found

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The smallest and the largest score, and the ranks overwritten so far; waits for the device."""
        found = scores(self._logits(), self._method.tau)
        return {
            "beamlora_smallest": float(found.min()),
            "beamlora_largest": float(found.max()),
            "beamlora_overwritten": float(self._pruned),
        }

    def remarks(self) -> tuple[str, ...]:
        """A temperature that the authors lower, and a past that a checkpoint lacks."""
        course, told = self._course, []
        if course is None or self._optimizer is None:
            return ()
        rates = [float(group.get("initial_lr", group["lr"])) for group in self._optimizer.param_groups]
        if self._method.tau == BeamLoRA.tau and 0 < max(rates) < _LARGE_RATE:
            told.append(
                f"beamlora: below a learning rate of {_LARGE_RATE:g} the authors take tau 0.03: set beamlora.tau"
            )
        coming = course.coming(self._step + 1)
        taken = snapshot_step(coming, course.period)
        if taken <= self._step and course.reads(coming) and self._past_step != taken:
            told.append(f"beamlora: the checkpoint lacks what the reset after step {coming} copies from: it is skipped")
        return tuple(told)

    def fault(self) -> ScheduleFault | None:
        """Resets that fell due and were not made, or scores that never moved; waits for the device."""
        course = self._course
        if course is None or self._method.cumsum_threshold == 1:
            return None
        due = min(self._step // course.period, course.count)
        if due and not self._made:
            return ScheduleFault(
                f"no reset was made in {self._step} steps, and {due} fell due (of which {self._lost} were skipped for "
                f"scores that were NaN or infinite, {self._unread} for want of the past that they copy from)",
                "train with the session's callback in every step, and go on from checkpoints that are whole",
            )
        if due and not any(bool(self.gates.value(name).detach().any()) for name in self.gates.names):
            return ScheduleFault(
                f"the scores never moved in {self._step} steps, so that ranks were pruned by their position",
                "train with the session's optimizer, at a learning rate above 0",
            )
        return None

    def memory_bytes(self) -> int:
        """The scores with gradient and moments, and the past where it lies in the layers' own memory, the CPU's."""
        held = 4 * 4 * sum(layer.rank for layer in self._layers.values())
        past = 0 if self._method.cumsum_threshold == 1 or self._method.conserve else 1 + 2 * self._copies_moments
        on_cpu = (layer for layer in self._layers.values() if layer.lora_A.device.type == "cpu")
        return held + past * sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in on_cpu)

    def state_dict(self) -> dict[str, Any]:
        """Counters, the logits, and the past with its step while a reset waits for it."""
        course = self._course
        period, end_step = (course.period, course.end_step) if course else self._resumed or (None, None)
        return {
            "method": self._method.id,
            "step": self._step,
            "period": period,
            "end_step": end_step,
            "made": self._made,
            "pruned": self._pruned,
            "lost": self._lost,
            "unread": self._unread,
            "snapshot_step": self._past_step,
            "snapshot_tensors": len(self._past),
            **{f"z.{name}": self.gates.value(name).detach().clone() for name in self.gates.names},
            **{f"{_PAST}{part}": value.clone() for part, value in self._past.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; without a snapshot too, and then the reset that wants it is skipped.

        Raises:
            CheckpointError: the state is another method's, of another plan or other settings, or in parts.
        """
        if state.get("method") != self._method.id:
            raise CheckpointError(
                f"the schedule's state is of {state.get('method')!r}, the run is {self._method.id}: resume with the "
                "methods of the checkpoint"
            )
        faults = self._state_faults(state)
        if faults:
            more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the state of beamlora is not this plan's: {'; '.join(faults[:8])}{more}: take the state of the run's "
                "own checkpoint"
            )
        for name in self.gates.names:
            self.gates.write(name, state[f"z.{name}"])
        self._step, self._made, self._pruned = state["step"], state["made"], state["pruned"]
        self._lost, self._unread = state["lost"], state["unread"]
        self._resumed = (state["period"], state["end_step"]) if state["period"] else None
        self._past = {key.removeprefix(_PAST): _on_host(v) for key, v in state.items() if key.startswith(_PAST)}
        self._past_step = state["snapshot_step"] if self._past else None

    def _state_faults(self, state: Mapping[str, Any]) -> list[str]:
        counters = ("step", "made", "pruned", "lost", "unread", "snapshot_tensors")
        faults = [f"{key} is missing" for key in counters if not _whole(state.get(key))]
        faults += [f"{key} is missing" for key in ("period", "end_step", "snapshot_step") if key not in state]
        for key, wanted in (("period", self._method.reset_every), ("end_step", self._method.reset_end_step)):
            if wanted is not None and state.get(key) not in (None, wanted):
                faults.append(f"{key} is {state[key]}, and the settings say {wanted}")
        tensors = {key: value for key, value in state.items() if key.startswith(("z.", _PAST))}
        kept = [key for key in tensors if key.startswith(_PAST)]
        if kept and len(kept) != state.get("snapshot_tensors"):
            faults.append(f"{len(kept)} of {state.get('snapshot_tensors')} tensors of the snapshot are there")
        expected = {f"z.{name}": self.gates.value(name) for name in self.gates.names}
        if kept:
            expected |= {f"{_PAST}z.{name}": self.gates.value(name) for name in self.gates.names}
            for name, layer in self._layers.items():
                for side, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                    expected[f"{_PAST}{side}.{name}"] = factor
                    moments = (f"{_PAST}{side}.{key}.{name}" for key in _MOMENTS)
                    expected |= {key: factor for key in moments if key in tensors}
        return faults + state_faults(expected, tensors)

    def _course_of(self, max_steps: int) -> _Course:
        """The course of a run of this length; a resumed one keeps its times."""
        period, end_step = self._resumed or (None, None)
        return _course(self._method, max_steps, period, end_step)

    @property
    def _copies_moments(self) -> bool:
        return self._method.reset_optimizer and self._method.variant == "intended"

    def _logits(self) -> Float[Tensor, "modules rank"]:
        """Of all layers in their order, float32 on the CPU, where every process decides alike."""
        values = [self.gates.value(name).detach() for name in self.gates.names]
        return torch.stack([value.to(values[0].device, torch.float32) for value in values]).cpu()

    def _parts(self, name: str) -> dict[str, Tensor]:
        """What is copied of a layer: factors, and their moments where they are copied too; live."""
        layer = self._layers[name]
        found: dict[str, Tensor] = {"A": layer.lora_A, "B": layer.lora_B}
        if self._copies_moments:
            for side, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                found |= {f"{side}.{key}": moment for key, moment in self._moments(factor).items()}
        return found

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        assert self._optimizer is not None
        state: Mapping[str, Any] = self._optimizer.state.get(parameter, {})
        return {key: state[key] for key in _MOMENTS if key in state}

    def _keep_past(self, step: int) -> None:
        """The factors as they are, on the CPU; the logits with them, though no reset reads them."""
        self._past, self._past_step = {}, step
        for name in self._layers:
            self._past[f"z.{name}"] = _on_host(self.gates.value(name))
            for part, live in self._parts(name).items():
                self._past[f"{part}.{name}"] = _on_host(live)

    def _forget_past(self) -> None:
        self._past, self._past_step = {}, None

    def _lacks_past(self, reset: int) -> bool:
        assert self._course is not None
        return self._past_step != snapshot_step(reset, self._course.period)

    def _reset(self, step: int, share: float) -> None:
        method, logits = self._method, self._logits()
        # All that is decided follows from these. Compared first: a process that skips must not leave others waiting.
        digest = hashlib.blake2b(_bytes(logits), digest_size=16)
        known = f"{digest.hexdigest()}, past of step {self._past_step}"
        assert_equal_everywhere(known, f"what beamlora's reset after step {step} goes by")
        importance = scores(logits, method.tau)
        if not bool(importance.isfinite().all()):
            self._skip_lost(step, importance)
            return
        mask = pruned_masks(importance, share, scope=method.scope, keep_boundary=method.keep_boundary)
        if method.variant == "intended":
            mask = capped(mask, importance)
        if bool(mask.any()) and not method.conserve and self._lacks_past(step):
            self._unread += 1
            logger.warning(
                "beamlora: the reset after step %d is skipped: the factors that it copies from were not kept, or not "
                "stored in the checkpoint",
                step,
            )
            return
        age = 0 if self._past_step is None else step - self._past_step
        details: dict[str, Any] = {}
        for index, name in enumerate(self.gates.names):
            pruned = mask[index].nonzero().flatten()
            if len(pruned):
                permutation = self._permutation(step, index, len(pruned))
                sources = source_ranks(importance[index], permutation, stable=method.variant == "intended")
                for tensor in (pruned, sources, *self._overwrite(name, logits[index], pruned, sources)):
                    digest.update(_bytes(tensor))
                details[name] = {
                    "pruned": pruned.tolist(),
                    "sources": sources.tolist(),
                    "permutation": permutation.tolist(),
                    "importance": importance[index].tolist(),
                }
            if method.reset_optimizer and (len(pruned) or method.variant == "official"):
                for moment in self._moments(self.gates.value(name)).values():
                    moment.zero_()
        self._forget_past()
        self._made += 1
        self._pruned += int(mask.sum())
        assert_equal_everywhere(digest.hexdigest(), f"what beamlora copied in its reset after step {step}")
        self._record(step, share, mask, age, details)

    def _overwrite(self, name: str, logits: Tensor, pruned: Tensor, sources: Tensor) -> list[Tensor]:
        """Makes a layer's pruned ranks copies of the sources and gives both new logits; all that is new."""
        method = self._method
        for part, live in self._parts(name).items():
            history = live if method.conserve else self._past.get(f"{part}.{name}")
            if history is not None:
                copy_ranks(live, history, pruned, sources, dim=0 if part.startswith("A") else 1)
        if method.conserve:
            moved = halved_logits(logits, pruned, sources, method.tau)
        else:
            moved = mean_logits(logits, pruned, sources)
        self.gates.write(name, moved)
        layer = self._layers[name]
        return [
            moved,
            layer.lora_A.index_select(0, pruned.to(layer.lora_A.device)),
            layer.lora_B.index_select(1, pruned.to(layer.lora_B.device)),
        ]

    def _skip_lost(self, step: int, importance: Tensor) -> None:
        self._lost += 1
        finite = importance.isfinite().all(dim=-1).tolist()
        name = self.gates.names[finite.index(False)]
        told = f"beamlora: after step {step} the scores of {name} are NaN or infinite"
        if self._lost >= _MOST_LOST:
            raise HealthError(
                f"{told}, as at a reset before: lower the learning rate, and look for overflow in the gradients"
            )
        logger.warning("%s, and the reset is skipped", told)

    def _record(self, step: int, share: float, mask: Tensor, age: int, details: Mapping[str, Any]) -> None:
        count = int(mask.sum())
        self._events.append(
            RankEvent(
                step=step,
                kind="reset",
                ranks={name: self._layers[name].rank for name in details},
                reason="the lowest ranks became copies of the best" if count else "no rank is beyond the share kept",
                figures={
                    "kept_share": share,
                    "pruned": float(count),
                    "pruned_share": count / mask.numel(),
                    "history_age": float(age),
                },
                layers=details,
            )
        )


def _refuse_ranks(ranks: Mapping[str, int]) -> None:
    first, rank = next(iter(ranks.items()))
    other = next((name for name, found in ranks.items() if found != rank), None)
    if other is not None:
        raise ConfigError(
            f"beamlora compares the ranks of all layers in one sum, which needs one rank everywhere, and {first} has "
            f"{rank} and {other} {ranks[other]}: give every layer the same rank, or leave it out with rank 0"
        )
    if rank == 1:
        raise ConfigError("r: 1: beamlora's score of a single rank is always 1, and there is none to copy; use r >= 2")


def _engine_faults(optimizer: Optimizer, layers: Mapping[str, AdaptedLayer]) -> list[str]:
    engine = any(kind.__module__.startswith("deepspeed.runtime") for kind in type(optimizer).__mro__)
    if engine or not isinstance(optimizer, Adam | AdamW):
        return [
            f"beamlora copies and empties moments rank by rank, as torch's Adam and AdamW keep them, and the trainer "
            f"runs {type(optimizer).__name__}: use optim: adamw_torch, without a pair optimizer or DeepSpeed"
        ]
    for name, layer in layers.items():
        shapes = (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape))
        whole = ((layer.rank, layer.base.shape.in_features), (layer.base.shape.out_features, layer.rank))
        if shapes != whole or isinstance(layer.lora_A, DTensor) or isinstance(layer.lora_B, DTensor):
            return [
                f"{name}: lora_A is {list(shapes[0])} and lora_B {list(shapes[1])} here, sharded or flattened, and "
                "beamlora writes single ranks of whole factors: train with DDP"
            ]
    return []


def _bytes(tensor: Tensor) -> bytes:
    """The values as float64, for a hash."""
    return tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes()


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU in the same dtype, in pinned memory where it comes from a GPU."""
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return kept.copy_(tensor.detach())
