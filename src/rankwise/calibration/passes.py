"""One pass over this process's share of the batches, and what all processes make of it together."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.as_found import seeded_for_batch
from rankwise.calibration.batches import BatchStore, Loss, batch_to
from rankwise.calibration.collectors import Receiver, WeightUses, attach_outer, attach_param
from rankwise.calibration.layer_sums import LayerSums
from rankwise.calibration.processes import all_reduce_sum, gather_objects, process_index, world_size
from rankwise.errors import CalibrationError, DataError

__all__ = ["BatchRunner", "Totals", "first_non_finite", "reduce_sums", "run_pass"]


@dataclass
class Totals:
    """What a pass saw, summed over the batches that were used.

    Args:
        reached: for each layer of the pass, how many used batches reached it.
        seen: batches given to the model.
        batches: batches used.
        skipped: batches whose loss or gradient was not finite.
        weight: the sum of their weights.
        loss: the weighted sum of their losses.
        bad: the first batch that was skipped, by global number.
    """

    reached: list[int]
    seen: int = 0
    batches: int = 0
    skipped: int = 0
    weight: float = 0.0
    loss: float = 0.0
    bad: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRunner:
    """The model, its loss and its batches: everything that every pass shares.

    Args:
        model: the unwrapped base model, left as found by the caller.
        layers: the targets.
        store: the global batches.
        loss: (model, batch) -> (mean loss, weight).
        collector: how gradients are seen.
        token_weighted: whether a batch counts by its weight, or each batch the same.
        seed: the run's seed, for dropout.
        autocast_dtype: the dtype of the training's autocast, None for none.
        replicate: whether every process runs every batch (adaptive N must see the running mean after each).
    """

    model: nn.Module
    layers: Sequence[LinearLayer]
    store: BatchStore
    loss: Loss
    collector: Literal["outer", "param"]
    token_weighted: bool
    seed: int
    autocast_dtype: torch.dtype | None
    replicate: bool

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return next(self.model.parameters()).device

    def own_batches(self) -> Iterator[tuple[int, Any]]:
        """This process's (global number, batch): numbers p, p + world, p + 2 world, ..."""
        step, first = (1, 0) if self.replicate else (world_size(), process_index())
        for number, batch in enumerate(self.store):
            if number % step == first:
                yield number, batch

    def attach(self, indices: Sequence[int], receiver: Receiver, stack: ExitStack) -> None:
        """Lets the receiver see the gradients of these layers (by their position in `indices`)."""
        layers = [self.layers[index] for index in indices]
        attach = attach_outer if self.collector == "outer" else attach_param
        # Looked up anew for each pass: bitsandbytes repacks 4-bit weights at the first evaluation on a CPU, and what
        # lies at their old addresses then may be another layer's.
        attach(WeightUses(self.model), layers, receiver, stack)

    def forward(self, number: int, batch: Any) -> tuple[Tensor, float]:
        """The batch's loss and weight, under the training's autocast."""
        on_device = batch_to(batch, self.device)
        dtype = self.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return _checked(*self.loss(self.model, on_device), number)


