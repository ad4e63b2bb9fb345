"""The arms of the comparison: where the parameters sit, and what the factors start from; all through rankwise itself.

Every arm but `gora-own-scale` multiplies lora_B @ lora_A by 2 in every layer (alpha = 2 r, rule alpha/r), so that arms
differ in place and start alone. `gora-own-scale` has GoRA's own rule, alpha/sqrt(rank), with the same alpha.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from benchmarks.quality.setting import STEPS, Batch, Bench, batch_loss
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapters.attach import attach_lora
from rankwise.adapters.targets import resolve_targets
from rankwise.methods.base import Method
from rankwise.ranks.allocation import water_fill
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape, ScalingRule, uniform_budget
from rankwise.training.attach import Calibration

__all__ = ["ARMS", "Arm", "Started"]

CALIBRATION_BATCHES = 64  # GoRA's N; the first batches of the run's own data


@dataclass(frozen=True)
class Started:
    """A model ready to train, and the plan that it was built from."""

    model: nn.Module
    plan: RankPlan
    session: "rw.Session | None" = None
    """Where a method acts during training too."""


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args:
        name: the command-line name.
        title: what the table says.
        r: the budget: the parameters of this uniform rank.
        rates: learning rates tried first, the likeliest in the middle; the best must come out interior.
        start: makes the model.
        baseline: the arm at the same budget and length that it is compared with, or None.
        steps: optimizer steps of a run.
    """

    name: str
    title: str
    r: int
    rates: tuple[float, ...]
    start: Callable[["Arm", Bench, int], Started]
    baseline: str | None
    steps: int = STEPS


def _shapes(model: nn.Module) -> list[LayerShape]:
    return [layer.shape for layer in resolve_targets(model, "all-linear").layers]


def _plan(arm: Arm, shapes: Sequence[LayerShape], ranks: Sequence[int], seed: int) -> RankPlan:
    return RankPlan.from_shapes(
        shapes, ranks, r=arm.r, lora_alpha=2 * arm.r, scaling_rule=ScalingRule.ALPHA_OVER_R, seed=seed
    )


def _uniform(arm: Arm, bench: Bench, seed: int) -> Started:
    model = bench.fresh_model()
    shapes = _shapes(model)
    plan = _plan(arm, shapes, [arm.r] * len(shapes), seed)
    return Started(attach_lora(model, plan), plan)


def _only(chosen: Callable[[str], bool]) -> Callable[[Arm, Bench, int], Started]:
    """Equal ranks on some layers, none on the others, at the arm's budget."""

    def start(arm: Arm, bench: Bench, seed: int) -> Started:
        model = bench.fresh_model()
        shapes = _shapes(model)
        shares = [float(chosen(shape.name)) for shape in shapes]
        plan = _plan(arm, shapes, water_fill(shares, shapes, uniform_budget(shapes, arm.r), floor=0, cap=None), seed)
        return Started(attach_lora(model, plan), plan)

    return start


def _gora(arm: Arm, *, own_scale: bool = False) -> "rw.GoRA":
    # At the budget of r = 1 a least rank of 1 would leave nothing to allocate, at r = 2 little.
    least = 0 if arm.r <= 2 else None
    if own_scale:
        return rw.GoRA(r_min=least)
    return rw.GoRA(r_min=least, scaling="average", rank_stabilized=False)


def _calibration(arm: Arm, bench: Bench, seed: int, kind: str = "gora") -> Calibration:
    batches = list(islice(bench.batches(seed, arm.steps), CALIBRATION_BATCHES))
    length = "" if arm.steps == STEPS else f"-{arm.steps}-steps"
    folder = Path(tempfile.gettempdir()) / "rankwise-quality"
    folder.mkdir(exist_ok=True)
    return Calibration(
        batches=batches,
        max_batches=CALIBRATION_BATCHES,
        memory="exact",
        autocast_dtype=torch.bfloat16,
        cache=folder / f"statistics-{kind}-r{arm.r}-seed{seed}{length}.safetensors",
        data_identity=f"{bench.identity['data_sha256']} seed {seed}{length}",
    )


def _loss(bench: Bench) -> Callable[[nn.Module, Batch], tuple[Tensor, float]]:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return batch_loss(model, batch, bench.head)[0].mean(), float(len(batch["label"]))

    return loss


def _gora_ranks(arm: Arm, bench: Bench, seed: int) -> RankPlan:
    return rw.plan(
        bench.fresh_model(),
        _gora(arm),
        r=arm.r,
        lora_alpha=2 * arm.r,
        calibration=_calibration(arm, bench, seed),
        seed=seed,
        loss=_loss(bench),
    )


