"""While something stands beside the factors of a live model, PEFT neither merges nor saves the factors alone."""

import inspect
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import ExportError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Unfolded"]

_MERGES = ("merge_adapter", "merge_and_unload", "unload")


class Unfolded:
    """Shadows PEFT's methods that would compute or store s B A alone, until `close`.

    Merging and unloading raise. `save_pretrained` writes the state file first, so that no whole adapter lacks it.

    Args:
        model: the attached model.
        layers: its adapted layers.
        adapter_name: the adapter.
        state: what stands beside the factors now.
        what: what it is, in the user's words ("an offset (lora-ga)").
        owner: whoever put it there.
    """

    def __init__(
        self,
        model: "PeftModel",
        layers: Iterable[AdaptedLayer],
        adapter_name: str,
        state: Callable[[], FoldState],
        what: str,
        owner: object = None,
    ) -> None:
        self.owner = owner
        self._model, self._adapter_name, self._state, self._what = model, adapter_name, state, what
        tuner: Any = model.base_model
        shadows: list[tuple[nn.Module, str, Callable[..., Any]]] = [(tuner, name, self._refuse) for name in _MERGES]
        modules: list[Any] = [layer.module for layer in layers]
        shadows += [(module, "merge", self._refuse) for module in modules]
        shadows.append((model, "save_pretrained", self._save))
        self._places = [(module, name) for module, name, _ in shadows]
        for module, name, shadow in shadows:
            module.__dict__[name] = shadow

    def close(self) -> None:
        """Gives PEFT its methods back; called any number of times."""
        for module, name in self._places:
            module.__dict__.pop(name, None)
        self._places = []

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise ExportError(
            f"this adapter is trained beside {self._what}: merged or unloaded as it stands it would compute something "
            "else. Save a checkpoint and run `rankwise export` (or session.export), which folds everything into the "
            "factors; its layout merged writes full weights."
        )

    def _save(self, save_directory: str | PathLike[str], *positional: Any, **named: Any) -> Any:
        """PEFT's own, with the state beside the factors."""
        original: Any = type(self._model).save_pretrained
        given = inspect.signature(original).bind(self._model, str(save_directory), *positional, **named)
        if given.arguments.get("path_initial_model_for_weight_conversion") is not None:
            raise ExportError(
                f"path_initial_model_for_weight_conversion: PEFT's conversion does not know {self._what}, which lies "
                f"in {STATE_FILE}: save without it, and run `rankwise export` on the folder"
            )
        selected = given.arguments.get("selected_adapters")
        saved = selected is None or self._adapter_name in selected
        state = self._state()
        if state and saved and given.arguments.get("is_main_process", True):
            folder = Path(save_directory)  # PEFT puts every other adapter into a folder of its name
            folder = folder if self._adapter_name == "default" else folder / self._adapter_name
            folder.mkdir(parents=True, exist_ok=True)
            state.save(folder / STATE_FILE)
        return original(*given.args, **given.kwargs)
