"""An accelerator that is not there: fake tensors on `cuda` without its driver; what waits for it is counted."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_CASTS = {
    "double": torch.float64,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
    "bool": torch.bool,
}


class WaitingCopies(TorchDispatchMode):
    """Counts copies from the host to a device that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        result = func(*args, **given)
        if "_to_copy" in str(func) and args[0].device.type == "cpu" and result.device.type == "cuda":
            self.found += [] if given.get("non_blocking") else [str(func)]
        return result


class FakeAccelerator(TorchFunctionMode):
    """Does by plain operators what torch's Python binding would ask a driver for; numbers that are read are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.__getitem__:
            return _item(*args)
        if func is torch.Tensor.__setitem__:
            return torch.ops.aten.copy_(_item(args[0], args[1]), args[2])
        if name == "copy_":
            return torch.ops.aten.copy_(args[0], args[1])
        if name in _CASTS:
            return torch.ops.aten._to_copy(args[0], dtype=_CASTS[name])
        if name == "__invert__":
            return torch.bitwise_not(args[0])
        if name == "tensor" and "device" in (kwargs or {}):
            given = dict(kwargs)
            return func(*args, **{k: v for k, v in given.items() if k != "device"}).to(given["device"])
        if name == "pin_memory":
            return args[0]
        on_device = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        if on_device and name in ("tolist", "__float__", "__bool__", "item"):
            self.reads.append(name)
            one = 1.0 if args[0].is_floating_point() else True
            return [one] * args[0].numel() if name == "tolist" else one
        return func(*args, **(kwargs or {}))


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    index = index if isinstance(index, tuple) else (index,)
    taken = sum(one is not None and one is not Ellipsis for one in index)
    place = 0
    for one in index:
        if one is None:
            tensor = tensor.unsqueeze(place)
            place += 1
        elif one is Ellipsis:
            place += tensor.ndim - taken
        elif isinstance(one, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, place, *one.indices(tensor.shape[place]))
            place += 1
        elif isinstance(one, int):
            tensor = tensor.select(place, one)
        else:
            tensor = torch.index_select(tensor, place, one)
            place += 1
    return tensor
