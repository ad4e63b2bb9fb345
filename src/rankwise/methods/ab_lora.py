"""AB-LoRA: ranks move, during training, from where they can be missed to layers that miss none of theirs.

"ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models", Liu, Lyn, Zhu, Tian, Graham,
arXiv 2403.16187v2, NAACL 2024. AB-LoRA is the paper's own name for its ablation-based scoring; in PEFT and in servers
"aLoRA" is Activated LoRA, an unrelated method.

The idea: every layer starts with the same rank, so that the budget is met from the first step. After a short training
each rank is switched off, and switched on alone, on one validation batch: its score is what the first loses and the
second wins. The few lowest are switched off for good, as many new ranks go to layers that lost none, and training goes
on to the next round.

| paper | here |
|---|---|
| eq. 3: z = x W_A G W_B, G = diag(0 or 1) | `adapters.gates.RankGates` |
| eq. 6: IS(r) = S(M) - S(M without r) + S(M_r) | `importance`, of the terms of `methods.ablation` |
| algorithm 1, prune the n_A ranks of lowest IS | `lowest` |
| section 3.4, footnote 3: new ranks as evenly as possible, the better layers first | `queue`, `distribute` |
| algorithm 1: K1 epochs, then N_A rounds K2 epochs apart | `scaled_rounds`, `epoch_rounds` |

There is no code of the authors. Departures from the paper, with reasons:
- A mask over slots of fixed number instead of matrices that grow and shrink: the same function at static shapes.
- `budget: parameters` (the default) adds a rank only where its parameters fit into what pruning set free, because
  ranks of wide layers cost more and `r` promises a number of parameters; `budget: ranks` is the paper's.
- S(M) and the base model's S are constants that order nothing: scores are differences to them, which round-off in a
  large loss does not drown.
- New ranks start as LoRA's do, Kaiming lora_A and zero lora_B, with empty moments; the paper says "newly initialized".
- Rounds scale with the run; the paper's epochs are the preset `paper`. N_mod ranks a round is read as the number of
  kinds of layers in a block (7 in a Llama), which fits the final sizes that the paper prints.
- `min_rank` keeps a floor under every layer; the paper has none, and 0 is the default.
"""

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.optim import Adam, Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import RankGates
from rankwise.adapters.slots import clear_slots, fill_slots
from rankwise.adapters.state import FoldState
from rankwise.calibration.processes import assert_equal_everywhere
from rankwise.errors import CheckpointError, ConfigError, HealthError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.methods.ablation import Ablation, Scores
from rankwise.methods.base import Budget, Method, Slot, setting_faults
from rankwise.methods.schedule import RankEvent, Scene, Schedule, ScheduleFault, SteadyRanks
from rankwise.methods.scored import batches_hash, labelled, row_counts, row_groups
from rankwise.methods.screening import screened
from rankwise.ranks.shapes import LayerShape

__all__ = [
    "ABLoRA",
    "ABLoRASchedule",
    "distribute",
    "epoch_rounds",
    "importance",
    "layer_kinds",
    "lowest",
    "queue",
    "scaled_rounds",
]

logger = logging.getLogger(__name__)

_MOST_ROUNDS = 20
_LOST_IN_A_ROW = 2


