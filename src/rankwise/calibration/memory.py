"""How much may be kept at once: the memory mode, where sums live, and the groups of `low`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.processes import world_size
from rankwise.calibration.statistics import MemoryMode, StatisticsRequest
from rankwise.errors import ConfigError

__all__ = ["free_memory", "groups_for", "needs_full_sums", "resolve_memory"]

GROUP_SHARE = 0.25
"""The share of all targets whose sums one group of `low` holds at a time."""


def resolve_memory(
    memory: MemoryMode, layers: Sequence[LinearLayer], request: StatisticsRequest
) -> tuple[Literal["exact", "sampled", "low"], bool]:
    """The mode to use, and whether full sums must live on the CPU.

    `auto` is `exact` when one float32 copy of the targets fits in a third of the free memory (of the device, else of
    the host), else `sampled` where the request allows it, else `low`.

    Args:
        memory: what was asked for.
        layers: the targets.
        request: what the statistics must hold.

    Returns:
        The mode, and True if the sums go to the CPU although the layers are elsewhere.

    Raises:
        ConfigError: `sampled` for a request that needs every row.
    """
    refusal = _why_not_sampled(request)
    if memory == "sampled" and refusal:
        raise ConfigError(f"memory 'sampled' {refusal}. Use memory 'exact' or 'low'.")
    if memory != "auto":
        return memory, False
    if not needs_full_sums(request):
        return "exact", False
    needed: dict[torch.device, int] = {}
    for layer in layers:
        needed[layer.device] = needed.get(layer.device, 0) + _bytes(layer)
    if all(size <= free_memory(device) / 3 for device, size in needed.items()):
        return "exact", False
    if sum(needed.values()) <= free_memory(torch.device("cpu")) / 3:
        return "exact", True
    return ("low" if refusal else "sampled"), False


def needs_full_sums(request: StatisticsRequest) -> bool:
    """Whether the request needs whole gradients, or samples of them; projections alone never do."""
    return request.gradient or request.score is not None


def groups_for(layers: Sequence[LinearLayer]) -> list[list[int]]:
    """Consecutive layers (by position) whose full float32 sums are kept at the same time under `low`."""
    total = sum(map(_bytes, layers))
    limit = min(total * GROUP_SHARE, min(free_memory(device) for device in {layer.device for layer in layers}) / 3)
    groups: list[list[int]] = []
    size = 0.0
    for index, layer in enumerate(layers):
        if not groups or size + _bytes(layer) > limit:
            groups.append([])
            size = 0.0
        groups[-1].append(index)
        size += _bytes(layer)
    return groups


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`: the host's are shared by the processes on it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 0  # unknown: sums go to the host, which can say
    return min(_system_free(), _container_free()) // _local_processes()


def _why_not_sampled(request: StatisticsRequest) -> str | None:
    if request.gradient:
        return "cannot keep the whole gradient that the method asks for"
    if request.score is not None and not request.score_is_row_mean:
        return "cannot estimate the method's importance, which is not a mean over rows"
    return None


def _bytes(layer: LinearLayer) -> int:
    return layer.shape.out_features * layer.shape.in_features * 4


def _local_processes() -> int:
    """Processes of the group on this machine; launchers say it, without their word all are taken to be here."""
    return world_size() if world_size() == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def _system_free() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_free() -> int:
    """What a control group still allows (containers see the whole machine in /proc/meminfo)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        return 2**62 if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return 2**62
