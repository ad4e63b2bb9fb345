"""XGBLoRA: training in rounds, each of which adds a small fresh adapter to what the earlier ones have become.

"Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs", arXiv 2410.19694v1, revised as
"When Gradient Boosting Meets Adapter", KDD 2026. Equations are those of the KDD text.

The idea: gradient boosting adds up many weak learners, and an adapter of rank 1 that is trained for a few steps in a
third of the layers is a weak learner. After each round its update joins the model, the optimizer forgets it, and the
next round starts from a fresh adapter in other layers. A single round in all layers is LoRA.

| paper | here |
|---|---|
| section 4.1, T = K / kappa rounds | `default_rounds`, `round_layout` |
| section 4.1, L_s of L layers, drawn uniformly | `block_of`, `blocks_of`, `layers_per_round`, `drawn_blocks` |
| how large the sum of a layer's boosters can grow | `capacities` |
| random A, zero B in every round | `XGBLoRA.draw` |
| eq. 6 and 7, W <- W + s B A after kappa steps | `booster_pair`, `adapters.boosters.Boosters` |
| one adapter of rank R in place of the boosters | `ranks.truncation.truncated_ranks` |

A residual is nowhere fitted: each round is ordinary back-propagation through the model as it stands. The authors
published no code.

Departures, with reasons:
- Boosters are kept as factors beside the base weight, which is not written. Added into a bfloat16 weight an update of
  rms 1e-4 arrives with an error of 89 % (measured), and quantized weights cannot be added to at all: the model that was
  trained would not be the one that is exported. `accumulate: merge` does as the paper does, on float32 weights only; it
  keeps the factors too, which are what is exported, and writes W plus their whole sum, so that `close` gives W back.
- Layers outside the round are gated instead of frozen: their gate is 0 and their factors take no part in the
  optimizer's step. Freezing parameters of a model under DistributedDataParallel breaks it. So the paper's saving of
  memory is not had; true freezing saves it below the lowest trained layer only.
- The paper's two halves contradict each other on kappa (8, and 500 to 1000). The defaults lie between them and follow
  the length of the run; both are presets.
- Equations 6 and 7 hold no alpha / r. It is 2 at rank 1, which multiplies as the usual alpha 16 at rank 8 does.
- lora_A is Kaiming-uniform, as everywhere in rankwise; `a_init: gaussian` draws N(0, 1/in).
- The norm penalty of version 1 is left out: the revised paper has none.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.boosters import Boosters, restart_pair
from rankwise.adapters.gates import RankGates
from rankwise.adapters.perturbation import gathered
from rankwise.adapters.state import FactorPair, FoldState
from rankwise.adapters.written import narrow_dtype, unwritable
from rankwise.calibration.processes import assert_equal_everywhere
from rankwise.calibration.statistics import GradientStatistics
from rankwise.errors import BudgetError, CheckpointError, ConfigError, HealthError
from rankwise.linalg.gram import gram_norm
from rankwise.linalg.random import generator
from rankwise.methods.base import Allocation, Budget, Factors, Method, Slot, Start, setting_faults
from rankwise.methods.draws import draw_factor
from rankwise.methods.schedule import RankEvent, Scene, Schedule, ScheduleFault, SteadyRanks
from rankwise.ranks.shapes import LayerShape

__all__ = [
    "XGBLoRA",
    "block_of",
    "blocks_of",
    "booster_pair",
    "capacities",
    "default_rounds",
    "drawn_blocks",
    "layers_per_round",
    "round_layout",
]

_SHORT_ROUND: Final = 8
"""Steps below which the paper finds rounds to be too short."""
_MOST_DISCARDED: Final = 3
_DRAWS: Final = {"kaiming": "kaiming", "gaussian": "default_normal"}


@dataclass(frozen=True, kw_only=True)
class XGBLoRA(Method):
    """Adds up boosters: adapters of a small rank, each trained for some steps in some of the layers.

    The run's `r` is the budget of what is exported; its `lora_alpha` is not used.

    Args:
        booster_rank: rank of one booster, 1 to `r` (paper: 1).
        booster_alpha: its alpha, > 0; the scaling is booster_alpha / booster_rank.
        rounds: T, >= 1; None: a round for every 8 steps, at least 2 and at most 20.
        round_steps: kappa, steps of one round, >= 1, in place of `rounds`.
        layers_fraction: the share of the blocks that one round trains, in (0, 1].
        layers_per_round: L_s, blocks that one round trains, >= 1, in place of `layers_fraction`.
        shrinkage: what a booster is multiplied by as it joins the sum, in (0, 1]; below 1 the model jumps at that step.
        accumulate: `factors` keeps the boosters as factors and never writes the base weights; `merge` adds them to the
            base weights while training lasts, which must be float32.
        a_init: how every lora_A starts.
        max_rank: `auto` exports at most the parameters of a uniform rank `r`, `none` every rank.
    """

    id: ClassVar[str] = "xgblora"
    title: ClassVar[str] = (
        "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs "
        "(KDD 2026: When Gradient Boosting Meets Adapter)"
    )
    source: ClassVar[str] = "arXiv:2410.19694v1"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.ALLOCATE, Slot.INITIALIZE, Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-4, 2e-4, 5e-4)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper-main": {"round_steps": 8, "layers_per_round": 8},
        "paper-eff": {"rounds": 10, "layers_fraction": 1 / 3},
    }

    booster_rank: int = 1
    booster_alpha: float = 2.0
    rounds: int | None = None
    round_steps: int | None = None
    layers_fraction: float = 1 / 3
    layers_per_round: int | None = None
    shrinkage: float = 1.0
    accumulate: Literal["factors", "merge"] = "factors"
    a_init: Literal["kaiming", "gaussian"] = "kaiming"
    max_rank: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices={
                "a_init": tuple(_DRAWS),
                "max_rank": ("auto", "none"),
                "accumulate": ("factors", "merge"),
            },
            numbers={"booster_alpha": 0, "layers_fraction": 0, "shrinkage": 0},
            wholes={"booster_rank": 1, "rounds": 1, "round_steps": 1, "layers_per_round": 1},
        )
        if not faults:
            zero = [key for key in ("booster_alpha", "layers_fraction", "shrinkage") if getattr(self, key) == 0]
            faults += [f"xgblora.{key}: 0 trains nothing; use a number above 0" for key in zero]
            above = [key for key in ("layers_fraction", "shrinkage") if getattr(self, key) > 1]
            faults += [f"xgblora.{key}: {getattr(self, key)!r} is out of range; use at most 1" for key in above]
            if self.rounds is not None and self.round_steps is not None:
                faults.append(
                    f"xgblora.rounds: {self.rounds} and xgblora.round_steps: {self.round_steps} say the same twice; "
                    "set one of them"
                )
        if faults:
            raise ConfigError(faults)

    @property
    def writes_base(self) -> tuple[str, str] | None:
        """Under `merge` every booster is added to the weights themselves."""
        return ("accumulate: merge", "accumulate: factors") if self.accumulate == "merge" else None

    def live_budget(self, budget: Budget) -> Budget:
        """The budget as the adapter in training sees it: with the boosters' own alpha."""
        return replace(budget, lora_alpha=float(self.booster_alpha))

    def export_budget(self, budget: int) -> int | None:
        """The plan's with `max_rank: auto`: boosters add up to more ranks than a plan of `r` holds."""
        return budget if self.max_rank == "auto" else None

    def allocate(
        self, layers: Sequence[LayerShape], budget: Budget, statistics: GradientStatistics | None
    ) -> Allocation:
        """The booster's rank for every layer.

        Raises:
            BudgetError: it is above `r`, or above the size of a layer; every such layer is listed.
        """
        rank = self.booster_rank
        faults = [
            f"xgblora.booster_rank: {rank} is above the size of layer {layer.name} ({layer.out_features} x "
            f"{layer.in_features}); lower it or leave the layer out of target_modules"
            for layer in layers
            if rank > layer.max_rank
        ]
        if rank > budget.r:
            faults.append(
                f"xgblora.booster_rank: {rank} is above r: {budget.r}, so that one booster alone is more than may be "
                "exported; raise r or lower booster_rank"
            )
        if faults:
            raise BudgetError(faults)
        return Allocation(ranks=(rank,) * len(layers), importance=None, reasons=(f"booster rank {rank}",) * len(layers))

    def draw(self, rank: int, in_features: int, source: torch.Generator) -> Float[Tensor, "rank in"]:
        """How lora_A starts in every round, float32 on the CPU."""
        kind: Literal["kaiming", "default_normal"] = "kaiming" if self.a_init == "kaiming" else "default_normal"
        return draw_factor(kind, rank, in_features, source)

    def initialize(self, start: Start) -> Factors:
        """The first round's start: with `kaiming` it is plain LoRA's."""
        shape = start.layer.shape
        lora_A = self.draw(start.rank, shape.in_features, generator(start.seed, "lora_A", shape.name))
        return Factors(start.dtype_cast(lora_A), torch.zeros(shape.out_features, start.rank))

    def make_schedule(self, scene: Scene) -> Schedule:
        """Rounds of boosters; until `begin` no layer takes part.

        Raises:
            ConfigError: `merge` on weights that are quantized, sharded or narrower than float32.
        """
        if self.accumulate == "merge":
            _refuse_lossy(scene.layers)
        return BoostingSchedule(self, scene)

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What is trained at once, and what r and lora_alpha mean here."""
        exported = f"at most {budget.parameters} parameters, those of a uniform rank {budget.r}"
        given = {rank for rank in ranks.values() if rank}
        own = not given or (given == {self.booster_rank} and budget.lora_alpha == self.booster_alpha)
        told: tuple[str, ...] = (
            f"xgblora: a booster has rank {self.booster_rank} and alpha {self.booster_alpha:g}; lora_alpha is not used"
            if own
            else f"xgblora: a booster has the ranks of the plan, {min(given)} to {max(given)}, and its alpha "
            f"{budget.lora_alpha:g}; booster_rank and booster_alpha are not used",
            f"xgblora: ranks add up over the rounds; what is exported has {exported}"
            if self.max_rank == "auto"
            else "xgblora: max_rank none exports every rank that the rounds add up to, which may be far above r",
        )
        if self.accumulate == "merge":
            told += (
                "xgblora: accumulate merge adds the boosters to the base weights while training lasts: with the adapter"
                " switched off the model still has them, and under 16-bit autocast, which rounds them with the weights,"
                " training and evaluation see another model than the exported one: train in float32",
            )
        return told


# --- equations, in the paper's order ------------------------------------------------------------------------------


def default_rounds(max_steps: int) -> int:
    """T for a run of K steps: K // 8, at least 2 and at most 20, never more than K.

    Source: arXiv 2410.19694 (KDD 2026), section 7.1 (kappa 8) and appendix C.4 (T 10 to 30); a choice between the two.
    """
    return min(max(max_steps // _SHORT_ROUND, 2), 20, max_steps)


def round_layout(max_steps: int, rounds: int | None = None, round_steps: int | None = None) -> tuple[int, int]:
    """(T, kappa): rounds and the steps of each; the last round is shorter where kappa does not divide K.

    Args:
        max_steps: K, >= 1.
        rounds: how many are wanted, 1 to K; None leaves it to `round_steps` or, without it, to `default_rounds`.
        round_steps: kappa, >= 1; more than K means one round.

    Returns:
        kappa = ceil(K / rounds) unless it is given, and T = ceil(K / kappa), which may be below `rounds`.

    Raises:
        ConfigError: no step, or more rounds than steps.

    Source: arXiv 2410.19694 (KDD 2026), section 4.1, T = K / kappa.
    """
    if max_steps < 1:
        raise ConfigError(f"xgblora: the run makes {max_steps} optimizer steps; a round needs at least one")
    if round_steps is not None:
        kappa = min(round_steps, max_steps)
    else:
        wanted = default_rounds(max_steps) if rounds is None else rounds
        if wanted > max_steps:
            raise ConfigError(
                f"xgblora.rounds: {wanted} rounds do not fit in {max_steps} optimizer steps; use at most {max_steps} "
                f"(at most {max(1, max_steps // _SHORT_ROUND)} for rounds of {_SHORT_ROUND} steps)"
            )
        kappa = -(-max_steps // wanted)
    return -(-max_steps // kappa), kappa


def block_of(name: str) -> str | None:
    """The block that a layer belongs to: its name up to the first part that is a number; None if there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return None if found is None else found[0]


