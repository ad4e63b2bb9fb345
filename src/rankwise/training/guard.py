"""Proof of training: each check is a line of health.json with its measured figure, and a failed one ends the run.

Before the first step a fault is a ConfigError (nothing was done yet); after it, a HealthError. Figures that live on the
device are read at logging steps only.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import CONTAINER, live_gates
from rankwise.adapters.state import FoldState
from rankwise.calibration.processes import process_index
from rankwise.errors import ConfigError, HealthError
from rankwise.linalg.factors import product_norm, stack
from rankwise.training.gradients import GradientFilter, local

__all__ = ["Guard", "HealthCheck", "HealthStatus"]

Stage = Literal["before", "during", "after"]
HealthStatus = Literal["passed", "failed", "not exercised", "pending"]
Figure = float | int | str | None

SKIPPED_SHARE: Final = 0.1
"""The share of its steps that a pair may sit out for non-finite gradients (one step is always forgiven)."""
_NAMES_SHOWN: Final = 3
_ROUNDING: Final = 1e-12
"""What float64 leaves of the difference of two equal products, relative to one of them."""
_LAYER_DROP: Final = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """One line of health.json.

    Args:
        id: a short stable word.
        stage: when it is made.
        status: "not exercised" if the run never came to what it checks.
        measured: the figure.
        limit: what the figure is held against.
        message: what was found, in the user's words.
        advice: what to do; empty unless it failed.
    """

    id: str
    stage: Stage
    status: HealthStatus
    measured: Figure = None
    limit: Figure = None
    message: str = ""
    advice: str = ""


class Guard:
    """Makes the checks of one run and remembers their outcome.

    Args:
        layers: the adapted layers by name.
        model: the attached model.
        calibrated: calibration batches in which every layer was seen to have a gradient; 0 if there were none.
        unreached: layers that calibration was allowed to miss; the first step may miss them too.
        beside: what stands beside the factors now: a layer that stayed at the start that is subtracted again holds no
            update, one whose gates are closed holds what its boosters add up to.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLayer],
        model: nn.Module,
        *,
        calibrated: int = 0,
        unreached: Collection[str] = (),
        beside: Callable[[], FoldState] = FoldState,
    ) -> None:
        self._layers = layers
        self._beside = beside
        self._unreached = frozenset(unreached)
        self._model = model
        self._checks: dict[str, HealthCheck] = {}
        self._start: dict[str, tuple[Tensor, Tensor]] = {}
        self._moved: dict[str, bool] = {}
        self._losses: tuple[float, float] | None = None
        self._looked = False
        self.finished = False
        self.folder: Path | None = None
        """Where health.json goes when a check fails; the callback sets it to the run's output folder."""
        self.gradients = GradientFilter(self._units())
        self.record(
            HealthCheck(
                id="targets",
                stage="before",
                status="passed",
                measured=len(layers),
                limit=1,
                message=f"{len(layers)} layers carry an adapter; their ranks and scalings were asserted one by one",
            )
        )
        for check in _PENDING:
            self.record(check)
        if calibrated and not unreached:
            message = f"the loss reached every layer in {calibrated} calibration batches"
            self.record(_passed("reached", "before", calibrated, 1, message))

    @property
    def checks(self) -> tuple[HealthCheck, ...]:
        """All checks, those of the stages in turn."""
        order: tuple[Stage, ...] = ("before", "during", "after")
        return tuple(check for stage in order for check in self._checks.values() if check.stage == stage)

    @property
    def status(self) -> Literal["passed", "failed", "running"]:
        """Failed if a check failed; passed once training ended and none is pending."""
        if any(check.status == "failed" for check in self._checks.values()):
            return "failed"
        pending = any(check.status == "pending" for check in self._checks.values())
        return "running" if pending or not self.finished else "passed"

    def record(self, check: HealthCheck) -> None:
        """Adds a check, or replaces the one of the same id; raises nothing."""
        self._checks[check.id] = check

    def settle(self, check: HealthCheck) -> None:
        """Records a check; if it failed, writes health.json and ends the run.

        Raises:
            HealthError: the check failed.
        """
        self.record(check)
        if check.status == "failed":
            if self.folder is not None and process_index() == 0:
                self.save(self.folder / "health.json")
            raise HealthError(f"health check {check.id!r} failed: {check.message}. {check.advice}")

    def to_dict(self) -> dict[str, Any]:
        """What health.json holds."""
        return {
            "format": "rankwise-health",
            "version": 1,
            "status": self.status,
            "checks": [asdict(check) for check in self.checks],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes health.json; the file is never seen half-written."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{os.getpid()}.part")
        staged.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        staged.replace(target)

    def begin(self, optimizer: Optimizer, max_steps: int, planned_steps: int | None) -> None:
        """The checks before the first step.

        Args:
            optimizer: the unwrapped optimizer.
            max_steps: optimizer steps that the loop will make in total.
            planned_steps: steps that the learning-rate schedule was built for, if the session built it.

        Raises:
            ConfigError: a learning rate of 0, an optimizer that misses trainable parameters, a trainable parameter that
                no export would hold, or a schedule shorter than the run.
        """
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        missing = [n for n, p in wanted.items() if id(p) not in held]
        exported = {id(p) for layer in self._layers.values() for p in (layer.lora_A, layer.lora_B)}
        own = (".modules_to_save.", f"{CONTAINER}.")  # gates are folded into the factors
        outside = [n for n, p in wanted.items() if id(p) not in exported and not any(part in n for part in own)]
        faults = _begin_faults(rates, wanted, missing, outside, max_steps, planned_steps)
        if faults:
            raise ConfigError(faults)
        self.record(
            _passed("learning-rate", "before", max(rates), 0.0, f"the learning rate starts from {max(rates):g}")
        )
        self.record(
            _passed("wiring", "before", len(wanted), len(wanted), "the optimizer holds every trainable parameter")
        )
        self.record(_passed("length", "before", max_steps, planned_steps, f"the run makes {max_steps} optimizer steps"))
        units = self._units()
        if not self.gradients.watches(units):
            counters, protecting = self.gradients.state_dict(), self.gradients.protecting
            self.gradients = GradientFilter(units)
            self.gradients.load_state_dict(counters)
            self.gradients.protecting = protecting
        self._start = {name: (_copy(layer.lora_A), _copy(layer.lora_B)) for name, layer in self._layers.items()}
        self.gradients.install(optimizer, self._model)

    def stepped(self) -> None:
        """After each step: once the learning rate was above 0, every layer has had a gradient, or may be passed over.

        A layer that the loss does not depend on has none, not even zeros. Routing may pass over experts, and LayerDrop
        over any layer, in one step: those wait for the end of the run.

        Raises:
            HealthError: the loss does not depend on a layer.
        """
        untouched = self.gradients.untouched
        if not untouched or self._looked:
            return
        self._looked = True
        exercised = self.gradients.exercised()  # a resumed run knows more than its first step
        dropping = any(float(getattr(c, n, 0) or 0) > 0 for c in _configurations(self._model) for n in _LAYER_DROP)
        owned = [n for n in untouched if n in self._layers and n not in self._unreached]
        expected = [n for n in owned if not self._layers[n].base.expert]
        idle = [n for n in expected if not exercised[n] and not dropping]
        if not idle:
            return
        reached = len(self._layers) - len(untouched)
        self.settle(
            HealthCheck(
                id="reached",
                stage="before",
                status="failed",
                measured=reached,
                limit=len(self._layers),
                message=f"no gradient reached {len(idle)} of {len(self._layers)} layers in the first step "
                f"({_some(idle)})",
                advice="the loss does not depend on them: leave them out with exclude_modules",
            )
        )

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """The checks at a logging step: losses, gradients, movement.

        Args:
            step: the optimizer step.
            values: `loss` and `grad_norm`, where the loop has them.

        Raises:
            HealthError: a loss that is not finite, a pair that sat out too many steps, or factors that do not move.
        """
        if "loss" in values:
            self._check_loss(step, float(values["loss"]))
        if self.gradients.steps:
            self._check_gradients(step)
        if self.gradients.steps and self._checks["movement"].status == "pending":
            self._check_movement(step)

    def end(self, step: int) -> None:
        """The checks after the last step: every layer that could train did, and holds an update.

        Raises:
            HealthError: nothing trained, or a layer that had gradients holds no update.
        """
        if self.gradients.steps:
            self._check_gradients(step)
            self._check_movement(step)
        self._check_reached()
        for check in list(self._checks.values()):
            if check.stage != "after" and check.status == "pending":
                self.record(replace(check, status="not exercised", message="the run never came to it"))
        self._check_updates()
        self.finished = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from; JSON-ready."""
        return {"gradients": self.gradients.state_dict(), "moved": self._movement(), "losses": self._losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.gradients.load_state_dict(state["gradients"])
        self._moved = {name: bool(value) for name, value in state["moved"].items()}
        self._losses = None if state["losses"] is None else (state["losses"][0], state["losses"][1])

    def _units(self) -> dict[str, list[nn.Parameter]]:
        """What stands or falls together when a gradient is not finite."""
        gates = live_gates(self._model)
        trained = {} if gates is None else gates.trained()
        units: dict[str, list[nn.Parameter]] = {
            n: [x.lora_A, x.lora_B, *trained.get(n, ())] for n, x in self._layers.items()
        }
        saved = [p for n, p in self._model.named_parameters() if p.requires_grad and ".modules_to_save." in n]
        return {**units, "modules_to_save": saved} if saved else units

    def _check_loss(self, step: int, loss: float) -> None:
        first = loss if self._losses is None else self._losses[0]
        self._losses = (first, loss)
        finite = math.isfinite(loss)
        self.settle(
            HealthCheck(
                id="loss",
                stage="during",
                status="passed" if finite else "failed",
                measured=loss if finite else str(loss),
                limit="finite",
                message=f"the loss went from {first:.4g} to {loss:.4g} at step {step}",
                advice=""
                if finite
                else "lower the learning rate, or look for rows that no label or an overflow made infinite",
            )
        )

    def _check_gradients(self, step: int) -> None:
        skipped = self.gradients.skipped()
        worst = max(skipped, key=lambda name: skipped[name])
        total = sum(skipped.values())
        limit = max(1.0, SKIPPED_SHARE * self.gradients.steps)
        self.settle(
            HealthCheck(
                id="gradients",
                stage="during",
                status="failed" if skipped[worst] > limit else "passed",
                measured=skipped[worst],
                limit=limit,
                message=f"up to step {step} {total} updates of a pair were left out for non-finite gradients"
                + (f", most for {worst!r}: {skipped[worst]} of {self.gradients.steps} steps" if total else ""),
                advice=""
                if skipped[worst] <= limit
                else "lower the learning rate, or train in float32 or bfloat16 instead of float16",
            )
        )

    def _movement(self) -> dict[str, bool]:
        """Which layers' factors were ever seen to differ from the start, or were folded into a booster."""
        still = [name for name in self._start if not self._moved.get(name, False)]
        boosted = self._beside().boosters if still else {}
        for name in still:
            (lora_A, lora_B), layer = self._start[name], self._layers[name]
            same = torch.equal(_copy(layer.lora_A), lora_A) and torch.equal(_copy(layer.lora_B), lora_B)
            self._moved[name] = name in boosted or not same
        return dict(self._moved)

    def _check_movement(self, step: int) -> None:
        moved = self._movement()
        exercised = self.gradients.exercised()
        due = [name for name in self._layers if exercised[name]]
        if not due:
            return  # warm-up at rate 0, or no gradient yet
        still = [name for name in due if not moved.get(name, False)]
        self.settle(
            HealthCheck(
                id="movement",
                stage="during",
                status="failed" if still else "passed",
                measured=len(due) - len(still),
                limit=len(due),
                message=f"by step {step} the factors of {len(due) - len(still)} of {len(due)} layers with a gradient "
                "had moved" + (f"; not those of {_some(still)}" if still else ""),
                advice=""
                if not still
                else "the optimizer does not train them: build it after attach, from session.model",
            )
        )

    def _check_reached(self) -> None:
        """Without calibration it takes the whole run to know; layers of seldom used experts are no fault."""
        if self._checks["reached"].status != "pending" or not self.gradients.steps:
            return
        exercised = self.gradients.exercised()
        idle = [name for name in self._layers if not exercised[name]]
        message = f"the loss reached {len(self._layers) - len(idle)} of {len(self._layers)} layers in training"
        found = _passed("reached", "before", len(self._layers) - len(idle), len(self._layers), message)
        if idle:
            found = replace(found, status="not exercised", message=f"{message}; not {_some(idle)}")
        self.record(found)

    def _check_updates(self) -> None:
        exercised = self.gradients.exercised()
        state = self._beside()
        pruned = [n for n, gate in state.gates.items() if n not in state.boosters and not bool(gate.any())]
        due = [name for name in self._layers if exercised[name] and name not in pruned]
        idle = [name for name in self._layers if not exercised[name] and name not in pruned]
        norms = {n: _update_norm(self._layers[n], state) for n in due}
        empty = [name for name, norm in norms.items() if not norm > 0 or not math.isfinite(norm)]
        nothing = self.gradients.steps > 0 and not due and not pruned
        failed = bool(empty) or nothing
        message = f"{len(due) - len(empty)} of {len(due)} layers that had a gradient hold a finite, non-zero update"
        if empty:
            message += f"; not {_some(empty)}"
        if nothing:
            message = f"no layer had a gradient in {self.gradients.steps} steps at a learning rate above 0"
        if idle and not nothing:
            message += f"; not exercised, because no gradient reached them: {len(idle)} layers ({_some(idle)})"
        if pruned:
            message += f"; {len(pruned)} layers end without a rank that counts ({_some(pruned)})"
        if len(pruned) == len(self._layers):
            message = "every rank of every layer was pruned: the adapter equals the base model"
        self.settle(
            HealthCheck(
                id="update",
                stage="after",
                status="failed" if failed else ("passed" if due else "not exercised"),
                measured=min(norms.values()) if norms else None,
                limit=0.0,
                message=message,
                advice="check that the loss depends on these layers and that the labels are not all masked"
                if failed
                else "",
            )
        )


