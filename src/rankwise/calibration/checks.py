"""What `collect` refuses before it runs anything, and which collector it takes."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.adapters.refusals import wrapper_in
from rankwise.calibration.collectors import WeightUses
from rankwise.calibration.statistics import CollectorKind, StatisticsRequest
from rankwise.errors import CalibrationError, ConfigError, TargetError

__all__ = ["check_model", "check_settings", "resolve_collector"]


def resolve_collector(
    collector: CollectorKind, model: nn.Module, layers: Sequence[LinearLayer]
) -> Literal["outer", "param"]:
    """`outer` wherever it sees the whole gradient, else `param`; quantized weights have `outer` only."""
    quantized = next((layer.name for layer in layers if layer.quantized), None)
    if collector == "param" and quantized is not None:
        raise ConfigError(
            f"{quantized} holds a quantized weight, which has no gradient of its own: collector 'param' cannot see it. "
            "Use collector 'outer' or 'auto'."
        )
    if collector != "auto":
        return collector
    uses = WeightUses(model)
    return "outer" if all(uses.only_linear(layer) for layer in layers) else "param"


def check_settings(
    layers: Sequence[LinearLayer], request: StatisticsRequest, max_batches: int | None, sample_share: float
) -> None:
    """Refuses settings out of range, all of them in one ConfigError."""
    faults = []
    if not layers:
        faults.append("calibration needs at least one target layer")
    if max_batches is not None and max_batches < 1:
        faults.append(f"calibration batches: {max_batches} is not allowed; use at least 1")
    if not 0.0 < sample_share <= 1.0:
        faults.append(f"calibration sample_share: {sample_share} is not allowed; use a share in (0, 1]")
    if request.stop is not None and request.score is None:
        faults.append("a stop predicate (adaptive N) judges scores, but the request asks for none; add a score")
    if request.follow_ups and (request.gradient or request.score is not None):
        faults.append("follow-up readings are for projections, but the request asks for the gradient or a score")
    if faults:
        raise ConfigError(faults)


def check_model(model: nn.Module, layers: Sequence[LinearLayer]) -> None:
    """Refuses wrapped models, and targets that are out of memory, sharded, or share one weight."""
    wrapper = wrapper_in(model)
    if wrapper is not None:
        name, kind, inside = wrapper
        where, path = (f"the model's {name!r}", f"model.{name}") if name else ("the model", "model")
        raise CalibrationError(
            f"{where} is wrapped in {kind}, where hooks do not see every gradient. "
            f"Calibrate the module inside ({path}.{inside}) before wrapping it."
        )
    owners: dict[int, str] = {}
    for layer in layers:
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise CalibrationError(
                f"{layer.name}: its weight is on the meta device (disk offload?), so it has no gradient. "
                "Load the model onto a CPU or an accelerator."
            )
        if type(weight).__name__ == "DTensor":
            raise CalibrationError(
                f"{layer.name}: its weight is sharded (DTensor). Calibrate before fully_shard, on the whole model."
            )
        other = owners.setdefault(weight.data_ptr() or id(weight), layer.name)
        if other != layer.name:
            raise TargetError(
                f"{layer.name} and {other} share one weight, and two adapters on one weight would be counted twice. "
                "Keep one of them in target_modules."
            )
