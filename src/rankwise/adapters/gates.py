"""Gates on the ranks of adapted layers: what lora_A puts out is multiplied by one number a rank.

With a gate g [rank] a layer computes W x + scaling * lora_B (g * lora_A x): masks (AB-LoRA), learned gates (SoRA),
learned scores (BeamLoRA) and the rounds of boosters (XGBLoRA) are gates. The gate stands outside the saved adapter, in
one container module on the model, and acts through one forward hook a layer: shapes never change, nothing is compiled
again, and a distributed wrapper around the model sees what is trained.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.attach import AdaptedLayer, peft_model_of
from rankwise.adapters.state import FoldState
from rankwise.adapters.unfolded import Unfolded
from rankwise.errors import ModelError

__all__ = ["CONTAINER", "RankGates", "live_gates"]

CONTAINER = "rankwise_state"
"""The name of the container on the model; without `lora_`, or PEFT would save it with the adapter."""

Activation = Callable[[Tensor], Tensor]


def live_gates(model: nn.Module) -> "RankGates | None":
    """The gates that stand on a model's ranks, None if there are none."""
    found = getattr(model, CONTAINER, None)
    return found if isinstance(found, RankGates) else None


class RankGates(nn.Module):
    """The gates of a model's layers, float32, on the layers' devices.

    Args:
        model: the attached model, which gets the container as a child.
        layers: the gated layers by full name.
        start: by name, what is stored [rank]: the gate itself, or what `activation` turns into it.
        trainable: whether the stored values are parameters; else they are buffers, which nobody's optimizer moves.
        activation: the gate from the stored values; None where they are the gate.
        beside: all that stands beside the factors, for a plain `save_pretrained`; by default the gates.

    Raises:
        ModelError: the model has a container already, or a start does not fit its layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLayer],
        start: Mapping[str, Float[Tensor, " rank"]],
        *,
        trainable: bool = False,
        activation: Activation | None = None,
        beside: Callable[[], FoldState] | None = None,
    ) -> None:
        super().__init__()
        if hasattr(model, CONTAINER):
            raise ModelError(
                f"the model carries gates already ({CONTAINER}): close the session that put them there first"
            )
        self.names = tuple(layers)
        self._layers = dict(layers)
        self._owner = [model]  # in a list, or the model would become a child of its child
        self._activation = activation
        self._sampled: Mapping[str, Tensor] | None = None
        for index, (name, layer) in enumerate(layers.items()):
            value = start[name].detach().to(layer.lora_A.device, torch.float32, copy=True)
            if value.shape != (layer.rank,):
                raise ModelError(f"{name}: a gate of shape {tuple(value.shape)} on a layer of rank {layer.rank}")
            if trainable:
                self.register_parameter(f"gate_{index}", nn.Parameter(value))
            else:
                self.register_buffer(f"gate_{index}", value)
        self._places = {name: f"gate_{index}" for index, name in enumerate(self.names)}
        self._handles = [
            layer.module.lora_A[layer.adapter_name].register_forward_hook(self._hook(name))
            for name, layer in layers.items()
        ]
        model.add_module(CONTAINER, self)
        adapter_name = next((layer.adapter_name for layer in layers.values()), "default")
        self._shadows = [
            Unfolded(
                peft_model_of(model),
                layers.values(),
                adapter_name,
                beside or (lambda: FoldState(gates=self.effective())),
                "gates on its ranks",
                owner=self,
            )
        ]

    def value(self, name: str) -> Tensor:
        """What is stored for a layer [rank], live: the trained parameter, or the buffer."""
        found: Tensor = getattr(self, self._places[name])
        return found

    def trained(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """By layer, what is stored, where it is a parameter that is trained."""
        found = {name: self.value(name) for name in self.names}
        return {n: (v,) for n, v in found.items() if isinstance(v, nn.Parameter) and v.requires_grad}

    def gate(self, name: str) -> Float[Tensor, " rank"]:
        """The gate of a layer, with its gradient."""
        value = self.value(name)
        return value if self._activation is None else self._activation(value)

    def effective(self) -> dict[str, Float[Tensor, " rank"]]:
        """The gates by layer, as export folds them: float32 on the CPU, detached."""
        return {name: self.gate(name).detach().to("cpu", torch.float32, copy=True) for name in self.names}

    @torch.no_grad()
    def write(self, name: str, value: Float[Tensor, " rank"]) -> None:
        """Stores new values for a layer, in place."""
        self.value(name).copy_(value)

    @contextmanager
    def sampled(self, gates: Mapping[str, Float[Tensor, "samples 1 rank"]]) -> Iterator[None]:
        """Other gates inside, one for each sample of a batch: [samples, 1, rank], or [rank] for all alike.

        Layers that are not named keep theirs. Not for compiled modules: the shapes change.
        """
        before, self._sampled = self._sampled, gates
        try:
            yield
        finally:
            self._sampled = before

    def close(self) -> None:
        """Takes hooks and container off the model; called any number of times."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._shadows:
            self._shadows.pop().close()
        model = self._owner[0]
        if getattr(model, CONTAINER, None) is self:
            delattr(model, CONTAINER)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            sampled = self._sampled
            gate = self.gate(name) if sampled is None or name not in sampled else sampled[name]
            return output * gate.to(output.dtype)

        return multiply
