"""The few collective operations that calibration and the plan need; without a process group each is a no-op."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.errors import CalibrationError

__all__ = [
    "all_reduce_sum",
    "assert_equal_everywhere",
    "broadcast_object",
    "decided_by_first",
    "gather_objects",
    "process_index",
    "world_size",
]

Value = TypeVar("Value")


def world_size() -> int:
    """How many processes work together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's number in [0, world_size): 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes, written into `tensor` and the same bits in every process.

    Args:
        tensor: the same shape and dtype in every process; a CPU tensor travels over the accelerator when the backend
            cannot take it (NCCL).

    Returns:
        `tensor` itself.
    """
    if world_size() == 1:
        return tensor
    if tensor.device.type == "cpu" and "cpu:" not in dist.get_backend_config():
        travelling = tensor.to(torch.accelerator.current_accelerator())
        dist.all_reduce(travelling)
        return tensor.copy_(travelling)
    dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: Value) -> Value:
    """Process 0's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def decided_by_first(call: Callable[[], Value]) -> Value:
    """What `call` returns or raises in process 0, in every process: none waits for a process that has failed."""
    value: Value | None = None
    error: Exception | None = None
    if process_index() == 0:
        try:
            value = call()
        except Exception as raised:
            if world_size() == 1:
                raise
            error = raised
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return cast(Value, value)


def gather_objects(value: Value) -> list[Value]:
    """Every process's value, in every process, in the order of the processes."""
    if world_size() == 1:
        return [value]
    values: list[Value] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def assert_equal_everywhere(text: str, what: str) -> None:
    """Every process holds the same `text`.

    Args:
        text: a hash or a short rendering of what must agree, for example a plan's hash.
        what: its name in the error.

    Raises:
        CalibrationError: in every process, naming the processes that differ from process 0.
    """
    texts = gather_objects(text)
    different = [index for index, other in enumerate(texts) if other != texts[0]]
    if different:
        raise CalibrationError(
            f"{what} differs between processes: process 0 has {texts[0]!r}, process {different[0]} has "
            f"{texts[different[0]]!r} (differing from process 0: {different}). "
            "Give every process the same model, data, settings and seed."
        )
