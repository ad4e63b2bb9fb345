"""One small batch of a run, kept so that export can compare logits without being given one."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Sample"]

TOKENS: Final = 128
"""The tokens that are kept of the first row: enough to pass through every layer, cheap in the largest vocabulary."""


class Sample:
    """The first row that the model is called with; the hook that catches it removes itself.

    Args:
        model: the attached model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.batch: dict[str, Any] | None = None
        """Keyword arguments of the model's forward, on the CPU; None until a forward pass has had some."""
        self._model = model
        self._handle: RemovableHandle | None = None

    def listen(self) -> None:
        """Waits for the next forward pass, if nothing is kept yet."""
        if self.batch is None and self._handle is None:
            self._handle = self._model.register_forward_hook(self._seen, with_kwargs=True)

    def close(self) -> None:
        """Takes the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _seen(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
        self.close()
        if not args and _has_logits(output):
            encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
            self.batch = _first_row(inputs) if encoder_decoder else (_first_tokens(inputs) or _first_row(inputs))


def _has_logits(output: Any) -> bool:
    names = [field.name for field in fields(output)] if is_dataclass(output) else []
    return "logits" in names or "last_hidden_state" in names or isinstance(output, Tensor)


def _first_tokens(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first row's tokens without padding: then it needs no mask. None if there are none."""
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or any(_is_picture(v) for v in inputs.values()):
        return None
    row = tokens[0].detach().cpu()
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        row = row[mask[0].detach().cpu().bool()]
    return {"input_ids": row[:TOKENS].unsqueeze(0).clone()} if len(row) else None


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point()


def _first_row(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first row of everything that has rows; None where rows cannot be told."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if len({len(value) for value in tensors.values()}) != 1:
        return None
    return {name: value[:1].detach().cpu().clone() for name, value in tensors.items()}
