"""Factors stay in the precision that attach gave them, whoever rounds them before training begins."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.errors import ConfigError

__all__ = ["KeptPrecision"]


class KeptPrecision:
    """Remembers trainable parameters as they are now, and puts back what was rounded since.

    TRL's SFTTrainer rounds every trainable parameter on a quantized base to bfloat16 (TRL 1.16): the adapter would lose
    its start's low bits, AdamW's moments with it, and its checkpoints would not load into float32 factors.

    Nothing is copied: rounding gives a parameter new memory, and the old one is held here until `forget`.

    Args:
        model: the attached model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        self._values = {name: p.data for name, p in model.named_parameters() if name in self._dtypes}

    def put_back(self) -> str | None:
        """Undoes rounding; a parameter that was changed after it was rounded is widened as it is.

        Returns:
            What was done, or None if nothing had been rounded.

        Raises:
            ConfigError: FSDP shards a rounded parameter, so that its values cannot be put back.
        """
        rounded = [
            (name, parameter)
            for name, parameter in self._model.named_parameters()
            if name in self._dtypes and parameter.dtype.itemsize < self._dtypes[name].itemsize
        ]
        if not rounded:
            return None
        name, first = rounded[0]
        found, wanted = _name(first.dtype), _name(self._dtypes[name])
        if any(isinstance(parameter, DTensor) for _, parameter in rounded):
            raise ConfigError(
                f"{len(rounded)} trainable parameters were rounded to {found} and sharded after attach (first: "
                f"{name!r}): checkpoints would not resume; leave them in {wanted}"
            )
        for name, parameter in rounded:
            parameter.data = self._widened(name, parameter)
        return f"{len(rounded)} trainable parameters had been rounded to {found} after attach; they train in {wanted}"

    def forget(self) -> None:
        """Lets go of the values at attach: training changes them from now on."""
        self._values = {}

    def _widened(self, name: str, parameter: nn.Parameter) -> Tensor:
        kept = self._values.get(name)
        if kept is not None:
            kept = kept.to(parameter.device)
            if kept.shape == parameter.shape and torch.equal(kept.to(parameter.dtype), parameter.data):
                return kept
        return parameter.data.to(self._dtypes[name])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