def blocks_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The layers of each block; a layer outside of all blocks is one by itself. The order of `names` does not matter.

    Source: arXiv 2410.19694 (KDD 2026), section 4.1: "layers" are the model's, with all their projections.
    """
    blocks: dict[str, list[str]] = {}
    for name in sorted(names):
        blocks.setdefault(block_of(name) or name, []).append(name)
    return {block: tuple(blocks[block]) for block in sorted(blocks, key=_natural)}


def layers_per_round(blocks: int, fraction: float, count: int | None = None) -> int:
    """L_s: `count` where it is given, else the nearest whole number to the fraction; 1 to `blocks`."""
    return max(1, min(round(blocks * fraction) if count is None else count, blocks))


def drawn_blocks(blocks: Sequence[str], count: int, seed: int, round_number: int) -> frozenset[str]:
    """S_t: `count` of the blocks, uniformly without replacement, the same in every process.

    Source: arXiv 2410.19694 (KDD 2026), section 4.1.
    """
    order = torch.randperm(len(blocks), generator=generator(seed, "xgblora blocks", round_number))
    return frozenset(blocks[i] for i in order[:count].tolist())


def capacities(draws: Iterable[Iterable[str]], rank: Mapping[str, int]) -> dict[str, int]:
    """Ranks that each layer's boosters add up to: the times it is drawn, times the rank of one."""
    times = Counter(name for names in draws for name in names)
    return {name: count * rank[name] for name, count in times.items()}


