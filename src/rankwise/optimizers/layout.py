"""Where each pair is while an optimizer lives: stacks, chunks, state as views of both, and what a step finds there."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankwise.optimizers.pairs import Pair
from rankwise.optimizers.rule import SIDES, JointRule, Side, StepRule
from rankwise.optimizers.stacks import Chunk, Stack, build_stacks

__all__ = ["Layout", "Present", "build_layout"]


@dataclass(slots=True, eq=False)
class Layout:
    """Stacks and chunks, and where each pair's halves are in them."""

    pairs: list[Pair]
    stacks: list[Stack]
    chunks: list[Chunk]
    chunk_of: dict[tuple[int, Side], tuple[Chunk, int]]
    lengths: list[dict[Side, Tensor]]
    dense: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    dtypes: list[torch.dtype] = field(init=False)
    devices: list[torch.device] = field(init=False)

    def __post_init__(self) -> None:
        halves = [half for pair in self.pairs for half in (pair.lora_A, pair.lora_B)]
        self.dtypes, self.devices = [half.dtype for half in halves], [half.device for half in halves]


class Present:
    """Which factors have a gradient in this step, and which were edited since the last; the host knows both."""

    def __init__(self, layout: Layout, versions: Mapping[int, int]) -> None:
        self._versions = versions
        self._has: dict[tuple[int, Side], bool] = {}
        for number, pair in enumerate(layout.pairs):
            self._has[number, "A"] = pair.lora_A.requires_grad and pair.lora_A.grad is not None
            self._has[number, "B"] = pair.lora_B.requires_grad and pair.lora_B.grad is not None
        self.any = any(self._has.values())
        self._all = all(self._has.values())

    def skipped(self, chunk: Chunk, layout: Layout) -> list[bool] | None:
        """The factors of a chunk whose gradient is not looked at; None if there are none."""
        if self._all:
            return None
        pairs = layout.stacks[chunk.stack].pairs
        return [not self._has[pairs[slot], chunk.side] for slot in chunk.slots]

    def moves(self, stack: Stack, side: Side) -> Tensor:
        """Whether each factor of a stack has a gradient."""
        if self._all:
            return torch.ones(len(stack.pairs), dtype=torch.bool, device=stack.ranks.device)
        return torch.tensor([self._has[number, side] for number in stack.pairs], device=stack.ranks.device)

    def of_pair(self, number: int) -> bool:
        """Whether a factor of the pair has a gradient."""
        return self._has[number, "A"] or self._has[number, "B"]

    def edited(self, layout: Layout, stack: Stack, side: Side) -> list[bool] | None:
        """Which factors of a stack something else wrote to since they were last stepped; None if nothing did.

        The version counter tells, which a write through `.data` does not move.
        """
        pairs = [layout.pairs[number] for number in stack.pairs]
        factors = [pair.lora_A if side == "A" else pair.lora_B for pair in pairs]
        found = [factor._version != self._versions.get(id(factor), factor._version) for factor in factors]
        return found if any(found) else None


def build_layout(pairs: list[Pair], rule: StepRule, state: MutableMapping[Tensor, Any]) -> Layout:
    """Stacks and chunks for all pairs; what `state` holds of a factor is copied in and replaced by views of them.

    Args:
        pairs: in the optimizer's order.
        rule: whose state they hold.
        state: the optimizer's state by parameter.
    """
    stacks, chunks = build_stacks(pairs, rule.square_state, rule.number_state, rule.tall_state)
    chunk_of: dict[tuple[int, Side], tuple[Chunk, int]] = {}
    for chunk in chunks:
        for row, slot in enumerate(chunk.slots):
            chunk_of[stacks[chunk.stack].pairs[slot], chunk.side] = (chunk, row)
    layout = Layout(pairs, stacks, chunks, chunk_of, [_lengths(stack, pairs) for stack in stacks])
    for stack in stacks:
        for slot, number in enumerate(stack.pairs):
            for side in SIDES:
                _bind(layout, stack, slot, number, side, rule, state)
    return layout


def _bind(
    layout: Layout,
    stack: Stack,
    slot: int,
    number: int,
    side: Side,
    rule: StepRule,
    state: MutableMapping[Tensor, Any],
) -> None:
    pair = layout.pairs[number]
    parameter = pair.lora_A if side == "A" else pair.lora_B
    chunk, row = layout.chunk_of[number, side]
    r = pair.rank
    views: dict[str, Tensor] = {"step": stack.steps[side][slot]}
    views |= {name: chunk.rows(tensor)[row] for name, tensor in chunk.state.items()}
    for name, tensor in stack.state[side].items():
        views[name] = tensor[slot, :r, :r] if tensor.ndim == 3 else tensor[slot]
    if chunk.master is not None:
        views["master"] = chunk.rows(chunk.master)[row]
    if isinstance(rule, JointRule) and side == "B":
        layout.dense[number] = rule.pair_state(pair.lora_A, pair.lora_B)
        views |= layout.dense[number]
    before = state.get(parameter) or {}
    for name, view in views.items():
        if name in before:
            view.copy_(before[name])
    state[parameter] = views


def _lengths(stack: Stack, pairs: Sequence[Pair]) -> dict[Side, Tensor]:
    sizes: dict[Side, list[int]] = {
        "A": [pairs[number].lora_A.shape[1] for number in stack.pairs],
        "B": [pairs[number].lora_B.shape[0] for number in stack.pairs],
    }
    return {s: torch.tensor(v, dtype=torch.float64, device=stack.ranks.device) for s, v in sizes.items()}
