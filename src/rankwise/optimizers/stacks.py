"""Where pairs lie during a step: small matrices of equal rank in one stack, factors of equal shape in chunks.

On a CPU a chunk is as much as stays in cache between the products and the update that read it, so that large factors
are worked on one by one where they are, and small ones are stacked to spare calls. Elsewhere a chunk is every factor of
its shape: one call serves them all.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rankwise.optimizers.pairs import Pair
from rankwise.optimizers.rule import SIDES, Side
from rankwise.optimizers.tall import Tall

__all__ = ["Chunk", "Scratch", "Stack", "build_stacks", "computing_type", "full", "needs_master"]

_CHUNK_ELEMENTS = 1 << 16  # 256 kB of float32: factor, gradient, two states and a result stay in a cache of 2 MB
_PADDED = 8
_NOTHING = torch.empty(0)


def computing_type(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def needs_master(parameter: Tensor) -> bool:
    """Whether the step works on a copy of its own: 16-bit parameters, and shards, whose whole it keeps."""
    return parameter.dtype != computing_type(parameter) or isinstance(parameter, DTensor)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective call), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def padded_rank(rank: int) -> int:
    """Small ranks as they are (1, 2, 4), others up to the next multiple of 8: few stacks for many ranks."""
    return rank if rank in (1, 2, 4) else -(-rank // _PADDED) * _PADDED


class Scratch:
    """Memory that chunks share one after the other; on a CPU only, where fresh memory costs more than work in it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._most: dict[torch.dtype, int] = {}

    def reserve(self, chunks: Iterable["Chunk"]) -> None:
        """Makes room for the largest of these."""
        self._held = {}
        self._most = {}
        for chunk in chunks:
            self._most[chunk.dtype] = max(self._most.get(chunk.dtype, 0), math.prod(chunk.shape))

    def of(self, name: str, chunk: "Chunk") -> Tensor:
        """Uninitialized memory of a chunk's shape on the CPU; the same name is the same memory for every chunk."""
        key = (name, chunk.dtype)
        if key not in self._held:
            self._held[key] = torch.empty(self._most[chunk.dtype], dtype=chunk.dtype)
        return self._held[key][: math.prod(chunk.shape)].view(chunk.shape)


@dataclass(slots=True, eq=False)
class Stack:
    """The pairs whose small matrices share one stack, and their small state.

    Args:
        pairs: numbers of the pairs in the optimizer's order.
        rank: the padded rank.
        ranks: each pair's own rank, float64.
        padding: True where an index is padding; None where nothing is padded.
        epsilon: the rounding of the computing type: 16-bit parameters have a float32 master.
        computing: the type of the tall products.
        state: by side and name, [N, r, r] or [N], float64.
        steps: by side, [N], float64.
    """

    pairs: list[int]
    rank: int
    ranks: Tensor
    padding: Tensor | None
    epsilon: float
    computing: torch.dtype
    state: dict[Side, dict[str, Tensor]]
    steps: dict[Side, Tensor]
    _sent: tuple[list[list[float]], Tensor] | None = None

    def numbers_on_device(self, rows: list[list[float]]) -> tuple[Tensor, ...]:
        """Rows of N host numbers as float64 tensors [N]; sent in one piece, without a wait, when they change."""
        if self._sent is None or self._sent[0] != rows:
            host = torch.tensor(rows, dtype=torch.float64)
            if self.ranks.device.type == "cuda":
                host = host.pin_memory()
            self._sent = (rows, host.to(self.ranks.device, non_blocking=True))
        return self._sent[1].unbind(0)


@dataclass(slots=True, eq=False)
class Chunk:
    """Factors of one side, shape and group that are worked on together.

    Args:
        side: "A" or "B".
        parameters: the factors.
        stack: the number of the stack of their small matrices.
        slots: their places in that stack.
        index: the same as a tensor on the device.
        group: their parameter group.
        state: tall state by name: [k, *shape], or of the factor's own shape where the chunk is one factor.
        master: the factors in the computing type where the parameters are not; else None.
        tall: the chunk as rules see it; made once, because a step has hundreds of them.
        single: whether factors of this shape are worked on one by one, where they are. The shape alone decides, so that
            a factor's bits do not depend on how many others there are.
    """

    side: Side
    parameters: list[Tensor]
    stack: int
    slots: list[int]
    index: Tensor
    group: int
    single: bool
    state: dict[str, Tensor] = field(default_factory=dict)
    master: Tensor | None = None
    tall: Tall | None = None
    rank: int = field(init=False)
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)
    _view: Tensor | None = None

    def __post_init__(self) -> None:
        own = tuple(self.parameters[0].shape)
        self.rank = own[0 if self.side == "A" else 1]
        self.shape = own if self.single else (len(self.parameters), *own)
        self.dtype = computing_type(self.parameters[0])

    def let_go(self) -> None:
        """Stacked copies of factors, and gradients, live for the step only."""
        if not self.single:
            self.tall = None
        elif self.tall is not None:
            self.tall.grad = _NOTHING

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """One view a factor."""
        return [tensor] if self.single else list(tensor.unbind(0))

    def gather_factor(self) -> Tensor:
        """The factors in the computing type: where they are, their master, or stacked."""
        if self.master is not None:
            return self.master
        if self.single:
            if self._view is None or self._view.data_ptr() != self.parameters[0].data_ptr():
                self._view = self.parameters[0].detach()
            return self._view
        return torch.stack([p.detach() for p in self.parameters])

    def gather_grad(self, negated: bool, skipped: Sequence[bool] | None) -> Tensor:
        """The gradients in the computing type; zeros where there is none or where it is skipped."""
        if self.single and not negated and (skipped is None or not skipped[0]):
            grad = self.parameters[0].grad
            if grad is not None and grad.dtype == self.dtype and not isinstance(grad, DTensor):
                return grad.detach()
        found = []
        for place, parameter in enumerate(self.parameters):
            grad = parameter.grad
            if grad is None or (skipped is not None and skipped[place]):
                found.append(torch.zeros(parameter.shape, dtype=self.dtype, device=parameter.device))
            elif grad.dtype == self.dtype and not isinstance(grad, DTensor):
                found.append(grad.detach())
            else:
                found.append(full(grad.detach()).to(self.dtype))
        whole = found[0] if self.shape == found[0].shape else torch.stack(found)
        return -whole if negated else whole

    def scatter(self, factor: Tensor, skipped: Sequence[bool] | None) -> None:
        """Writes moved factors back into the parameters, rounded to their type."""
        if self.single and self.master is None:
            return
        pairs = zip(self.parameters, self.rows(factor), strict=True)
        kept = [(p, row) for i, (p, row) in enumerate(pairs) if skipped is None or not skipped[i]]
        plain = [(p.detach(), row) for p, row in kept if not isinstance(p, DTensor)]
        if plain:
            torch._foreach_copy_([p for p, _ in plain], [row for _, row in plain])
        for parameter, row in kept:
            if isinstance(parameter, DTensor):
                placed = distribute_tensor(row, parameter.device_mesh, parameter.placements, src_data_rank=None)
                local: DTensor = parameter.detach()  # type: ignore[assignment]
                local.to_local().copy_(placed.to_local())