def booster_pair(
    lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"], shrinkage: float
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The factors that join the sum, scaled like the layer's own: A, and shrinkage * B.

    Source: arXiv 2410.19694 (KDD 2026), eq. 6 and 7; the constant of version 1's Algorithm 1 [secondary].
    """
    return lora_A, lora_B if shrinkage == 1 else shrinkage * lora_B


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in text.split(".")]


# --- the schedule slot --------------------------------------------------------------------------------------------


class BoostingSchedule(SteadyRanks):
    """Rounds: draws their layers, gates the others, and folds each booster into the sum at the round's last step.

    Between `begin` and the last round's end one round is open. The state counts optimizer steps; a step that a loss
    scaler skips counts too.
    """

    def __init__(self, method: XGBLoRA, scene: Scene) -> None:
        self._method, self._seed, self._layers = method, scene.seed, dict(scene.layers)
        self._blocks = blocks_of(self._layers)
        self._names = tuple(self._blocks)
        self._count = layers_per_round(len(self._names), method.layers_fraction, method.layers_per_round)
        ranks = {name: layer.rank for name, layer in self._layers.items()}
        shut = {name: torch.zeros(rank) for name, rank in ranks.items()}
        self._gates = RankGates(scene.model, self._layers, shut, beside=self.fold_state)
        self._boosters = Boosters(self._layers, {})
        self._gates.add_module("boosters", self._boosters)
        self._optimizer: Optimizer | None = None
        self._max_steps, self._rounds, self._round_steps = 0, 0, 0
        self._draws: tuple[frozenset[str], ...] = ()
        self._round, self._open, self._step = 0, False, 0
        self._folded, self._discarded, self._empty = 0, 0, 0
        self._events: list[RankEvent] = []

    # --- around steps ---------------------------------------------------------------------------------------------

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Lays the rounds out over the run and opens the first one; a resumed run goes on with its own.

        Raises:
            ConfigError: more rounds than steps, a run of another length than the checkpoint's, or factors that a
                wrapper has flattened; `merge` on weights that were made narrower since.
        """
        self._refuse_flattened()
        if self._method.accumulate == "merge":
            _refuse_lossy(self._layers)  # they may have been cast since
        if self._max_steps and max_steps != self._max_steps:
            raise ConfigError(
                f"xgblora: the rounds were laid out over {self._max_steps} optimizer steps "
                f"({self._rounds} of {self._round_steps}), and this run makes {max_steps}: go on with "
                f"max_steps {self._max_steps}, or start a new run"
            )
        self._optimizer = optimizer
        if self._max_steps:
            self._boosters.rewrite()  # the model may have moved since the checkpoint was loaded
        else:
            self._lay_out(max_steps, *round_layout(max_steps, self._method.rounds, self._method.round_steps))
            self._allocate()
            self._enter(1)
            # Of all layers: those that no round draws end at rank 0.
            self._record("round", 1, f"round 1 of {self._rounds} trains {self._shown(self._drawn(1))}", self._layers)

    def before_step(self, step: int) -> None:
        """Nothing: gates change between steps only."""

    def before_optimizer_step(self, step: int) -> None:
        """Layers outside the round have no gradient: neither moments nor decay move them."""
        selected = self._selected()
        for name, layer in self._layers.items():
            if name not in selected:
                layer.lora_A.grad = layer.lora_B.grad = None

    def after_step(self, step: int) -> None:
        """Folds at a round's last step and opens the next one.

        Raises:
            HealthError: the booster of a third round holds NaN or infinite values.
        """
        self._step = step
        if self._open and step >= self._end_of(self._round):
            self._close_round()

    def end(self, step: int) -> None:
        """Folds the booster of a round that the run ended in; a second call finds nothing to fold."""
        if self._open and self._step:
            self._close_round(last=True)

    # --- what export, logs and forecasts ask ----------------------------------------------------------------------

    def fold_state(self) -> FoldState:
        """Gates of 0 and 1, and the sum of the earlier boosters, float32 on the CPU; the live one is in the adapter."""
        pairs = {name: pair for name in self._layers if (pair := self._boosters.pair(name)) is not None}
        boosters = {name: FactorPair(pair.lora_A.float(), pair.lora_B.float()) for name, pair in pairs.items()}
        return FoldState(gates=self._gates.effective(), boosters=boosters)

    def live_ranks(self) -> dict[str, int]:
        """The ranks that the earlier boosters take, and the live one's in the layers of the round."""
        selected = self._selected()
        return {
            name: self._boosters.rank(name) + (layer.rank if name in selected else 0)
            for name, layer in self._layers.items()
        }

    def events(self) -> tuple[RankEvent, ...]:
        """Rounds that began or ended since this was last asked."""
        found, self._events = tuple(self._events), []
        return found

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """The rounds of a run of this length, and how far ranks will grow."""
        rounds, kappa = round_layout(max_steps, self._method.rounds, self._method.round_steps)
        draws = [self._draw(number) for number in range(1, rounds + 1)]
        room = capacities(draws, {name: layer.rank for name, layer in self._layers.items()})
        sizes = [room.get(name, 0) for name in self._layers]
        costs = [layer.base.shape.cost for layer in self._layers.values()]
        trained = sum(size * cost for size, cost in zip(sizes, costs, strict=True))
        return (
            f"xgblora: {rounds} rounds of {kappa} steps"
            + (f", the last of {max_steps - (rounds - 1) * kappa}" if max_steps % kappa else "")
            + f"; each trains {self._count} of {len(self._names)} {self._unit()}",
            f"xgblora: the boosters of a layer add up to a rank of {sum(sizes) / len(sizes):.1f} on average, "
            f"{max(sizes)} at most, {trained} parameters in all",
            *self._warnings(rounds, kappa, draws),
        )

    def figures(self) -> dict[str, float]:
        """The round, the layers that it trains, and the mean rank that a layer has accumulated."""
        total = sum(self._boosters.rank(name) for name in self._layers)
        return {
            "xgblora_round": float(self._round),
            "xgblora_layers": float(len(self._selected())),
            "xgblora_rank": total / len(self._layers),
        }

    def remarks(self) -> tuple[str, ...]:
        """What looks wrong with the rounds of this run."""
        draws = [self._drawn(number) for number in range(1, self._rounds + 1)]
        return self._warnings(self._rounds, self._round_steps, draws) if self._rounds else ()

    def fault(self) -> ScheduleFault | None:
        """A round that never ended though its steps are over, or no booster that is worth keeping."""
        due = self._end_of(self._round)
        if self._open and (not self._step or self._step >= due):
            return ScheduleFault(
                f"round {self._round} of {self._rounds} ends at step {due} and is still open after {self._step}",
                "call session.after_step in every step, with the step's number",
            )
        live = (gathered(self._layers[name].lora_B) for name in sorted(self._selected()))
        if self._folded or any(bool(lora_B.any()) for lora_B in live):
            return None
        return ScheduleFault(
            f"of {self._rounds} rounds {self._empty} ended with lora_B of every layer still zero and "
            f"{self._discarded} with NaN or infinite values",
            "look at the learning rate, and whether the optimizer holds the factors of session.model",
        )

    def memory_bytes(self) -> int:
        """The accumulated boosters at their full size, which the buffers of `factors` have from the start."""
        return self._boosters.memory_bytes

    def base_copy_bytes(self) -> int:
        """Under `merge` the weights of the layers that a round draws."""
        return self._boosters.base_copy_bytes

    def event_seconds(self) -> float:
        """Under `merge` every round that is still to end writes the weights of its layers."""
        seconds = self._boosters.write_seconds() if self._open else {}
        return sum(seconds.get(name, 0.0) for drawn in self._draws[self._round - 1 :] for name in drawn)

    def close(self) -> None:
        """Takes every hook off the model, and the earlier boosters out of it; written weights are given back."""
        with ExitStack() as stack:  # the gates come off even where a weight cannot be given back
            stack.callback(self._boosters.close)
            stack.callback(self._gates.close)

    # --- across checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, and the accumulated pair of each layer."""
        state: dict[str, Any] = {"method": XGBLoRA.id} | {key: int(getattr(self, f"_{key}")) for key in _COUNTERS}
        for name in self._layers:
            pair = self._boosters.pair(name)
            if pair is not None:
                state |= {f"rank.{name}": len(pair.lora_A), f"A.{name}": pair.lora_A, f"B.{name}": pair.lora_B}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`, also in the middle of a run (the best checkpoint, loaded at its end).

        Raises:
            CheckpointError: the state is another schedule's, or a part is missing; every fault is named.
        """
        if state.get("method") != XGBLoRA.id:
            raise CheckpointError(
                f"the schedule's state is of {state.get('method')!r}, the run is {XGBLoRA.id}: resume with the methods "
                "of the checkpoint"
            )
        faults = [f"{key} is missing" for key in _COUNTERS if not _whole(state.get(key))]
        faults += _pair_faults(state, self._layers)
        if faults:
            more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
            raise CheckpointError(f"the state of xgblora is not this plan's: {'; '.join(faults[:8])}{more}: {_ADVICE}")
        counters = {key: int(state[key]) for key in _COUNTERS}
        self._lay_out(counters["max_steps"], counters["rounds"], counters["round_steps"])
        self._allocate()
        room = self._boosters.capacities
        faults = [
            f"rank.{name} is {state[f'rank.{name}']}, and the rounds of this run add up to {room.get(name, 0)}"
            for name in self._layers
            if state.get(f"rank.{name}", 0) > room.get(name, 0)
        ]
        if faults:
            raise CheckpointError(f"the state of xgblora is of other rounds: {'; '.join(faults[:8])}: {_ADVICE}")
        for name in self._layers:
            if f"A.{name}" in state:
                self._boosters.add(name, state[f"A.{name}"], state[f"B.{name}"])
        self._step, self._folded = counters["step"], counters["folded"]
        self._discarded, self._empty = counters["discarded"], counters["empty"]
        self._round, self._open = counters["round"], bool(counters["open"])
        self._set_gates()

    # --- rounds ---------------------------------------------------------------------------------------------------

    def _lay_out(self, max_steps: int, rounds: int, round_steps: int) -> None:
        self._max_steps, self._rounds, self._round_steps = max_steps, rounds, round_steps
        self._draws = tuple(self._draw(number) for number in range(1, rounds + 1))

    def _allocate(self) -> None:
        """Room for all that the seed's draws will add: shapes never change again."""
        self._boosters.close()  # before the next one copies the base
        ranks = {name: layer.rank for name, layer in self._layers.items()}
        place: Literal["adapter", "base"] = "adapter" if self._method.accumulate == "factors" else "base"
        self._boosters = Boosters(self._layers, capacities(self._draws, ranks), place)
        self._gates.add_module("boosters", self._boosters)

    def _draw(self, number: int) -> frozenset[str]:
        """The layers of a round."""
        chosen = drawn_blocks(self._names, self._count, self._seed, number)
        return frozenset(name for block in chosen for name in self._blocks[block])

    def _drawn(self, number: int) -> frozenset[str]:
        return self._draws[number - 1]

    def _selected(self) -> frozenset[str]:
        """The layers that train now."""
        return self._drawn(self._round) if self._open else frozenset()

    def _end_of(self, number: int) -> int:
        return min(number * self._round_steps, self._max_steps)

    def _enter(self, number: int) -> None:
        """Opens a round, or leaves all layers gated after the last one."""
        self._open = number <= self._rounds
        self._round = min(number, self._rounds)
        self._set_gates()

    def _set_gates(self) -> None:
        selected = self._selected()
        for name, layer in self._layers.items():
            self._gates.write(name, torch.full((layer.rank,), float(name in selected)))

    @torch.no_grad()
    def _close_round(self, *, last: bool = False) -> None:
        """Algorithm: the accumulated delta grows by shrinkage s B A; A, B and the optimizer's state are thrown away."""
        number, ended = self._round, self._selected()
        factors = {n: (gathered(self._layers[n].lora_A), gathered(self._layers[n].lora_B)) for n in sorted(ended)}
        norms = {
            name: self._method.shrinkage * self._layers[name].scaling * float(gram_norm(lora_B.float(), lora_A.float()))
            for name, (lora_A, lora_B) in factors.items()
        }
        sound = all(math.isfinite(norm) for norm in norms.values())
        held = [name for name, (_, lora_B) in factors.items() if bool(lora_B.any())]  # others would add ranks of zeros
        for name in held if sound else ():
            self._boosters.add(name, *booster_pair(*factors[name], self._method.shrinkage))
        self._folded += sound and bool(held)
        self._empty += sound and not held
        self._discarded += not sound
        self._enter(self._rounds + 1 if last else number + 1)
        self._restart(ended | self._selected(), number + 1)
        self._agree(number, norms)
        if sound:
            reason = f"round {number} of {self._rounds} ended: {self._shown(ended)}"
            if self._selected():
                reason += f"; the next trains {self._shown(self._selected())}"
            self._record("fold", number, reason, ended, norms)
            return
        self._record("discard", number, f"the booster of round {number} of {self._rounds} is not finite", ended)
        if self._discarded >= _MOST_DISCARDED:
            raise HealthError(
                f"xgblora: the boosters of {self._discarded} rounds held NaN or infinite values and were discarded "
                f"(last: round {number} of {self._rounds}): lower the learning rate, or look for rows that no label or "
                "an overflow made infinite"
            )

    def _restart(self, names: Iterable[str], number: int) -> None:
        """A fresh pair for the next round, and nothing in the optimizer of the old one."""
        for name in sorted(names):
            layer = self._layers[name]
            source = generator(self._seed, "xgblora lora_A", number, name)
            restart_pair(layer, self._method.draw(layer.rank, layer.base.shape.in_features, source))
            if self._optimizer is not None:
                for parameter in (layer.lora_A, layer.lora_B):
                    self._optimizer.state.pop(parameter, None)

    def _agree(self, number: int, norms: Mapping[str, float]) -> None:
        """Every process folded the same booster into the same sum and starts the same round."""
        digest = hashlib.blake2b(repr((number, sorted(self._selected()), self.live_ranks())).encode(), digest_size=8)
        for name in sorted(norms):
            digest.update(f"{name}:{norms[name]!r}".encode())
        for name in sorted(self._selected()):
            total = gathered(self._layers[name].lora_A).detach().double().sum()
            digest.update(f"{name}:{float(total)!r}".encode())
        assert_equal_everywhere(digest.hexdigest(), f"the booster of round {number} of xgblora")

    def _record(
        self, kind: str, number: int, reason: str, ended: Iterable[str], norms: Mapping[str, float] | None = None
    ) -> None:
        ranks, norms = self.live_ranks(), norms or {}
        changed = self._selected().union(ended)
        self._events.append(
            RankEvent(
                step=self._step,
                kind=kind,
                ranks={name: ranks[name] for name in self._layers if name in changed},
                reason=reason,
                figures={
                    "round": float(number),
                    "rounds": float(self._rounds),
                    "booster_norm": math.sqrt(sum(norm**2 for norm in norms.values())),
                },
                layers={
                    name: {"booster_norm": norms[name], "accumulated_rank": self._boosters.rank(name)}
                    for name in self._layers
                    if name in norms
                },
            )
        )

    # --- words ----------------------------------------------------------------------------------------------------

    def _unit(self) -> str:
        return "layers" if all(block_of(name) is None for name in self._layers) else "blocks"

    def _shown(self, names: frozenset[str]) -> str:
        """The blocks of these layers, by their names."""
        blocks = [block for block, members in self._blocks.items() if names & set(members)]
        return ", ".join(blocks[:6]) + (f" and {len(blocks) - 6} more" if len(blocks) > 6 else "")

    def _warnings(self, rounds: int, kappa: int, draws: Sequence[frozenset[str]]) -> tuple[str, ...]:
        told = []
        if rounds == 1:
            told.append("xgblora: warning: a single round is LoRA in the layers that it trains; use more rounds")
        elif kappa < _SHORT_ROUND:
            told.append(
                f"xgblora: warning: rounds of {kappa} steps are shorter than the {_SHORT_ROUND} below which the paper "
                "finds results to fall; use fewer rounds or more steps"
            )
        if (self._method.layers_per_round or 0) > self._count:
            told.append(
                f"xgblora: warning: layers_per_round {self._method.layers_per_round} is above the {self._count} "
                f"{self._unit()} that there are; all of them train in every round"
            )
        if self._method.shrinkage < 1:
            told.append(
                "xgblora.shrinkage below 1 changes the model where a round ends, after the last step too: what an "
                "evaluation in the middle of a round found is of another model"
            )
        if self._unit() == "layers":
            told.append("xgblora: no layer's name holds the number of a block, so that rounds draw single layers")
        never = self._layers.keys() - frozenset().union(*draws)
        if never:
            told.append(
                f"xgblora: {len(never)} of {len(self._layers)} layers are drawn in no round ({min(never)} first) and "
                "stay as the base model has them"
            )
        return tuple(told)

    def _refuse_flattened(self) -> None:
        for name, layer in self._layers.items():
            shape, found = layer.base.shape, (*layer.lora_A.shape, *layer.lora_B.shape)
            if found != (layer.rank, shape.in_features, shape.out_features, layer.rank):
                raise ConfigError(
                    f"{name}: lora_A is {list(layer.lora_A.shape)} and lora_B {list(layer.lora_B.shape)}, not the "
                    f"layer's whole factors of rank {layer.rank}: xgblora rewrites them between rounds, which FSDP1 "
                    "and DeepSpeed ZeRO-3 do not allow: train with DDP or FSDP2 (fully_shard)"
                )


def _refuse_lossy(layers: Mapping[str, AdaptedLayer]) -> None:
    """Passes where a weight holds what is added to it: float32 or wider, not packed, not sharded."""
    found = {name: unwritable(layer) or narrow_dtype([layer.base]) for name, layer in layers.items()}
    lossy = {name: why for name, why in found.items() if why}
    if lossy:
        name = min(lossy)
        raise ConfigError(
            f"xgblora.accumulate: merge adds every booster to the base weights, and {len(lossy)} of {len(layers)} hold "
            f"no such sum ({name} first, which is {lossy[name]}): the trained model would not be the exported one. Use "
            "accumulate: factors, which leaves the weights alone, or load the base in float32 (dtype: float32)"
        )


_ADVICE: Final = "take the state of the run's own checkpoint"
_COUNTERS: Final = (
    "step",
    "max_steps",
    "rounds",
    "round_steps",
    "round",
    "open",
    "folded",
    "discarded",
    "empty",
)


def _whole(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _pair_faults(state: Mapping[str, Any], layers: Mapping[str, Any]) -> list[str]:
    """What is missing of the accumulated pairs, of another size, or of no layer."""
    expected = {"method", *_COUNTERS, *(f"{part}.{name}" for part in ("rank", "A", "B") for name in layers)}
    faults = [f"{key} belongs to no layer" for key in state if key not in expected]
    for name, layer in layers.items():
        parts = [state.get(f"{part}.{name}") for part in ("rank", "A", "B")]
        if parts == [None, None, None]:
            continue
        rank, lora_A, lora_B = parts
        shape = layer.base.shape
        sizes = ((rank, shape.in_features), (shape.out_features, rank))
        for part, value, size in (("A", lora_A, sizes[0]), ("B", lora_B, sizes[1])):
            if not isinstance(value, Tensor) or not _whole(rank):
                faults.append(f"{part}.{name} is missing")
            elif tuple(value.shape) != size:
                faults.append(f"{part}.{name} has the shape {list(value.shape)} instead of {list(size)}")
    return faults
