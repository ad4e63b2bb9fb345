"""rankwise spends a LoRA budget where it pays: published low-rank methods behind one interface, one plain adapter out.

Example:
    >>> import rankwise as rw
    >>> rw.GoRA(gamma=0.05).id
    'gora'
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.errors import RankwiseError as RankwiseError
    from rankwise.errors import TrainingInterrupted as TrainingInterrupted
    from rankwise.export.audit import check_folder as check_folder
    from rankwise.export.write import export_adapter as export_adapter
    from rankwise.methods.ab_lora import ABLoRA as ABLoRA
    from rankwise.methods.beamlora import BeamLoRA as BeamLoRA
    from rankwise.methods.ggpo import GGPO as GGPO
    from rankwise.methods.ggpo import MGPO as MGPO
    from rankwise.methods.gora import GoRA as GoRA
    from rankwise.methods.lora import LoRA as LoRA
    from rankwise.methods.lora_ga import LoRAGA as LoRAGA
    from rankwise.methods.lora_pro import LoRAPro as LoRAPro
    from rankwise.methods.lora_pro import LoRAProOptimizer as LoRAProOptimizer
    from rankwise.methods.lora_rite import LoRARITE as LoRARITE
    from rankwise.methods.lora_rite import LoRARITEOptimizer as LoRARITEOptimizer
    from rankwise.methods.recipe import Recipe as Recipe
    from rankwise.methods.rora import RoRA as RoRA
    from rankwise.methods.sora import SoRA as SoRA
    from rankwise.methods.xgblora import XGBLoRA as XGBLoRA
    from rankwise.ranks.plan import LayerPlan as LayerPlan
    from rankwise.ranks.plan import RankPlan as RankPlan
    from rankwise.ranks.shapes import ScalingRule as ScalingRule
    from rankwise.training.attach import attach as attach
    from rankwise.training.attach import plan as plan
    from rankwise.training.calibrating import Calibration as Calibration
    from rankwise.training.session import Session as Session
    from rankwise.training.signals import StopRequest as StopRequest
    from rankwise.training.state import last_complete_checkpoint as last_complete_checkpoint
    from rankwise.training.state import resume as resume

_HOMES = {
    "ABLoRA": "methods.ab_lora",
    "BeamLoRA": "methods.beamlora",
    "Calibration": "training.calibrating",
    "GGPO": "methods.ggpo",
    "GoRA": "methods.gora",
    "LayerPlan": "ranks.plan",
    "LoRA": "methods.lora",
    "LoRAGA": "methods.lora_ga",
    "LoRAPro": "methods.lora_pro",
    "LoRAProOptimizer": "methods.lora_pro",
    "LoRARITE": "methods.lora_rite",
    "LoRARITEOptimizer": "methods.lora_rite",
    "MGPO": "methods.ggpo",
    "RankPlan": "ranks.plan",
    "RankwiseError": "errors",
    "Recipe": "methods.recipe",
    "RoRA": "methods.rora",
    "ScalingRule": "ranks.shapes",
    "Session": "training.session",
    "SoRA": "methods.sora",
    "StopRequest": "training.signals",
    "TrainingInterrupted": "errors",
    "XGBLoRA": "methods.xgblora",
    "attach": "training.attach",
    "check_folder": "export.audit",
    "export_adapter": "export.write",
    "last_complete_checkpoint": "training.state",
    "plan": "training.attach",
    "resume": "training.state",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Loads what is asked for on first use: importing rankwise imports nothing heavy."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rankwise")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