def _gora_allocation(arm: Arm, bench: Bench, seed: int) -> Started:
    plan = replace(_gora_ranks(arm, bench, seed), methods=("lora",))
    return Started(attach_lora(bench.fresh_model(), plan), plan)


def _inverse(arm: Arm, bench: Bench, seed: int) -> Started:
    """Ranks in proportion to the inverse of GoRA's wish, within GoRA's own bounds."""
    found = _gora_ranks(arm, bench, seed)
    shapes = [layer.shape for layer in found.layers]
    wished = [(layer.importance or 0.0) / layer.shape.cost**0.5 for layer in found.layers]
    least = min(share for share in wished if share > 0)
    shares = [1 / max(share, least) for share in wished]
    ranks = water_fill(shares, shapes, uniform_budget(shapes, arm.r), floor=0, cap=4 * arm.r)
    plan = _plan(arm, shapes, ranks, seed)
    return Started(attach_lora(bench.fresh_model(), plan), plan)


def _gora_start(arm: Arm, bench: Bench, seed: int) -> Started:
    """A uniform rank with GoRA's lora_B."""
    model = bench.fresh_model()
    shapes = _shapes(model)
    session = rw.attach(
        model,
        _gora(arm),
        plan=_plan(arm, shapes, [arm.r] * len(shapes), seed),
        calibration=_calibration(arm, bench, seed),
        loss=_loss(bench),
    )
    return Started(session.model, session.plan)


def _gora_whole(own_scale: bool) -> Callable[[Arm, Bench, int], Started]:
    def start(arm: Arm, bench: Bench, seed: int) -> Started:
        session = rw.attach(
            bench.fresh_model(),
            _gora(arm, own_scale=own_scale),
            r=arm.r,
            lora_alpha=2 * arm.r,
            calibration=_calibration(arm, bench, seed),
            seed=seed,
            loss=_loss(bench),
        )
        return Started(session.model, session.plan)

    return start


def _methods(*chosen: "Callable[[Arm], Method]") -> Callable[[Arm, Bench, int], Started]:
    """Whole methods, in training too, each on its defaults but for the common scaling of 2."""

    def start(arm: Arm, bench: Bench, seed: int) -> Started:
        methods = [choose(arm) for choose in chosen]
        needs = rw.Recipe.of(methods).needs_gradients
        session = rw.attach(
            bench.fresh_model(),
            methods,
            r=arm.r,
            lora_alpha=2 * arm.r,
            calibration=_calibration(arm, bench, seed, arm.name) if needs else None,
            seed=seed,
            loss=_loss(bench),
            validation=bench.scored(seed) if any(method.needs_validation for method in methods) else None,
        )
        return Started(session.model, session.plan, session)

    return start


def _default(name: str) -> "Callable[[Arm], Method]":
    """A method by its facade name, on its defaults."""
    return lambda arm: getattr(rw, name)()


_ONE, _FOUR, _SIXTEEN = (4.5e-3, 6e-3, 9e-3), (3e-3, 4.5e-3, 6e-3), (1.5e-3, 3e-3, 4.5e-3)
_LOW, _RITE = (7.5e-4, 1.5e-3, 3e-3), (1.5e-3, 3e-3, 4.5e-3)
_LONG, _R2, _R4 = (3e-3, 4.5e-3, 6e-3), "uniform-r2-long", "uniform-r4-long"
_BOOST = (4.5e-3, 9e-3, 1.5e-2)  # a booster trains for a round only
_GORA_RITE = _methods(_gora, _default("LoRARITE"))
_GA_PRO = _methods(_default("LoRAGA"), _default("LoRAPro"))

