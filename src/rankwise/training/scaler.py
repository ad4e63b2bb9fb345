"""Gradients under a loss scaler, as a schedule reads them: in their own unit, however the loop clips."""

from typing import Any

from torch.optim import Optimizer

__all__ = ["take_out_scale"]


def take_out_scale(scaler: Any, optimizer: Optimizer | None) -> None:
    """Divides the optimizer's gradients by the scale, unless clipping already did.

    Args:
        scaler: torch's GradScaler, or None where the loss is not scaled.
        optimizer: the optimizer itself, no wrapper.
    """
    if scaler is None or optimizer is None or not scaler.is_enabled():
        return
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:  # torch 2.13 keeps what was unscaled to itself, and says it this way only
        if "already been called" not in str(error):
            raise
