"""What a method may measure on the attached, untrained model: the loss of a few batches for given lora_B."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.attach import AdaptedLayer, adapter_disabled
from rankwise.calibration.as_found import random_states_restored
from rankwise.calibration.batches import Loss, batch_to, model_loss
from rankwise.calibration.processes import all_reduce_sum, process_index, world_size
from rankwise.errors import CalibrationError

__all__ = ["EVALUATION_BATCHES", "TrialLoss", "reread"]

EVALUATION_BATCHES = 4
"""Batches that a trial averages over: enough to tell candidates apart, cheap beside 64 batches of gradients."""


class TrialLoss:
    """The weighted mean loss over evaluation batches, equal in every process; an `Evaluator`.

    Args:
        model: the attached model; its parameters' values and mode are put back by `restored`.
        layers: the adapted layers by name.
        batches: global batches, the same in every process; each process runs its share.
        loss: given model and batch, the mean loss and its weight.
        autocast_dtype: run under autocast in this dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLayer],
        batches: Sequence[Any],
        *,
        loss: Loss | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if not batches:
            raise CalibrationError("no calibration batch is there to evaluate a candidate on: give at least one batch")
        self._model = model
        self._layers = layers
        self._batches = batches[process_index() :: world_size()]
        self._loss = loss or model_loss
        self._autocast_dtype = autocast_dtype
        self._device = next(iter(layers.values())).lora_B.device
        self.evaluations = 0

    def __call__(self, lora_B: Mapping[str, Float[Tensor, "out rank"]] | None) -> float:
        """The loss with these lora_B values; None: with the adapter off."""
        self.evaluations += 1
        modes = [(module, module.training) for module in self._model.modules()]
        saved = {name: layer.lora_B.detach().clone() for name, layer in self._layers.items()}
        self._model.eval()
        try:
            with torch.no_grad(), random_states_restored(), self._switched(lora_B):
                return self._mean_loss()
        finally:
            for name, layer in self._layers.items():
                layer.lora_B.data.copy_(saved[name])
            for module, training in modes:
                module.training = training

    def _switched(self, lora_B: Mapping[str, Float[Tensor, "out rank"]] | None) -> AbstractContextManager[None]:
        if lora_B is None:
            return adapter_disabled(self._model)
        for name, value in lora_B.items():
            self._layers[name].lora_B.data.copy_(value)
        return nullcontext()

    def _mean_loss(self) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        context: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self._autocast_dtype is not None:
            dtype = self._autocast_dtype
            context = lambda: torch.autocast(self._device.type, dtype=dtype)  # noqa: E731
        for batch in self._batches:
            with context():
                loss, weight = self._loss(self._model, batch_to(batch, self._device))
            if weight:
                sums += torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
        total, weight = all_reduce_sum(sums).tolist()
        if not weight:
            raise CalibrationError("every label of the evaluation batches is masked: candidates cannot be compared")
        return float(total / weight)


def reread(batches: Iterable[Any], used: int | None) -> list[Any]:
    """Up to EVALUATION_BATCHES batches behind the first `used` ones, or, where there are none, the last of those.

    Args:
        batches: a sequence; it is read again from its beginning.
        used: how many batches gave the gradients; None for all.

    Returns:
        The batches.
    """
    if used is not None:
        fresh = list(islice(iter(batches), used, used + EVALUATION_BATCHES))
        if fresh:
            return fresh
    return list(batches)[-EVALUATION_BATCHES:]