ARMS: tuple[Arm, ...] = (
    Arm("uniform-r1", "uniform, r = 1", 1, _ONE, _uniform, None),
    Arm("uniform-r16", "uniform, r = 16", 16, _SIXTEEN, _uniform, "uniform-r1"),
    Arm("gora", "GoRA: ranks and start, mean r = 1", 1, _ONE, _gora_whole(own_scale=False), "uniform-r1"),
    Arm("gora-allocation", "GoRA's ranks alone", 1, _ONE, _gora_allocation, "uniform-r1"),
    Arm("gora-initialization", "GoRA's start alone", 1, _ONE, _gora_start, "uniform-r1"),
    Arm("inverse", "inverse of GoRA's importance", 1, _ONE, _inverse, "uniform-r1"),
    Arm("query-value", "query and value only", 1, _ONE, _only(lambda n: n.endswith(("query", "value"))), "uniform-r1"),
    Arm(
        "layers-0-2",
        "layers 0 to 2 only",
        1,
        _ONE,
        _only(lambda n: n.startswith(("encoder.layer.0.", "encoder.layer.1.", "encoder.layer.2."))),
        "uniform-r1",
    ),
    Arm("uniform-r4", "uniform, r = 4", 4, _FOUR, _uniform, "uniform-r1"),
    Arm("gora-r4", "GoRA: ranks and start, mean r = 4", 4, _FOUR, _gora_whole(own_scale=False), "uniform-r4"),
    Arm("gora-own-scale", "GoRA with its own scale", 1, _ONE, _gora_whole(own_scale=True), "uniform-r1"),
    Arm("lora-ga", "LoRA-GA, r = 1", 1, _LOW, _methods(_default("LoRAGA")), "uniform-r1"),
    Arm("lora-pro", "LoRA-Pro, r = 1", 1, _ONE, _methods(_default("LoRAPro")), "uniform-r1"),
    Arm("lora-rite", "LoRA-RITE, r = 1", 1, _RITE, _methods(_default("LoRARITE")), "uniform-r1"),
    Arm("ggpo", "GGPO, r = 1", 1, _ONE, _methods(_default("GGPO")), "uniform-r1"),
    Arm("mgpo", "MGPO, r = 1", 1, _ONE, _methods(_default("MGPO")), "uniform-r1"),
    Arm("gora-lora-rite", "GoRA + LoRA-RITE, mean r = 1", 1, _RITE, _GORA_RITE, "uniform-r1"),
    Arm("lora-ga-lora-pro", "LoRA-GA + LoRA-Pro, r = 1", 1, _LOW, _GA_PRO, "uniform-r1"),
    Arm("gora-ggpo", "GoRA + GGPO, mean r = 1", 1, _ONE, _methods(_gora, _default("GGPO")), "uniform-r1"),
    Arm("rora-mgpo", "RoRA + MGPO, r = 1", 1, _ONE, _methods(_default("RoRA"), _default("MGPO")), "uniform-r1"),
    Arm("lora-ga-r4", "LoRA-GA, r = 4", 4, _LOW, _methods(_default("LoRAGA")), "uniform-r4"),
    Arm("lora-pro-r4", "LoRA-Pro, r = 4", 4, _FOUR, _methods(_default("LoRAPro")), "uniform-r4"),
    Arm("lora-rite-r4", "LoRA-RITE, r = 4", 4, _RITE, _methods(_default("LoRARITE")), "uniform-r4"),
    Arm("ggpo-r4", "GGPO, r = 4", 4, _FOUR, _methods(_default("GGPO")), "uniform-r4"),
    Arm("mgpo-r4", "MGPO, r = 4", 4, _FOUR, _methods(_default("MGPO")), "uniform-r4"),
    Arm("uniform-r2-long", "uniform, r = 2, 600 steps", 2, _LONG, _uniform, None, 600),
    Arm("uniform-r4-long", "uniform, r = 4, 600 steps", 4, _LONG, _uniform, "uniform-r2-long", 600),
    Arm("gora-allocation-r2-long", "GoRA's ranks, mean r = 2, 600 steps", 2, _LONG, _gora_allocation, _R2, 600),
    Arm("gora-allocation-r4-long", "GoRA's ranks, mean r = 4, 600 steps", 4, _LONG, _gora_allocation, _R4, 600),
    Arm("ab-lora-r2-long", "AB-LoRA, mean r = 2, 600 steps", 2, _LONG, _methods(_default("ABLoRA")), _R2, 600),
    Arm("ab-lora-r4-long", "AB-LoRA, mean r = 4, 600 steps", 4, _LONG, _methods(_default("ABLoRA")), _R4, 600),
    Arm("sora-r2-long", "SoRA from r = 2, 600 steps", 2, _LONG, _methods(_default("SoRA")), _R2, 600),
    Arm("sora-r4-long", "SoRA from r = 4, 600 steps", 4, _LONG, _methods(_default("SoRA")), _R4, 600),
    Arm("beamlora-r2-long", "BeamLoRA, r = 2, 600 steps", 2, _LONG, _methods(_default("BeamLoRA")), _R2, 600),
    Arm("beamlora-r4-long", "BeamLoRA, r = 4, 600 steps", 4, _LONG, _methods(_default("BeamLoRA")), _R4, 600),
    Arm("xgblora-r2-long", "XGBLoRA, r = 2, 600 steps", 2, _BOOST, _methods(_default("XGBLoRA")), _R2, 600),
    Arm("xgblora-r4-long", "XGBLoRA, r = 4, 600 steps", 4, _BOOST, _methods(_default("XGBLoRA")), _R4, 600),
)