_PENDING: Final = (
    HealthCheck(id="reached", stage="before", status="pending"),
    HealthCheck(id="loss", stage="during", status="pending", limit="finite"),
    HealthCheck(id="gradients", stage="during", status="pending"),
    HealthCheck(id="movement", stage="during", status="pending"),
    HealthCheck(id="update", stage="after", status="pending", limit=0.0),
)


def _passed(name: str, stage: Stage, measured: Figure, limit: Figure, message: str) -> HealthCheck:
    return HealthCheck(id=name, stage=stage, status="passed", measured=measured, limit=limit, message=message)


def _begin_faults(
    rates: list[float],
    wanted: Mapping[str, nn.Parameter],
    missing: list[str],
    outside: list[str],
    max_steps: int,
    planned: int | None,
) -> list[str]:
    faults = []
    if not rates or not max(rates) > 0:
        faults.append("the learning rate is 0 in every parameter group: nothing would train; set learning_rate above 0")
    if not wanted:
        faults.append("no parameter is trainable: something froze the adapter after attach")
    if missing:
        faults.append(
            f"the optimizer misses {len(missing)} of {len(wanted)} trainable parameters ({_some(missing)}): "
            "build it after attach, with session.optimizers(args, num_training_steps)"
        )
    if outside:
        faults.append(
            f"{len(outside)} parameters outside the adapter are trainable ({_some(outside)}): they would be trained "
            "and exported nowhere; freeze them with requires_grad_(False), or attach with their module in "
            "modules_to_save"
        )
    if planned is not None and max_steps > planned:
        faults.append(
            f"the run makes {max_steps} steps but its learning-rate schedule was built for {planned}: the rest would "
            f"train at its last rate; call session.optimizers(args, num_training_steps={max_steps})"
        )
    return faults