def build_stacks(
    pairs: Sequence[Pair], square: Sequence[str], numbers: Mapping[str, float], tall: Sequence[str]
) -> tuple[list[Stack], list[Chunk]]:
    """Stacks and chunks of all pairs, with fresh state.

    Args:
        pairs: in the optimizer's order.
        square: names of the small matrices of state.
        numbers: names and first values of the state numbers.
        tall: names of the tall state tensors.

    Returns:
        Stacks by rank, type and device, and chunks by side, shape and group; both in the order of their first pair.
    """
    by_rank: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        by_rank[padded_rank(pair.rank), pair.lora_A.dtype, pair.lora_A.device].append(number)
    stacks: list[Stack] = []
    place: dict[int, tuple[int, int]] = {}
    for (rank, dtype, device), members in by_rank.items():
        place |= {number: (len(stacks), slot) for slot, number in enumerate(members)}
        stacks.append(_stack(members, rank, dtype, device, pairs, square, numbers))
    chunks: list[Chunk] = []
    for side in SIDES:
        by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for number, pair in enumerate(pairs):
            factor = _factor(pair, side)
            kind = (isinstance(factor, DTensor), factor.is_contiguous())
            key = (tuple(factor.shape), factor.dtype, factor.device, pair.group, place[number][0], kind)
            by_shape[key].append(number)
        for members in by_shape.values():
            first = _factor(pairs[members[0]], side)
            size = _chunk_size(first)
            single = size == 1 and first.is_contiguous()
            for start in range(0, len(members), size):
                chunks.append(_chunk(side, members[start : start + size], pairs, place, tall, single=single))
    return stacks, chunks


def _stack(
    members: list[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    pairs: Sequence[Pair],
    square: Sequence[str],
    numbers: Mapping[str, float],
) -> Stack:
    count = len(members)
    ranks = torch.tensor([pairs[number].rank for number in members], dtype=torch.float64, device=device)
    padding = torch.arange(rank, device=device) >= ranks[:, None]

    def fresh() -> dict[str, Tensor]:
        found = {name: torch.zeros(count, rank, rank, dtype=torch.float64, device=device) for name in square}
        values = {n: torch.full((count,), v, dtype=torch.float64, device=device) for n, v in numbers.items()}
        return found | values

    return Stack(
        pairs=members,
        rank=rank,
        ranks=ranks,
        padding=padding if any(pairs[number].rank < rank for number in members) else None,
        epsilon=torch.finfo(computing_type(pairs[members[0]].lora_A)).eps,
        computing=computing_type(pairs[members[0]].lora_A),
        state={side: fresh() for side in SIDES},
        steps={side: torch.zeros(count, dtype=torch.float64, device=device) for side in SIDES},
    )


def _chunk(
    side: Side,
    members: list[int],
    pairs: Sequence[Pair],
    place: Mapping[int, tuple[int, int]],
    tall: Sequence[str],
    *,
    single: bool,
) -> Chunk:
    parameters = [_factor(pairs[number], side) for number in members]
    first, slots = parameters[0], [place[number][1] for number in members]
    chunk = Chunk(
        side=side,
        parameters=parameters,
        stack=place[members[0]][0],
        slots=slots,
        index=torch.tensor(slots, device=first.device),
        group=pairs[members[0]].group,
        single=single,
    )
    chunk.state = {name: torch.zeros(chunk.shape, dtype=chunk.dtype, device=first.device) for name in tall}
    if needs_master(first):
        wide = [full(parameter.detach()).to(chunk.dtype, copy=True) for parameter in parameters]
        chunk.master = wide[0] if chunk.single else torch.stack(wide)
    return chunk


def _chunk_size(factor: Tensor) -> int:
    if factor.device.type != "cpu":
        return 1 << 30
    return max(1, _CHUNK_ELEMENTS // factor.numel())


def _factor(pair: Pair, side: Side) -> Tensor:
    return pair.lora_A if side == "A" else pair.lora_B
