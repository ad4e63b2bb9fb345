"""What a schedule adds to the plain factors of a layer, in a form that export can fold without knowing the method."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.checkpoint import read_safetensors, write_safetensors
from rankwise.errors import ArtifactError

__all__ = ["STATE_FILE", "FactorPair", "FoldState"]

STATE_FILE = "rankwise_state.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class FactorPair:
    """A frozen pair beside the live one: lora_A [k, in] and lora_B [out, k], scaled like the layer's own."""

    lora_A: Float[Tensor, "k in"]  # noqa: N815
    lora_B: Float[Tensor, "out k"]  # noqa: N815

    def __post_init__(self) -> None:
        if self.lora_A.dim() != 2 or self.lora_B.dim() != 2 or self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise ArtifactError(
                f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)} are no pair: they must be "
                "[k, in] and [out, k] with one k"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldState:
    """The method-neutral state of all layers; all three are empty for GoRA, RoRA and plain LoRA.

    Args:
        gates: by layer, the effective gate g [rank]: the update is scaling * lora_B @ diag(g) @ lora_A.
        offsets: by layer, the pair whose update is subtracted (LoRA-GA's start).
        boosters: by layer, the folded pair whose update is added (XGBLoRA's earlier rounds).
    """

    gates: Mapping[str, Float[Tensor, " rank"]] = field(default_factory=dict)
    offsets: Mapping[str, FactorPair] = field(default_factory=dict)
    boosters: Mapping[str, FactorPair] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to fold."""
        return bool(self.gates or self.offsets or self.boosters)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in the file: `gate.<layer>`, `offset.<layer>.A`, `booster.<layer>.B`."""
        found = {f"gate.{name}": gate for name, gate in self.gates.items()}
        for kind, pairs in (("offset", self.offsets), ("booster", self.boosters)):
            for name, pair in pairs.items():
                found |= {f"{kind}.{name}.A": pair.lora_A, f"{kind}.{name}.B": pair.lora_B}
        return found

    def save(self, path: str | os.PathLike[str], method: Mapping[str, Tensor] | None = None) -> None:
        """Writes the state, and the method's own tensors under `method.`; the file is never seen half-written."""
        tensors = self.tensors() | {f"method.{name}": tensor for name, tensor in (method or {}).items()}
        target = Path(path)
        staged = target.with_name(f".{target.name}.{os.getpid()}.part")
        write_safetensors(staged, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        staged.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The state in a file, on the CPU; the method's own tensors are left out.

        Raises:
            ArtifactError: no such file, damage, or a tensor that does not belong there.
        """
        gates: dict[str, Tensor] = {}
        halves: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in read_safetensors(path).items():
            kind, _, rest = key.partition(".")
            name, _, side = rest.rpartition(".")
            if kind == "gate" and rest and tensor.dim() == 1:
                gates[rest] = tensor
            elif kind in ("offset", "booster") and side in ("A", "B") and name:
                halves.setdefault((kind, name), {})[side] = tensor
            elif kind != "method":
                raise ArtifactError(
                    f"{path}: the tensor {key!r} {tuple(tensor.shape)} has no place in a state file, which holds "
                    "gate.<layer> [rank], offset.<layer>.A and .B, booster.<layer>.A and .B: take another checkpoint's"
                )
        pairs: dict[str, dict[str, FactorPair]] = {"offset": {}, "booster": {}}
        for (kind, name), sides in halves.items():
            if len(sides) < 2:
                missing = "B" if "A" in sides else "A"
                raise ArtifactError(f"{path}: {kind}.{name}.{missing} is missing: take another checkpoint's file")
            pairs[kind][name] = FactorPair(sides["A"].to(torch.float32), sides["B"].to(torch.float32))
        return cls(gates=gates, offsets=pairs["offset"], boosters=pairs["booster"])