def _copy(parameter: Tensor) -> Tensor:
    return local(parameter.detach()).to("cpu", copy=True)


def _update_norm(layer: AdaptedLayer, state: FoldState) -> float:
    """||s (B g A + B_acc A_acc - B0 A0)||, of which what rounding leaves of a start that stayed is 0."""
    lora_A, lora_B = (
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().float() for p in (layer.lora_A, layer.lora_B)
    )
    gate, booster = state.gates.get(layer.name), state.boosters.get(layer.name)
    offset = state.offsets.get(layer.name)
    if gate is not None:
        lora_A = gate.to(lora_A.device)[:, None] * lora_A
    if booster is not None:
        lora_A = torch.cat([lora_A, booster.lora_A.to(lora_A)])
        lora_B = torch.cat([lora_B, booster.lora_B.to(lora_B)], dim=1)
    if offset is None:
        return abs(layer.scaling) * product_norm(lora_A, lora_B)
    start = (offset.lora_A.to(lora_A), offset.lora_B.to(lora_B))
    norm = product_norm(*stack([(lora_A.double(), lora_B.double(), 1.0), (*start, -1.0)]))
    return abs(layer.scaling) * norm if norm > _ROUNDING * product_norm(*start) else 0.0


def _configurations(model: nn.Module) -> Iterator[object]:
    return (m.config for m in model.modules() if hasattr(m, "config"))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