@dataclass(frozen=True, kw_only=True)
class ABLoRA(Method):
    """Scores every rank on validation data a few times in the run, and moves the lowest to layers that lost none.

    Args:
        rounds: N_A, how often; 0 is plain LoRA. 8 [paper, section 4.3].
        prune_per_round: n_A, ranks switched off in a round; 0 is plain LoRA. None takes the number of kinds of layers
            in a block, at most a 16th of all ranks.
        prune_fraction: n_A as a share of all ranks in [0, 0.5), in place of `prune_per_round`.
        budget: `parameters` adds a rank only where its parameters were set free; `ranks` adds as many as were taken, so
            that parameters may drift [paper].
        score: `exact` scores by ablation. `screened` ablates on as many sequences as tell the lowest ranks from the
            others, with slopes in the gates for the rest: cheaper, and near-ties may fall the other way. `taylor` takes
            the slopes alone, two backward passes a round, and finds other ranks.
        w_drop: weight of what switching a rank off loses, >= 0; 1 [paper, eq. 6].
        w_solo: weight of what a rank alone wins, >= 0; 1 [paper, eq. 6].
        min_rank: ranks that every layer keeps, >= 0.
        growth: slots that a layer can gain beyond its start; None is one a round.
        sequences: how many validation sequences are scored on, >= 1; 32 [paper, section 4.3].
        redraw: whether each round takes the next `sequences` of the validation data; else all take the same [paper].
        warmup_epochs: K1, epochs before the first round; None scales all rounds to the run. 1 [paper].
        round_epochs: K2, epochs between rounds, needed with `warmup_epochs`. 0.25 [paper].
        epoch_steps: optimizer steps of one epoch, needed with `warmup_epochs`.
        scoring_bytes: about how much the activations of one scoring pass may take, >= 1.
    """

    id: ClassVar[str] = "ab-lora"
    title: ClassVar[str] = "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models"
    source: ClassVar[str] = "arXiv:2403.16187v2"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (2e-5, 1e-4, 1e-3)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"budget": "ranks", "rounds": 8, "warmup_epochs": 1.0, "round_epochs": 0.25, "sequences": 32}
    }

    @property
    def needs_validation(self) -> bool:
        """True, unless no rank ever moves."""
        return not self.neutral

    @property
    def scored_rows(self) -> int:
        """`sequences`, for every round where each takes its own."""
        return self.sequences * (self.rounds if self.redraw else 1)

    rounds: int = 8
    prune_per_round: int | None = None
    prune_fraction: float | None = None
    budget: Literal["parameters", "ranks"] = "parameters"
    score: Literal["exact", "screened", "taylor"] = "exact"
    w_drop: float = 1.0
    w_solo: float = 1.0
    min_rank: int = 0
    growth: int | None = None
    sequences: int = 32
    redraw: bool = False
    warmup_epochs: float | None = None
    round_epochs: float | None = None
    epoch_steps: int | None = None
    scoring_bytes: int = 2**30

    def __post_init__(self) -> None:
        optional = ("prune_fraction", "warmup_epochs", "round_epochs")
        faults = setting_faults(
            self,
            choices={"budget": ("parameters", "ranks"), "score": ("exact", "screened", "taylor")},
            numbers={"w_drop": 0, "w_solo": 0} | {key: 0 for key in optional if getattr(self, key) is not None},
            wholes={
                "rounds": 0,
                "prune_per_round": 0,
                "min_rank": 0,
                "growth": 0,
                "sequences": 1,
                "epoch_steps": 1,
                "scoring_bytes": 1,
            },
            flags=("redraw",),
        )
        if faults := faults or self._contradictions():
            raise ConfigError(faults)

    def _contradictions(self) -> list[str]:
        faults = []
        if self.prune_per_round is not None and self.prune_fraction is not None:
            faults.append("ab-lora.prune_per_round and ab-lora.prune_fraction both say how many; leave one out")
        if self.prune_fraction is not None and self.prune_fraction >= 0.5:
            faults.append(f"ab-lora.prune_fraction: {self.prune_fraction:g} is out of range; use a share below 0.5")
        if self.score == "screened" and self.min_rank:
            faults.append("ab-lora.score: screened looks for the lowest ranks of all; use exact with min_rank")
        if self.w_drop == self.w_solo == 0:
            faults.append("ab-lora.w_drop and ab-lora.w_solo: both 0 leave no score; use 1 and 1")
        if (self.warmup_epochs is None) != (self.round_epochs is None):
            faults.append("ab-lora.warmup_epochs and ab-lora.round_epochs go together; give both (1 and 0.25) or none")
        if self.round_epochs == 0:
            faults.append("ab-lora.round_epochs: 0 leaves new ranks untrained; use a number above 0")
        if self.warmup_epochs is None and self.rounds > _MOST_ROUNDS:
            faults.append(
                f"ab-lora.rounds: {self.rounds} rounds, a 24th of the run apart after a warm-up of a 6th, are more "
                f"than fit; use at most {_MOST_ROUNDS}, or say when by warmup_epochs and round_epochs"
            )
        return faults

    @property
    def neutral(self) -> bool:
        """Whether no rank ever moves, so that this is plain LoRA."""
        return self.rounds == 0 or self.prune_per_round == 0 or self.prune_fraction == 0

    def capacity(self, layers: Sequence[LayerShape], ranks: Mapping[str, int]) -> dict[str, int]:
        """The slots that each layer's adapter is built with: min(in, out, rank + growth), none for a dropped layer.

        Slots beyond the layer's rank start empty (zero rows of lora_A); the scaling is that of the rank.

        Args:
            layers: the targets.
            ranks: by layer, the rank that it starts with, >= 0.

        Source: ours; the paper appends rows, which would change shapes in training.
        """
        growth = 0 if self.neutral else self.rounds if self.growth is None else self.growth
        rooms = {layer.name: min(layer.max_rank, ranks[layer.name] + growth) for layer in layers}
        return {name: room if ranks[name] else 0 for name, room in rooms.items()}

    def for_epochs_of(self, steps: int) -> "ABLoRA":
        """With `epoch_steps`, where rounds are counted in epochs and nobody said how long one is."""
        if self.warmup_epochs is None or self.epoch_steps is not None:
            return self
        return replace(self, epoch_steps=steps)

    def check_ranks(self, layers: Sequence[LayerShape], ranks: Sequence[int]) -> None:
        """Refuses ranks of which a round could not switch off as many as it is to.

        Raises:
            ConfigError: half of all ranks or more, or more than `min_rank` leaves.
        """
        if self.neutral or not any(ranks):
            return
        count = self.prunes([layer.name for layer in layers], sum(ranks))
        above = sum(max(0, rank - self.min_rank) for rank in ranks)
        if above < count:
            raise ConfigError(
                f"ab-lora.min_rank: {self.min_rank} leaves {above} of {sum(ranks)} ranks to switch off, and a round "
                f"takes {count}; use a smaller min_rank or a larger r"
            )

    def count(self, names: Sequence[str], ranks: int) -> int:
        """n_A: how many ranks a round switches off.

        Args:
            names: the adapted layers.
            ranks: R, the live ranks of all of them at the start.
        """
        count = self.prune_per_round
        if count is None and self.prune_fraction is not None:
            count = max(1, math.floor(self.prune_fraction * ranks)) if self.prune_fraction else 0
        if count is None:
            count = min(layer_kinds(names), max(1, ranks // 16))
        return count

    def prunes(self, names: Sequence[str], ranks: int) -> int:
        """`count`, if it can be kept up.

        Raises:
            ConfigError: half of all ranks or more.
        """
        count = self.count(names, ranks)
        if count and not self.neutral and 2 * count >= ranks:
            raise ConfigError(
                f"ab-lora: {count} of {ranks} ranks would be switched off in every round; use less than half "
                "(prune_per_round), a larger r or more target_modules"
            )
        return count

    def round_steps(self, max_steps: int) -> tuple[int, ...]:
        """The steps after which rounds happen.

        Raises:
            ConfigError: the run is too short for them, with the steps that they need.
        """
        if self.neutral:
            return ()
        if self.warmup_epochs is None or self.round_epochs is None:
            steps = scaled_rounds(max_steps, self.rounds)
            if steps[-1] >= max_steps:
                raise ConfigError(
                    f"ab-lora: the last of {self.rounds} rounds would come after step {steps[-1]} of {max_steps}, with "
                    f"no step left to train its new ranks: use at least {_steps_needed(self.rounds)} steps or fewer "
                    "rounds"
                )
            return steps
        if self.epoch_steps is None:
            raise ConfigError(
                "ab-lora.warmup_epochs and round_epochs count in epochs: say how many optimizer steps one has "
                "(ab-lora.epoch_steps), or leave them out, and rounds scale to the run"
            )
        steps = epoch_rounds(self.epoch_steps, self.rounds, self.warmup_epochs, self.round_epochs)
        needed = math.ceil(self.epoch_steps * (self.warmup_epochs + self.rounds * self.round_epochs))
        if max(needed, steps[-1] + 1) > max_steps:
            raise ConfigError(
                f"ab-lora: {self.warmup_epochs:g} epochs and {self.rounds} rounds of {self.round_epochs:g} take "
                f"{max(needed, steps[-1] + 1)} steps of the run's {max_steps}: train longer, use fewer rounds, or "
                "leave warmup_epochs and round_epochs out, and rounds scale to the run"
            )
        return steps

    def make_schedule(self, scene: Scene) -> Schedule:
        """Masks on the slots, all live but the empty ones; rounds come after `begin`.

        Raises:
            ConfigError: no validation batches, none with a label, or more ranks to prune than there are.
        """
        return ABLoRASchedule(self, scene)

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What rounds cost, and where they depart from what was asked."""
        if self.neutral:
            return ("ab-lora: no rank is ever switched off, so this is plain LoRA",)
        total = sum(ranks.values())
        told = [
            f"ab-lora: each of up to {self.rounds} rounds switches {self.prunes(list(ranks), total)} of {total} ranks "
            "off and gives them to layers that lost none; a plan shows the ranks of the start"
        ]
        if self.score != "taylor":
            told.append(
                f"ab-lora: a round scores every rank twice on {self.sequences} validation sequences, "
                f"{2 * total * self.sequences:,} sequences through about half of the model without gradients"
            )
        else:
            told.append(
                "ab-lora: score: taylor is an approximation that picked other ranks than exact in two of three toys"
            )
        if self.budget == "ranks":
            told.append("ab-lora: budget: ranks keeps the number of ranks; the number of parameters may drift from r's")
        return tuple(told)


# --- equations, in the paper's order ------------------------------------------------------------------------------


def importance(
    drop: Float64[Tensor, " slots"], solo: Float64[Tensor, " slots"], *, w_drop: float = 1.0, w_solo: float = 1.0
) -> Float64[Tensor, " slots"]:
    """IS - S(base) = w_drop (S(M) - S(M without r)) + w_solo (S(M_r) - S(base)), one number a rank; never NaN.

    A rank without which the model's loss is not finite bears load: +inf. One that alone breaks the base model: -inf.

    Args:
        drop: S(M) - S(M without r).
        solo: S(M_r) - S(base).
        w_drop: weight of the first term.
        w_solo: weight of the second.

    Source: arXiv 2403.16187v2, eq. 6; S(base), the same for all ranks, is left out, and the weights are ours.
    """
    value = w_drop * drop + w_solo * solo
    value = torch.where(solo.isfinite() & value.isfinite(), value, -math.inf)
    return torch.where(drop.isfinite(), value, math.inf)


def lowest(
    scores: Mapping[str, Float64[Tensor, " slots"]],
    slots: Mapping[str, Sequence[int]],
    count: int,
    *,
    min_rank: int = 0,
) -> tuple[tuple[str, int], ...]:
    """The ranks of lowest score, as (layer, slot); of equal ones the first layer's, then the first slot.

    Args:
        scores: by layer in the model's order, one number a live rank; no NaN.
        slots: by layer, the live slots in the same order.
        count: how many; one rank always stays.
        min_rank: no layer falls below it.

    Source: arXiv 2403.16187v2, algorithm 1.
    """
    ranked = sorted(
        (value, layer, slot, name)
        for layer, name in enumerate(scores)
        for value, slot in zip(scores[name].tolist(), slots[name], strict=True)
    )
    left = {name: len(chosen) for name, chosen in slots.items()}
    chosen: list[tuple[str, int]] = []
    for _, _, slot, name in ranked:
        if len(chosen) == min(count, len(ranked) - 1):
            break
        if left[name] > min_rank:
            chosen.append((name, slot))
            left[name] -= 1
    return tuple(chosen)


def queue(scores: Mapping[str, Float64[Tensor, " slots"]], pruned: Sequence[str]) -> tuple[str, ...]:
    """U: the layers that lost no rank, by the mean score of their live ranks, the highest first.

    A layer without a live rank, or with one that breaks the model alone, comes last; equal ones in the model's order.

    Source: arXiv 2403.16187v2, section 3.4, footnote 3.
    """

    def mean(values: Float64[Tensor, " slots"]) -> float:
        return float(values.mean()) if len(values) and not bool((values == -math.inf).any()) else -math.inf

    unpruned = [name for name in scores if name not in pruned]
    return tuple(sorted(unpruned, key=lambda name: -mean(scores[name])))


def distribute(count: int, rooms: Sequence[int], costs: Sequence[int], free: int) -> tuple[int, ...]:
    """New ranks for each layer of U: one after another to whichever has the fewest yet, the earlier first.

    With room and parameters enough for all that is divmod(count, layers): every layer the quotient, and the first
    ones, as many as the remainder, one more.

    Args:
        count: at most so many.
        rooms: by layer in the order of U, its empty slots.
        costs: by layer, the parameters of a rank; 0 where they do not count.
        free: parameters that may be spent; a layer whose rank does not fit is passed over.

    Source: arXiv 2403.16187v2, section 3.4, footnote 3; room and parameters are ours.
    """
    given = [0] * len(rooms)
    for _ in range(count):
        able = [i for i, room in enumerate(rooms) if given[i] < room and costs[i] <= free]
        if not able:
            break
        best = min(able, key=lambda i: (given[i], i))
        given[best] += 1
        free -= costs[best]
    return tuple(given)


def layer_kinds(names: Sequence[str]) -> int:
    """How many kinds of layers there are: names that differ in their numbers alone are one kind.

    Source: arXiv 2403.16187v2, section 3.1, N_mod counted in a block [our reading].
    """
    return len({re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "#", name) for name in names})


def scaled_rounds(max_steps: int, rounds: int) -> tuple[int, ...]:
    """Steps of the rounds in a run of any length: ceil(M / 6) + floor(n M / 24) for n = 0, 1, ..., each once.

    The paper's first of three epochs of allocation is the first third of half a run.
    """
    steps = (math.ceil(max_steps / 6) + n * max_steps // 24 for n in range(rounds))
    return tuple(dict.fromkeys(steps))


def epoch_rounds(epoch_steps: int, rounds: int, warmup_epochs: float, round_epochs: float) -> tuple[int, ...]:
    """Steps of the rounds by the paper: after K1 epochs, then every K2 epochs, in whole optimizer steps, each once.

    Source: arXiv 2403.16187v2, algorithm 1.
    """
    steps = (max(1, round(epoch_steps * (warmup_epochs + n * round_epochs))) for n in range(rounds))
    return tuple(dict.fromkeys(steps))


def _steps_needed(rounds: int) -> int:
    return next(steps for steps in range(1, 10**4) if scaled_rounds(steps, rounds)[-1] < steps)


# --- the schedule slot --------------------------------------------------------------------------------------------


class ABLoRASchedule(SteadyRanks):
    """Masks over slots, and the rounds that move them.

    Args:
        method: the settings.
        scene: the attached model; a slot whose row of lora_A is zero is empty, all others are live.

    Raises:
        ConfigError: see `ABLoRA.make_schedule`.
    """

    def __init__(self, method: ABLoRA, scene: Scene) -> None:
        self._method, self._layers, self._seed = method, dict(scene.layers), scene.seed
        masks = {name: layer.lora_A.detach().any(dim=1).float() for name, layer in self._layers.items()}
        self._start_ranks = int(sum(mask.sum() for mask in masks.values()))
        self._prunes = method.count(list(masks), self._start_ranks)
        self._groups = [] if method.neutral else row_groups(labelled(scene, method.id), method.sequences)
        self._validation = batches_hash(self._groups)
        self._gates = RankGates(scene.model, self._layers, masks)
        self._start_parameters = self._live_parameters()
        self._ablation = Ablation(
            scene.model, self._layers, self._gates, loss=scene.loss, memory_bytes=method.scoring_bytes
        )
        self._optimizer: Optimizer | None = None
        self._steps: tuple[int, ...] | None = None
        self._begun = self._step = self._next = self._lost = self._lost_in_a_row = 0
        self._moved = False
        self._pruned = 0
        self._fresh: Mapping[str, Sequence[int]] = {}
        self._events: list[RankEvent] = []

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Fits the rounds to the run, and looks in a few passes how this model can be scored.

        Raises:
            ConfigError: a run too short, an optimizer that keeps no moments to empty, factors that are sharded.
            CalibrationError: processes with different validation batches.
        """
        _refuse(optimizer, self._layers)
        self._optimizer = optimizer
        ahead = self._rounds(max_steps)
        if self._steps is None:
            self._steps = ahead
        if ahead:
            assert_equal_everywhere(self._validation, "the validation data that ab-lora scores on")
            self._ablation.prepare(self._groups[0][0])

    def _rounds(self, max_steps: int) -> tuple[int, ...]:
        """The steps of the rounds to come: laid out over the run once, and then kept.

        Raises:
            ConfigError: they do not fit the run.
        """
        if self._steps is None:
            return self._method.round_steps(max_steps)
        late = [step for step in self._steps[self._next :] if step >= max_steps]
        if late:
            raise ConfigError(
                f"ab-lora: the checkpoint's rounds come after steps {', '.join(map(str, late))}, and the run ends "
                f"after {max_steps}: resume with at least {late[-1] + 1} steps"
            )
        return self._steps[self._next :]

    def before_step(self, step: int) -> None:
        """Notes that a step begins; a round that its end does not bring is a fault."""
        self._begun = step
        self._fresh = {}

    def before_optimizer_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """A round, where one is due.

        Raises:
            HealthError: the loss on the validation batch was not finite in two rounds in a row.
        """
        self._step = step
        if self._steps and self._next < len(self._steps) and step >= self._steps[self._next]:
            self._round(step)
            self._next += 1

    def end(self, step: int) -> None:
        """Notes rounds that what is exported is from before, and takes off new ranks that no step has trained."""
        if not self._steps:
            return
        reasons, left = [], len(self._steps) - self._next
        if left and self._step < step:
            plain = ", and has the ranks of the start" if not self._next else ""
            reasons.append(f"the best checkpoint, of step {self._step}, is from before {left} of the rounds{plain}")
        elif left:
            reasons.append(f"the run ended after step {step}, before {left} of its rounds")
        fresh, self._fresh = self._fresh, {}
        for name, slots in fresh.items():
            self._switch(name, slots, on=False)
            clear_slots(self._optimizer, self._layers[name], slots)
        if fresh:
            reasons.append(f"{sum(map(len, fresh.values()))} new ranks that no step had trained are off again")
        if reasons:
            live, reason = self.live_ranks(), "; ".join(reasons)
            logger.warning("ab-lora: %s; the adapter has the ranks that are live", reason)
            self._events.append(
                RankEvent(step=step, kind="unfinished", ranks={name: live[name] for name in fresh}, reason=reason)
            )

    # Algorithm 1, one pass of the loop.
    def _round(self, step: int) -> None:
        slots = self._live_slots()
        batches = self._groups[self._next % len(self._groups) if self._method.redraw else 0]
        scores = self._scores(batches, slots)
        if not math.isfinite(scores.model):
            self._skip(step)
            return
        self._lost_in_a_row = 0
        values = {name: self._importance(scores.drop[name], scores.solo[name]) for name in slots}
        self._moved |= any(bool(term.any()) for terms in (scores.drop, scores.solo) for term in terms.values())
        pruned = self._lowest(values, slots)
        self._pruned += sum(map(len, pruned.values()))
        for name, lost in pruned.items():
            self._switch(name, lost, on=False)
            clear_slots(self._optimizer, self._layers[name], lost)
        added = self._fresh = self._grow(values, pruned)
        self._assert_equal()
        self._events.append(self._event(step, scores, values, pruned, added))

    def _scores(self, batches: Sequence[Any], slots: Mapping[str, tuple[int, ...]]) -> Scores:
        if self._method.score == "exact":
            return self._ablation.exact(batches, slots)
        if self._method.score == "taylor":
            return self._ablation.taylor(batches, slots)
        return screened(
            self._ablation,
            batches,
            slots,
            score=self._importance,
            count=min(self._prunes, sum(map(len, slots.values())) - 1),
            lowest=lambda values: list(self._lowest(values, slots)),
        )

    def _importance(self, drop: Float64[Tensor, " n"], solo: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        return importance(drop, solo, w_drop=self._method.w_drop, w_solo=self._method.w_solo)

    def _lowest(
        self, values: Mapping[str, Float64[Tensor, " slots"]], slots: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        return _by_layer(lowest(values, slots, self._prunes, min_rank=self._method.min_rank))

    def _grow(
        self, values: Mapping[str, Float64[Tensor, " slots"]], pruned: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """New ranks for the layers that lost none, into the first empty slots: the update stays what it was."""
        order = queue(values, list(pruned))
        empty = {name: [slot for slot, on in enumerate(self._gates.value(name).tolist()) if not on] for name in order}
        counts = self._method.budget == "parameters"
        costs = [self._layers[name].base.shape.cost if counts else 0 for name in order]
        free = self._start_parameters - self._live_parameters() if counts else 0
        wanted = self._prunes if counts else sum(map(len, pruned.values()))
        given = distribute(wanted, [len(empty[name]) for name in order], costs, free)
        added = {name: empty[name][:count] for name, count in zip(order, given, strict=True) if count}
        for name, slots in added.items():
            rows = [self._fresh_row(name, slot) for slot in slots]
            fill_slots(self._optimizer, self._layers[name], slots, torch.cat(rows))
            self._switch(name, slots, on=True)
        return added

    def _fresh_row(self, name: str, slot: int) -> Tensor:
        source = generator(self._seed, "ab-lora", self._next, name, slot)
        return kaiming_uniform(1, self._layers[name].base.shape.in_features, source)

    def _switch(self, name: str, slots: Sequence[int], *, on: bool) -> None:
        mask = self._gates.value(name).clone()
        mask[list(slots)] = float(on)
        self._gates.write(name, mask)

    def _skip(self, step: int) -> None:
        """A round without a finite S(M) changes nothing."""
        self._lost += 1
        self._lost_in_a_row += 1
        reason = "the loss on the validation batch is not finite"
        logger.warning("ab-lora: step %d: %s; the round is skipped", step, reason)
        self._events.append(RankEvent(step=step, kind="skip", ranks={}, reason=reason))
        if self._lost_in_a_row >= _LOST_IN_A_ROW:
            raise HealthError(
                f"ab-lora: {reason} in {self._lost_in_a_row} rounds in a row (the last after step {step}), so no rank "
                "can be scored: lower the learning rate, and look for NaN in the training loss and the validation data"
            )

    def _event(
        self,
        step: int,
        scores: Scores,
        values: Mapping[str, Float64[Tensor, " slots"]],
        pruned: Mapping[str, Sequence[int]],
        added: Mapping[str, Sequence[int]],
    ) -> RankEvent:
        """Both terms of every score, and what came of them."""
        live, lost, won = self.live_ranks(), sum(map(len, pruned.values())), sum(map(len, added.values()))
        layers = {
            name: {
                "slots": list(slots),
                "drop": _json(scores.drop[name]),
                "solo": _json(scores.solo[name]),
                "importance": _json(values[name]),
                "pruned": list(pruned.get(name, ())),
                "added": list(added.get(name, ())),
            }
            for name, slots in scores.slots.items()
        }
        figures = {
            "round": self._next + 1,
            "pruned": lost,
            "added": won,
            "live_ranks": sum(live.values()),
            "live_parameters": self._live_parameters(),
            "free_parameters": self._start_parameters - self._live_parameters(),
            "score_model": scores.model,
            "passes": scores.passes,
            "sequences": scores.sequences,
        }
        if math.isfinite(scores.base):
            figures["score_base"] = scores.base
        reason = f"{lost} lowest scores off, {won} new ranks in layers that lost none"
        if lost > won:
            reason += (
                "; for the others there was no layer left" if not self._room(pruned) else "; the others do not fit"
            )
        return RankEvent(
            step=step,
            kind="reallocate" if won else "prune",
            ranks={name: live[name] for name in live if name in pruned or name in added},
            reason=reason,
            figures=figures,
            layers=layers,
        )

    def _room(self, pruned: Mapping[str, Sequence[int]]) -> bool:
        """Whether a layer that lost no rank has an empty slot."""
        return any(not bool(self._gates.value(name).all()) for name in self._layers if name not in pruned)

    def _assert_equal(self) -> None:
        """Masks and factors are the same bits in all processes, which train apart from here if they are not."""
        digest = hashlib.sha256()
        for name, layer in self._layers.items():
            for tensor in (self._gates.value(name), layer.lora_A, layer.lora_B):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        assert_equal_everywhere(digest.hexdigest()[:16], "the masks and factors after ab-lora's round")

    def _live_slots(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(slot for slot, on in enumerate(self._gates.value(name).tolist()) if on) for name in self._layers
        }

    def _live_parameters(self) -> int:
        return sum(rank * self._layers[name].base.shape.cost for name, rank in self.live_ranks().items())

    def live_ranks(self) -> dict[str, int]:
        """By layer, the slots whose gate is 1."""
        return {name: int(self._gates.value(name).sum()) for name in self._layers}

    def fold_state(self) -> FoldState:
        """The masks."""
        return FoldState(gates=self._gates.effective())

    def events(self) -> tuple[RankEvent, ...]:
        """One for each round since this was last asked; `layers` holds every scored layer, both terms a rank."""
        found, self._events = tuple(self._events), []
        return found

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """When rounds come, and what one does.

        Raises:
            ConfigError: the run is too short for them.
        """
        steps = self._rounds(max_steps)
        if not steps:
            return ("ab-lora: no rank moves",) if not self._next else ()
        ranks = sum(self.live_ranks().values())
        left = "more " if self._next else ""
        return (
            f"ab-lora: {len(steps)} {left}rounds, after steps {', '.join(map(str, steps))} of {max_steps}; each scores "
            f"{ranks} ranks, switches {self._prunes} off and gives them to layers that lost none",
        )

    def figures(self) -> dict[str, float]:
        """What is live, and how many rounds were made."""
        return {
            "ab-lora_live_ranks": float(sum(self.live_ranks().values())),
            "ab-lora_live_parameters": float(self._live_parameters()),
            "ab-lora_rounds": float(self._next),
        }

    def remarks(self) -> tuple[str, ...]:
        """What of the model keeps scoring from being cheaper, and validation rows that are fewer than asked for."""
        told = [f"ab-lora: {text}" for text in self._ablation.remarks]
        rows = row_counts(self._groups)
        if rows and rows[0] < self._method.sequences:
            told.append(
                f"ab-lora: ranks are scored on {rows[0]} validation sequences, all there are, in place of "
                f"{self._method.sequences}"
            )
        if self._method.redraw and len(self._groups) == 1 and self._steps and len(self._steps) > 1:
            told.append("ab-lora.redraw: the validation data holds one batch, so that every round scores on the same")
        return tuple(told)

    def fault(self) -> ScheduleFault | None:
        """Rounds that never came, or changed nothing."""
        if not self._steps:
            return None
        due = sum(step <= self._begun for step in self._steps)
        if self._next < max(1, due):
            return ScheduleFault(
                f"ab-lora made {self._next} of its {len(self._steps)} rounds in {self._begun} steps, and "
                + (f"{due} were due" if due else f"the first comes after step {self._steps[0]}: this is plain LoRA"),
                "train with the session's callback, for as many steps as the trainer was told",
            )
        if self._next == self._lost:
            return ScheduleFault(
                f"none of ab-lora's {self._next} rounds could score a rank: the validation loss was not finite",
                "lower the learning rate, and look for NaN in the training loss and the validation data",
            )
        if self._prunes and not self._pruned:
            return ScheduleFault(
                f"none of ab-lora's {self._next - self._lost} scored rounds switched a rank off, so this is plain LoRA",
                "lower min_rank, or use a larger r",
            )
        if not self._moved:
            return ScheduleFault(
                f"switching ranks off and on changed no validation loss in {self._next} rounds of ab-lora",
                "leave the adapter on and unmerged, and train lora_B (a learning rate above 0) before the first round",
            )
        return None

    def memory_bytes(self) -> int:
        """The masks, and about what a scoring pass takes while rounds are to come."""
        masks = sum(self._gates.value(name).nbytes for name in self._layers)
        return masks + (self._ablation.pass_bytes if self._steps and self._next < len(self._steps) else 0)

    def event_seconds(self) -> float:
        """Scoring in the rounds to come, from one timed pass; `screened` takes less, by how much shows only then."""
        if not self._steps:
            return 0.0
        rounds, batches = len(self._steps) - self._next, self._groups[0]
        if self._method.score == "taylor":  # two passes with gradients, each about three without
            return rounds * 6 * self._ablation.pass_seconds(batches)
        return rounds * self._ablation.forecast(batches, self._live_slots())

    def close(self) -> None:
        """Takes masks and hooks off the model."""
        self._ablation.close()
        self._gates.close()

    def state_dict(self) -> dict[str, Any]:
        """The method's id, where it is in its rounds, what the run started with, and the masks."""
        return {
            "method": self._method.id,
            "step": self._step,
            "steps": None if self._steps is None else list(self._steps),
            "next": self._next,
            "lost": self._lost,
            "lost_in_a_row": self._lost_in_a_row,
            "moved": self._moved,
            "pruned": self._pruned,
            "fresh": {name: list(slots) for name, slots in self._fresh.items()},
            "validation": self._validation,
            "start_ranks": self._start_ranks,
            "start_parameters": self._start_parameters,
            **{f"mask.{name}": self._gates.value(name).detach().clone() for name in self._layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            CheckpointError: a part is missing, of another method or of another plan; every fault is named.
        """
        if state.get("method") != self._method.id:
            raise CheckpointError(
                f"the schedule's state is of {state.get('method')!r}, the run is {self._method.id}: resume with the "
                "methods of the checkpoint"
            )
        expected = self.state_dict()
        faults = [f"{key} is missing" for key in expected if key not in state]
        for name in self._layers:
            mask = state.get(f"mask.{name}")
            if isinstance(mask, Tensor) and mask.shape != (self._layers[name].rank,):
                faults.append(f"mask.{name} is of {len(mask)} slots, the layer has {self._layers[name].rank}")
        faults += [f"{key} belongs to no layer" for key in state if key not in expected]
        if state.get("validation", self._validation) != self._validation:
            faults.append("it scored on other validation batches, and all rounds score on the same")
        if faults:
            more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the state of {self._method.id} is not this plan's: {'; '.join(faults[:8])}{more}: take the state of "
                "the run's own checkpoint"
            )
        self._steps = None if state["steps"] is None else tuple(state["steps"])
        self._step, self._next = int(state["step"]), int(state["next"])
        self._lost, self._lost_in_a_row = int(state["lost"]), int(state["lost_in_a_row"])
        self._moved, self._pruned = bool(state["moved"]), int(state["pruned"])
        self._fresh = {str(name): [int(slot) for slot in slots] for name, slots in state["fresh"].items()}
        self._start_ranks, self._start_parameters = int(state["start_ranks"]), int(state["start_parameters"])
        self._prunes = self._method.count(list(self._layers), self._start_ranks)
        for name in self._layers:
            self._gates.write(name, state[f"mask.{name}"].to(self._gates.value(name)))
        self._events = []


def _by_layer(ranks: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, slot in ranks:
        found.setdefault(name, []).append(slot)
    return found


def _json(values: Float64[Tensor, " slots"]) -> list[float | None]:
    """Numbers for a JSON file, which knows no infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _refuse(optimizer: Optimizer, layers: Mapping[str, AdaptedLayer]) -> None:
    """An optimizer or a wrapper under which slots cannot be edited."""
    if not isinstance(optimizer, Adam):
        raise ConfigError(
            f"ab-lora empties what the optimizer remembers of a rank, which it can do in torch's AdamW and not in "
            f"{type(optimizer).__name__}: use optim: adamw_torch, under DDP or on one device"
        )
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        shape = layer.base.shape
        found = (*layer.lora_A.shape, *layer.lora_B.shape)
        if found != (layer.rank, shape.in_features, shape.out_features, layer.rank) or not (
            type(layer.lora_A.data) is Tensor and type(layer.lora_B.data) is Tensor
        ):
            raise ConfigError(
                f"{name}: ab-lora cannot edit ranks of factors that are sharded or flattened (FSDP, ZeRO-3): train "
                "with DDP"
            )
        if not {id(layer.lora_A), id(layer.lora_B)} <= owned:
            raise ConfigError(
                f"{name}: the optimizer does not hold the layer's lora_A and lora_B: build it over session.model"
            )
