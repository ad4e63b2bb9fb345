"""What a plan will cost: steps of it are made and measured on a model that is thrown away, beside plain LoRA's."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rankwise.ranks.plan import RankPlan
from rankwise.workflows.arguments import autocast_dtype
from rankwise.workflows.events import Listener, Note, ignore
from rankwise.workflows.job import TASK_TYPES, Job, job_recipe, max_steps, validation_batches
from rankwise.workflows.prepare import calibration_batches

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.optim import Optimizer

    from rankwise.adapters.state import FactorPair
    from rankwise.methods.recipe import Recipe
    from rankwise.methods.schedule import Schedule

__all__ = ["RunCost", "measure_cost"]

_LEAST_STEPS, _MOST_STEPS, _LONG_ENOUGH = 2, 12, 2.0
"""Steps behind the time: two at least, more until they took so many seconds; one more goes before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """What training will take on this machine, in bytes and seconds.

    Args:
        trained_parameters: the adapter's and those of `modules_to_save`.
        model_bytes: weights and buffers, the adapter and the start that is subtracted beside it included.
        gradient_bytes: gradients of what is trained.
        optimizer_bytes: the optimizer's state: AdamW's two moments, or what the recipe's own optimizer keeps.
        activation_bytes: what the backward pass of one micro-batch keeps, measured.
        schedule_bytes: what the schedule keeps, and holds within a step.
        base_copy_bytes: the adapted base weights as they were found, on the CPU, where a start is subtracted from them
            or boosters are added to them.
        steps: optimizer steps of the run.
        micro_batches: of one step.
        micro_batch_seconds: forward and backward of one micro-batch, measured.
        optimizer_seconds: one optimizer step, measured, with what the schedule does around it.
        event_seconds: what the schedule's rounds over the whole run take beside its steps, foretold from a timed pass.
        plain_micro_batch_seconds: the same for plain LoRA of these ranks.
        plain_optimizer_seconds: the same for AdamW.
    """

    trained_parameters: int
    model_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    schedule_bytes: int
    base_copy_bytes: int
    steps: int
    micro_batches: int
    micro_batch_seconds: float
    optimizer_seconds: float
    event_seconds: float
    plain_micro_batch_seconds: float
    plain_optimizer_seconds: float

    @property
    def memory_bytes(self) -> int:
        """The sum of what is held at the peak of a step, over all devices."""
        trained = self.model_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        return trained + self.schedule_bytes + self.base_copy_bytes

    @property
    def seconds(self) -> float:
        """Training alone: calibration, evaluation and saving come on top."""
        return self.steps * self._step_seconds + self.event_seconds

    @property
    def _step_seconds(self) -> float:
        return self.micro_batches * self.micro_batch_seconds + self.optimizer_seconds

    @property
    def overhead(self) -> float:
        """A step over a plain LoRA step of the same ranks under AdamW; exactly 1 where nothing differs."""
        plain = self.micro_batches * self.plain_micro_batch_seconds + self.plain_optimizer_seconds
        return self._step_seconds / plain

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the sums included."""
        return {
            **asdict(self),
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
            "overhead": self.overhead,
        }


def measure_cost(job: Job, plan: RankPlan, listener: Listener = ignore) -> RunCost:
    """Attaches the plan to the job's model and makes steps with it; the model is not fit for training afterwards.

    Args:
        job: a loaded run.
        plan: its ranks.
        listener: told of an optimizer state that is worth a word before it is made.

    Raises:
        ModelError: the model already carries an adapter.
        ConfigError: an optimizer state that does not fit in the free memory.
    """
    import torch

    from rankwise.adapters.attach import adapted_layers, attach_lora
    from rankwise.training.beside import planned_slots
    from rankwise.training.optimizers import (
        adamw_and_scheduler,
        own_and_scheduler,
        refuse_large_state,
        state_in_words,
    )

    recipe, arguments, steps = job_recipe(job), job.arguments, max_steps(job)
    model = attach_lora(
        job.model,
        plan,
        slots=planned_slots(recipe, plan),
        lora_dropout=job.config.lora_dropout,
        modules_to_save=list(job.modules_to_save) or None,
        task_type=TASK_TYPES[job.config.task],
    )
    model.train()
    layers = adapted_layers(model)
    method = recipe.optimize
    if method is not None and (state := refuse_large_state(method, layers)) is not None:
        listener(Note(text=state_in_words(method, state)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = True if arguments.device.type in ("cpu", "cuda") else None
    plain_optimizer: Optimizer = torch.optim.AdamW(trained, lr=0.0, fused=fused)
    plain = timed = _Steps(job, model).measured(plain_optimizer)
    optimizer, beside, scheduled, copied, events = plain_optimizer, 0, 0, 0, 0.0
    if method is not None or recipe.schedule is not None or recipe.initialize.offset_place == "adapter":
        if method is not None:
            optimizer = own_and_scheduler(model, layers, arguments, steps, method)[0]
        with ExitStack() as stack:
            schedule, beside = _put_beside(recipe, job, model, stack)
            if schedule is not None:
                for text in schedule.outlook(steps):
                    listener(Note(text=text))
                if method is None and schedule.owned_groups(1.0, 0.0):
                    optimizer = adamw_and_scheduler(model, arguments, steps, schedule)[0]
            measuring = _Steps(job, model, schedule, steps)
            timed = measuring.measured(optimizer)
            if schedule is not None:
                scheduled, copied = schedule.memory_bytes(), schedule.base_copy_bytes()
                events = measuring.event_seconds
    if recipe.initialize.offset_place == "base":
        moved: list[Any] = [layer.base.module for layer in layers.values()]
        copied += sum(_storage_bytes([base.weight for base in moved]).values())
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return RunCost(
        trained_parameters=sum(parameter.numel() for parameter in trained),
        model_bytes=sum(_storage_bytes([*model.parameters(), *model.buffers()]).values()) + beside,
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes if method is None else _state_bytes(optimizer),
        activation_bytes=timed.kept,
        schedule_bytes=scheduled,
        base_copy_bytes=copied,
        steps=steps,
        micro_batches=arguments.gradient_accumulation_steps,
        micro_batch_seconds=timed.micro_batch,
        optimizer_seconds=timed.optimizer,
        event_seconds=events,
        plain_micro_batch_seconds=plain.micro_batch,
        plain_optimizer_seconds=plain.optimizer,
    )


def _put_beside(recipe: "Recipe", job: Job, model: "PeftModel", stack: ExitStack) -> "tuple[Schedule | None, int]":
    """The schedule and an offset of the start's sizes in place, until the stack is closed; the bytes of the offset."""
    from rankwise.adapters.attach import adapted_layers
    from rankwise.training.beside import make_schedule, put_offset

    layers = adapted_layers(model)
    offset = None
    if recipe.initialize.offset_place == "adapter":  # from the base itself it costs a step nothing
        offset = put_offset(model, layers, recipe, {name: _some_pair(layer) for name, layer in layers.items()})
        assert offset is not None
        stack.callback(offset.close)
    schedule = make_schedule(
        recipe, model, layers, job.config.seed, offset=offset, validation=validation_batches(job), loss=None
    )
    if schedule is not None:
        stack.callback(schedule.close)
    pairs = () if offset is None else offset.pairs.values()
    return schedule, sum(_storage_bytes([factor for pair in pairs for factor in (pair.lora_A, pair.lora_B)]).values())


