"""What a plan will cost: one training step of it is made and measured on a model that is thrown away."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rankwise.ranks.plan import RankPlan
from rankwise.workflows.arguments import autocast_dtype
from rankwise.workflows.job import TASK_TYPES, Job
from rankwise.workflows.prepare import calibration_batches

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RunCost", "measure_cost"]

_TIMED_STEPS = 2
"""Micro-batches behind the time; one more goes before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """What training will take on this machine, in bytes and seconds.

    Args:
        trained_parameters: the adapter's and those of `modules_to_save`.
        model_bytes: weights and buffers, the adapter included.
        gradient_bytes: gradients of what is trained.
        optimizer_bytes: AdamW's two moments.
        activation_bytes: what the backward pass of one micro-batch keeps, measured.
        steps: optimizer steps of the run.
        micro_batch_seconds: forward and backward of one micro-batch, measured.
        optimizer_seconds: one optimizer step, measured.
    """

    trained_parameters: int
    model_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    steps: int
    micro_batches: int
    micro_batch_seconds: float
    optimizer_seconds: float

    @property
    def memory_bytes(self) -> int:
        """The sum of what is held at the peak of a step."""
        return self.model_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def seconds(self) -> float:
        """Training alone: calibration, evaluation and saving come on top."""
        return self.steps * (self.micro_batches * self.micro_batch_seconds + self.optimizer_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the sums included."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "seconds": self.seconds}


def measure_cost(job: Job, plan: RankPlan) -> RunCost:
    """Attaches the plan to the job's model and makes a step with it; the model is not fit for training afterwards.

    Args:
        job: a loaded run.
        plan: its ranks.

    Raises:
        ModelError: the model already carries an adapter.
    """
    import torch

    from rankwise.adapters.attach import attach_lora

    model = attach_lora(
        job.model,
        plan,
        lora_dropout=job.config.lora_dropout,
        modules_to_save=list(job.modules_to_save) or None,
        task_type=TASK_TYPES[job.config.task],
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    arguments = job.arguments
    loader = calibration_batches(job.prepared, arguments.train_batch_size, job.config.seed)
    batches = [batch for _, batch in zip(range(_TIMED_STEPS + 1), loader, strict=False)]
    resident = _storage_bytes([*model.parameters(), *model.buffers()])
    kept, spent = 0, []
    for batch in batches:
        begun = time.perf_counter()
        kept = max(kept, _pass(model, batch, arguments.device, autocast_dtype(arguments), resident.keys()))
        spent.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    optimizer.step()
    _wait(arguments.device)
    stepped = time.perf_counter() - begun
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return RunCost(
        trained_parameters=sum(parameter.numel() for parameter in trained),
        model_bytes=sum(resident.values()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        activation_bytes=kept,
        steps=_steps(job),
        micro_batches=arguments.gradient_accumulation_steps,
        micro_batch_seconds=sum(spent[1:] or spent) / len(spent[1:] or spent),
        optimizer_seconds=stepped,
    )


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


def _storage_bytes(tensors: "Iterable[Tensor]") -> dict[int, int]:
    """Bytes by storage, so that tied weights count once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _steps(job: Job) -> int:
    arguments = job.arguments
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    epoch: int = math.ceil(len(job.prepared.train) / batch)
    return max(1, math.ceil(epoch * float(arguments.num_train_epochs)))
