"""Gradient statistics of the untrained base model, taken over a few batches before training.

    G_i = sum_t w_t dL_t/dW_i / sum_t w_t        (gora.md 3.1; w_t: label tokens of batch t, or 1)

What is kept of G_i is what the method asks for, in one of three memory modes: `exact` sums every target's whole
gradient in float32, `sampled` keeps exact projections and a seeded sample of rows, `low` is exact in groups of layers
and runs the batches again for each group. The model is handed back bit for bit as it was found.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.as_found import left_as_found
from rankwise.calibration.batches import BatchStore, Loss, model_loss
from rankwise.calibration.checks import check_model, check_settings, resolve_collector
from rankwise.calibration.collectors import make_inputs_differentiable
from rankwise.calibration.layer_sums import LayerSums
from rankwise.calibration.memory import groups_for, needs_full_sums, resolve_memory
from rankwise.calibration.passes import BatchRunner, Totals, first_non_finite, reduce_sums, run_pass
from rankwise.calibration.processes import broadcast_object, gather_objects
from rankwise.calibration.statistics import (
    CollectorKind,
    GradientStatistics,
    LayerStatistics,
    MemoryMode,
    StatisticsRequest,
)
from rankwise.errors import CalibrationError, ConfigError, DataError

__all__ = ["OnBatch", "collect"]

OnBatch = Callable[[int, int | None], None]
"""Told (batches done, batches in all or None if unknown); `low` counts every reading of a batch."""

MAX_SKIPPED_SHARE = 0.1


def collect(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Iterable[Any],
    request: StatisticsRequest,
    *,
    memory: MemoryMode = "auto",
    collector: CollectorKind = "auto",
    max_batches: int | None = None,
    token_weighted: bool = True,
    train_mode: bool = False,
    sample_share: float = 0.25,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    on_unused: Literal["error", "min"] = "error",
    on_zero: Literal["error", "uniform"] = "error",
    on_batch: OnBatch | None = None,
) -> GradientStatistics:
    """Takes the gradient statistics that a method asks for; the model is left bit for bit as found.

    With several processes every process passes the same global batches; process p runs batches p, p + world, ... and
    all processes return the same statistics.

    Args:
        model: the base model, not wrapped for distributed training, no adapter active.
        layers: the targets, in the model's order.
        batches: mappings of the model's arguments with labels (or whatever `loss` takes), on any device.
        request: what to keep.
        memory: `exact`, `sampled` (refused if the request needs every row), `low`, or `auto`.
        collector: `outer` (works on quantized bases), `param`, or `auto`.
        max_batches: at most so many batches are used; None for all. Fewer are fine.
        token_weighted: weigh batches by their label tokens, else all the same.
        train_mode: whether dropout is active; its draws depend only on `seed` and the batch's number.
        sample_share: the share of each layer's rows behind sampled scores, in (0, 1].
        seed: the run's seed.
        autocast_dtype: the dtype of the autocast that training will run under, None for none.
        loss: `loss(model, batch) -> (mean loss, weight)`; by default the model's own, weighted by the labels it sees.
        on_unused: what to do with a target that some batch does not reach: `error`, or `min` (the mean counts those
            batches as zero; a target that none reached has statistics without tensors).
        on_zero: what to do when every gradient is zero: `error`, or `uniform` (return the zero statistics).
        on_batch: progress.

    Returns:
        The statistics of every target, float32 on the CPU, in the order of `layers`.

    Raises:
        ConfigError: settings out of range or that exclude each other; TargetError for targets that share a weight.
        DataError: no batches, or no label in any of them.
        CalibrationError: more than 10 % of the batches are not finite, gradients that do not reach a target, all zero.

    Source: gora.md 3.1, 3.2; common.md 5, 9.
    """
    check_settings(layers, request, max_batches, sample_share)
    check_model(model, layers)
    started = time.perf_counter()
    mode, on_cpu = broadcast_object(resolve_memory(memory, layers, request))
    runner = BatchRunner(
        model=model,
        layers=layers,
        store=BatchStore(batches, max_batches),
        loss=loss or model_loss,
        collector=resolve_collector(collector, model, layers),
        token_weighted=token_weighted,
        seed=seed,
        autocast_dtype=autocast_dtype,
        replicate=request.stop is not None,
    )
    readings = 1 + len(request.follow_ups)
    task = _Collection(runner, request, mode, on_cpu, sample_share, on_unused, on_zero, on_batch, readings)
    with left_as_found(model, train_mode=train_mode) as stack, torch.enable_grad():
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            make_inputs_differentiable(model, stack)
        statistics = task.run()
        for number, follow_up in enumerate(request.follow_ups, 1):
            again = replace(task, request=_projections_only(follow_up(statistics)), reading=number, asked=0)
            statistics = statistics.updated(again.run())
    return replace(statistics, seconds=time.perf_counter() - started)


def _projections_only(request: StatisticsRequest) -> StatisticsRequest:
    if needs_full_sums(request) or request.stop is not None or request.follow_ups:
        raise ConfigError("a follow-up reading asks for more than projections; ask for the rest in the first request")
    return request


class _NonFiniteSumsError(Exception):
    """Some batch's gradient was not finite although its loss was; carries the layer's name."""


@dataclass
class _Collection:
    """One call of `collect`: its passes, and what is decided between them."""

    runner: BatchRunner
    request: StatisticsRequest
    mode: Literal["exact", "sampled", "low"]
    on_cpu: bool
    sample_share: float
    on_unused: Literal["error", "min"]
    on_zero: Literal["error", "uniform"]
    on_batch: OnBatch | None
    readings: int = 1
    """How often the batches are read in all, follow-ups included."""
    reading: int = 0
    """Which of them this is."""
    asked: int = 0
    """How many batches the stop predicate has been asked about."""

    def run(self) -> GradientStatistics:
        """The statistics; a second time without the bad batches, should some gradient not be finite."""
        try:
            return self._attempt(frozenset())
        except _NonFiniteSumsError as found:
            # Sums are only looked at when they are complete, which costs nothing while all is well.
            bad, layer = first_non_finite(self.runner)
            if not any(gather_objects(bool(bad))):
                raise CalibrationError(_overflow(str(found))) from None
            self._refuse_if_many(_screened(self.runner, bad), layer)
        try:
            return self._attempt(bad)
        except _NonFiniteSumsError as found:
            raise CalibrationError(_overflow(str(found))) from None

    def _attempt(self, skip: frozenset[int]) -> GradientStatistics:
        everything = list(range(len(self.runner.layers)))
        grouped = self.mode == "low" and needs_full_sums(self.request)
        groups = groups_for(self.runner.layers) if grouped else [everything]
        traced = grouped and self.request.stop is not None
        limit = self._traced_limit(groups, skip) if traced else None
        first = len(groups) if traced else 0
        found: dict[int, LayerStatistics] = {}
        all_zero = True
        for number, group in enumerate(groups):
            sums = self._sums(group)
            position = (self.reading + first + number, self.readings - 1 + first + len(groups))
            totals = self._pass(group, sums, skip, position, self._enough(sums, limit))
            weight = totals.weight if self.runner.token_weighted else float(totals.batches)
            for index, layer_sums, reached in zip(group, sums, totals.reached, strict=True):
                zero = self._reduced(layer_sums)
                all_zero = all_zero and zero
                found[index] = _finished(layer_sums, weight, reached)
        unused = all(layer.batches == 0 for layer in found.values())
        if unused or (all_zero and self.on_zero == "error"):
            raise CalibrationError(_ALL_ZERO)
        self._check_reached(found, totals)
        return self._statistics(found, totals, weight)

    def _sums(self, group: Sequence[int]) -> list[LayerSums]:
        mode: Literal["exact", "sampled"] = "sampled" if self.mode == "sampled" else "exact"
        return [
            LayerSums(
                self.runner.layers[index],
                self.request,
                mode,
                share=self.sample_share,
                seed=self.runner.seed,
                on_cpu=self.on_cpu,
            )
            for index in group
        ]

    def _pass(
        self,
        group: Sequence[int],
        sums: Sequence[LayerSums],
        skip: frozenset[int],
        position: tuple[int, int],
        enough: Callable[[Totals], bool],
    ) -> Totals:
        """One pass over the batches; `position` is (passes before it, passes in all), for the progress."""
        length = self.runner.store.total
        number, passes = position

        def after_batch(batch: int) -> None:
            if self.on_batch is not None:
                done = batch + 1 + (number * length if length is not None else 0)
                self.on_batch(done, None if length is None else passes * length)

        totals = run_pass(self.runner, group, sums, skip=skip, after_batch=after_batch, enough=enough)
        self._refuse_if_many(totals, None)
        if totals.seen == 0:
            raise DataError("there are no calibration batches. Give at least one batch with labels.")
        if totals.batches == 0:
            raise DataError(
                f"all labels of all {totals.seen} calibration batches are masked (-100): nothing to learn from. "
                "Check the prompt and completion columns, the truncation length and the chat template."
            )
        return totals

    def _reduced(self, sums: LayerSums) -> bool:
        finite, zero = reduce_sums(sums, replicate=self.runner.replicate)
        if not finite:
            raise _NonFiniteSumsError(sums.layer.name)
        return zero

    def _enough(self, sums: Sequence[LayerSums], limit: int | None) -> Callable[[Totals], bool]:
        """Whether the batches used so far suffice: never, at a known number, or when the request says so."""
        stop = self.request.stop
        if stop is None or limit is not None:
            return lambda totals: totals.batches == limit

        def ask(totals: Totals) -> bool:
            scores = self._running_scores(sums, totals)
            if totals.batches <= self.asked:
                return False  # a second attempt: answered already
            self.asked = totals.batches
            return stop(totals.batches, scores)

        return ask

    def _running_scores(self, sums: Sequence[LayerSums], totals: Totals) -> dict[str, Tensor]:
        weight = totals.weight if self.runner.token_weighted else float(totals.batches)
        for layer_sums in sums:
            if not all(bool(sink.total.isfinite().all()) for sink in layer_sums.sinks):
                raise _NonFiniteSumsError(layer_sums.layer.name)
        return {layer_sums.layer.name: layer_sums.scores(weight) for layer_sums in sums}

    def _traced_limit(self, groups: Sequence[Sequence[int]], skip: frozenset[int]) -> int:
        """How many batches adaptive N uses under `low`, where no group sees every layer.

        Each group's running scores are written down first; the request is asked when all layers are there.
        """
        stop = self.request.stop
        assert stop is not None
        traces: list[dict[str, Tensor]] = []
        for number, group in enumerate(groups):
            sums = self._sums(group)

            def note(totals: Totals, sums: Sequence[LayerSums] = sums) -> bool:
                if len(traces) < totals.batches:
                    traces.append({})
                traces[totals.batches - 1].update(self._running_scores(sums, totals))
                return False

            self._pass(group, sums, skip, (number, 2 * len(groups)), note)
        return next((count for count, scores in enumerate(traces, 1) if stop(count, scores)), len(traces))

    def _refuse_if_many(self, totals: Totals, layer: str | None) -> None:
        considered = totals.batches + totals.skipped
        if totals.skipped <= MAX_SKIPPED_SHARE * considered:
            return
        if layer is None and totals.bad is not None:
            layer = first_non_finite(self.runner, only=totals.bad)[1]
        named = [name for name in gather_objects(layer) if name is not None]
        where = f"the first bad layer is {named[0]}" if named else "every target's values are finite, the loss is not"
        raise CalibrationError(
            f"{totals.skipped} of {considered} calibration batches have a loss or gradient that is not finite "
            f"(at most {MAX_SKIPPED_SHARE:.0%} may be skipped); {where}. Check the data and the base weights, or "
            "calibrate in a wider dtype (bfloat16 or float32 instead of float16)."
        )

    def _check_reached(self, found: Mapping[int, LayerStatistics], totals: Totals) -> None:
        missed = [found[index] for index in sorted(found) if found[index].batches < totals.batches]
        if missed and self.on_unused == "error":
            first = missed[0]
            others = f" (and {len(missed) - 1} more targets like it)" if len(missed) > 1 else ""
            raise CalibrationError(
                f"{first.shape.name}: only {first.batches} of {totals.batches} calibration batches reached it with a "
                f"gradient{others}. A target must take part in the loss of every batch: exclude the layer, or allow it "
                "with on_unused='min'."
            )

    def _statistics(self, found: Mapping[int, LayerStatistics], totals: Totals, weight: float) -> GradientStatistics:
        return GradientStatistics(
            layers={found[index].shape.name: found[index] for index in sorted(found)},
            batches=totals.batches,
            skipped=totals.skipped,
            tokens=totals.weight,
            loss=totals.loss / weight,
            memory=self.mode,
            collector=self.runner.collector,
            row_share=self.sample_share if self.mode == "sampled" and self.request.score is not None else 1.0,
        )


_ALL_ZERO = (
    "no gradient reached any target: every gradient is zero. Likely causes: all labels are masked, the loss is "
    "detached from the targets, or reentrant gradient checkpointing without input gradients "
    "(call model.enable_input_require_grads())."
)


def _overflow(layer: str) -> str:
    return (
        f"{layer}: the sum of the gradients over the batches overflows float32 although each batch is finite. "
        "Calibrate on a loss of ordinary size (the mean over label tokens)."
    )


def _finished(sums: LayerSums, weight: float, reached: int) -> LayerStatistics:
    return LayerStatistics(shape=sums.layer.shape, batches=0) if reached == 0 else sums.finish(weight, reached)


def _screened(runner: BatchRunner, bad: frozenset[int]) -> Totals:
    """Totals as the >10 % rule wants them, after a screening of every batch."""
    count = sum(1 for _ in runner.store)
    every: set[int] = set().union(*gather_objects(bad))
    return Totals(reached=[], batches=count - len(every), skipped=len(every), bad=min(bad, default=None))