def _some_pair(layer: Any) -> "FactorPair":
    """A pair of the start's sizes; a start of zeros would not be subtracted at all."""
    import torch

    from rankwise.adapters.state import FactorPair

    lora_A, lora_B = layer.lora_A.detach().float().cpu(), layer.lora_B.detach().float().cpu()
    return FactorPair(torch.full_like(lora_A, 1e-3), torch.full_like(lora_B, 1e-3))


@dataclass(frozen=True, slots=True)
class _Timed:
    """Seconds of a micro-batch and of an optimizer step, and the bytes kept between forward and backward."""

    micro_batch: float
    optimizer: float
    kept: int


class _Steps:
    """A few optimizer steps of one micro-batch each, as training makes them.

    Args:
        job: the run.
        model: the attached model.
        schedule: what acts around steps.
        steps: of the whole run.
    """

    def __init__(self, job: Job, model: "PeftModel", schedule: "Schedule | None" = None, steps: int = 1) -> None:
        self._job, self._model, self._schedule, self._steps = job, model, schedule, steps
        self.event_seconds = 0.0
        """Of all rounds of the run, as foretold before its first step."""
        self._resident = _storage_bytes([*model.parameters(), *model.buffers()]).keys()

    def measured(self, optimizer: "Optimizer") -> _Timed:
        """The steps, the first of which warms up: allocations, an optimizer's state, a schedule's first look."""
        if self._schedule is not None:
            self._schedule.begin(optimizer, max(self._steps, _LEAST_STEPS + 1))
            self.event_seconds = self._schedule.event_seconds()
        done: list[_Timed] = []
        # A schedule knows no step beyond the run.
        most = _MOST_STEPS if self._schedule is None else min(_MOST_STEPS, max(self._steps - 1, _LEAST_STEPS))
        for number, batch in enumerate(self._batches(most + 1), 1):
            done.append(self._step(optimizer, number, batch))
            if number > _LEAST_STEPS and sum(one.micro_batch + one.optimizer for one in done[1:]) >= _LONG_ENOUGH:
                break
        timed = done[1:]
        return _Timed(
            statistics.median(one.micro_batch for one in timed),
            statistics.median(one.optimizer for one in timed),
            max(one.kept for one in done),
        )

    def _batches(self, count: int) -> Iterator[Any]:
        """The run's own micro-batches, read again where it has fewer."""
        loader = calibration_batches(self._job.prepared, self._job.arguments.train_batch_size, self._job.config.seed)
        batches: Sequence[Any] = [batch for _, batch in zip(range(count), loader, strict=False)]
        return (batches[number % len(batches)] for number in range(count))

    def _step(self, optimizer: "Optimizer", number: int, batch: Any) -> _Timed:
        device, schedule = self._job.arguments.device, self._schedule
        begun = time.perf_counter()
        if schedule is not None:
            schedule.before_step(number)
            _wait(device)
        before = time.perf_counter() - begun
        begun = time.perf_counter()
        kept = _pass(self._model, batch, device, autocast_dtype(self._job.arguments), self._resident)
        micro_batch = time.perf_counter() - begun
        begun = time.perf_counter()
        if schedule is not None:
            schedule.before_optimizer_step(number)
        optimizer.step()
        if schedule is not None:
            schedule.after_step(number)
        _wait(device)
        after = time.perf_counter() - begun
        optimizer.zero_grad()
        return _Timed(micro_batch, before + after, kept)


def _pass(model: Any, batch: Any, device: Any, autocast: Any, resident: Iterable[int]) -> int:
    """Forward and backward of one micro-batch; the bytes that the graph kept between them."""
    import torch

    moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    kept: dict[int, int] = {}
    weights = set(resident)

    def keep(tensor: "Tensor") -> "Tensor":
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(**moved).loss
    loss.backward()
    _wait(device)
    return sum(kept.values())


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state_bytes(optimizer: "Optimizer") -> int:
    """Bytes of the optimizer's state; stacks that several parameters' states view count once."""
    import torch

    found = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_storage_bytes([value for value in found if isinstance(value, torch.Tensor)]).values())


def _storage_bytes(tensors: "Iterable[Tensor]") -> dict[int, int]:
    """Bytes by storage, so that tied weights count once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