def _checked(loss: Tensor, weight: float, number: int) -> tuple[Tensor, float]:
    if loss.numel() != 1:
        raise DataError(
            f"the loss of calibration batch {number} has the shape {list(loss.shape)}; it must be one number, the "
            "mean over the batch's labels."
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(
            f"the weight of calibration batch {number} is {weight}; it must be a number of labels, at least 0."
        )
    return loss, float(weight)


class _Summing:
    """Delivers every gradient into its layer's sums."""

    def __init__(self, sums: Sequence[LayerSums]) -> None:
        self._sinks = [layer.sinks for layer in sums]
        self.weight = 1.0
        self.reached: set[int] = set()

    def outer(self, index: int, output_grad: Tensor, inputs: Tensor) -> None:
        self.reached.add(index)
        for sink in self._sinks[index]:
            sink.add_outer(output_grad, inputs, self.weight)

    def gradient(self, index: int, gradient: Tensor) -> None:
        self.reached.add(index)
        for sink in self._sinks[index]:
            sink.add_gradient(gradient, self.weight)


class _Screening:
    """Only looks whether the gradients are finite; remembers the first layer, in backward order, where they are not."""

    def __init__(self) -> None:
        self.bad: int | None = None

    def outer(self, index: int, output_grad: Tensor, inputs: Tensor) -> None:
        if self.bad is None and not (output_grad.isfinite().all() and inputs.isfinite().all()):
            self.bad = index

    def gradient(self, index: int, gradient: Tensor) -> None:
        if self.bad is None and not gradient.isfinite().all():
            self.bad = index


def run_pass(
    runner: BatchRunner,
    indices: Sequence[int],
    sums: Sequence[LayerSums],
    *,
    skip: frozenset[int],
    after_batch: Callable[[int], None],
    enough: Callable[[Totals], bool],
) -> Totals:
    """Adds this process's batches to the sums.

    Args:
        runner: the model and its batches.
        indices: the layers of this pass.
        sums: their sums, in the same order.
        skip: global numbers of batches already known to have a non-finite gradient.
        after_batch: told the global number of each batch that was used.
        enough: asked after each used batch whether to stop.

    Returns:
        The totals over all processes.

    Raises:
        CalibrationError: in every process when another process failed; the failing one raises its own error.
    """
    totals = Totals(reached=[0] * len(sums))
    failure: Exception | None = None
    receiver = _Summing(sums)
    try:
        with ExitStack() as stack:
            runner.attach(indices, receiver, stack)
            for number, batch in runner.own_batches():
                used = _add_batch(runner, number, batch, receiver, totals, skip, after_batch)
                if used and enough(totals):
                    break
    except Exception as error:  # noqa: BLE001  (re-raised below, once the other processes know)
        failure = error
    _raise_everywhere(failure)
    return totals if runner.replicate else _reduced(totals)


def _add_batch(
    runner: BatchRunner,
    number: int,
    batch: Any,
    receiver: _Summing,
    totals: Totals,
    skip: frozenset[int],
    after_batch: Callable[[int], None],
) -> bool:
    """Forward and backward of one batch; whether it was used."""
    totals.seen += 1
    if number in skip:
        return _skipped(totals, number)
    with seeded_for_batch(runner.seed, number):
        loss, weight = runner.forward(number, batch)
        value = float(loss.detach())
        if weight <= 0:  # all labels masked: the loss is the mean of nothing
            return False
        if not math.isfinite(value):
            return _skipped(totals, number)
        receiver.weight = weight if runner.token_weighted else 1.0
        receiver.reached.clear()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    totals.batches += 1
    totals.weight += weight
    totals.loss += value * receiver.weight
    for index in receiver.reached:
        totals.reached[index] += 1
    after_batch(number)
    return True


def _skipped(totals: Totals, number: int) -> bool:
    totals.skipped += 1
    totals.bad = number if totals.bad is None else totals.bad
    return False


def first_non_finite(runner: BatchRunner, only: int | None = None) -> tuple[frozenset[int], str | None]:
    """This process's batches with a non-finite loss or gradient, and the first layer where the first of them goes bad.

    Args:
        runner: the model and its batches.
        only: look at this batch alone, by global number.
    """
    bad: set[int] = set()
    culprit: str | None = None
    for number, batch in runner.own_batches():
        if only is None or number == only:
            finite, layer = _screen(runner, number, batch)
            if not finite:
                bad.add(number)
                culprit = culprit or layer
    return frozenset(bad), culprit


def _screen(runner: BatchRunner, number: int, batch: Any) -> tuple[bool, str | None]:
    forward_bad: list[str] = []
    receiver = _Screening()

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not forward_bad and not output.isfinite().all():
                forward_bad.append(name)

        return hook

    with ExitStack() as stack, seeded_for_batch(runner.seed, number):
        runner.attach(range(len(runner.layers)), receiver, stack)
        for layer in runner.layers:
            stack.callback(layer.module.register_forward_hook(look(layer.name)).remove)
        loss, weight = runner.forward(number, batch)
        if weight <= 0:
            return True, None
        finite = math.isfinite(float(loss.detach()))
        if finite and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    backward_bad = None if receiver.bad is None else runner.layers[receiver.bad].name
    return finite and backward_bad is None, forward_bad[0] if forward_bad else backward_bad


def reduce_sums(sums: LayerSums, *, replicate: bool) -> tuple[bool, bool]:
    """Adds up the sums over processes; whether they are finite, and whether they are all zero.

    Args:
        sums: one layer's sums.
        replicate: whether every process holds the whole sums already; process 0's bits then count for all.
    """
    finite, zero = True, True
    for sink in sums.sinks:
        if replicate and process_index() > 0:
            sink.total.zero_()
        all_reduce_sum(sink.total)
        low, high = (float(bound) for bound in torch.aminmax(sink.total))
        finite = finite and math.isfinite(low) and math.isfinite(high)
        zero = zero and low == high == 0.0
    return finite, zero


def _reduced(totals: Totals) -> Totals:
    numbers = [totals.seen, totals.batches, totals.skipped, totals.weight, totals.loss, *totals.reached]
    summed = all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return Totals(
        seen=int(summed[0]),
        batches=int(summed[1]),
        skipped=int(summed[2]),
        weight=summed[3],
        loss=summed[4],
        reached=[int(count) for count in summed[5:]],
        bad=totals.bad,
    )


def _raise_everywhere(failure: Exception | None) -> None:
    """Raises the failure here and a short error in the other processes, so that none waits for another for ever."""
    messages = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message is not None:
            raise CalibrationError(f"calibration failed in process {index}: {message}")
