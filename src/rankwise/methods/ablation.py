"""What single ranks are worth on a fixed batch, found by switching them off, or all others: scores for schedules.

S is the negative mean loss over the labels of the batch. For a rank r of the model M, `drop` is S(M) - S(M without r)
and `solo` is S(M with r as its only rank) - S(base model): both from losses in float32 a label, summed in float64.

`Ablation.plain` computes them one forward pass each, by the definition. `Ablation.exact` computes the same numbers, to
round-off, with three savings: several ablations share one pass (the batch repeated, a gate a sample); blocks before
the one that holds the rank hand out what they computed once; and alone, a rank is a term on the bare base model, no
other layer computes its product. `Ablation.taylor` takes the slopes of S in the gates instead, in two backward passes.
Nothing of the model is changed: weights, gates, gradients, flags, modes and random states are as found afterwards.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import RankGates
from rankwise.calibration.as_found import random_states_restored
from rankwise.calibration.batches import Loss, batch_to, model_loss
from rankwise.calibration.processes import all_reduce_sum, gather_objects, process_index, world_size
from rankwise.errors import CalibrationError
from rankwise.methods.scored import rows_between

__all__ = ["Ablation", "Scores", "Slots", "block_list", "repeated", "scores_of", "token_losses"]

Slots = Mapping[str, Sequence[int]]
"""By layer, the live slots to score; all other ranks keep their mask."""
Patches = Mapping[nn.Module, Callable[..., Any]]
"""What modules compute by in place of their own forward."""

_POSITIONS_AT_ONCE: Final = 2048
"""Positions of a batch that keep a processor busy: more of them in one pass only leave its caches (measured)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Both terms of every scored rank; float64 on the CPU, not finite where a loss was not.

    Args:
        model: S(M).
        base: S of the base model.
        slots: by layer, the scored slots.
        drop: by layer, S(M) - S(M without r), one a slot.
        solo: by layer, S(M with r alone) - S(base), one a slot.
        passes: forward passes made, in all processes.
        sequences: sequences that went through them; one that went through some of the blocks counts as their share.
    """

    model: float
    base: float
    slots: Mapping[str, tuple[int, ...]]
    drop: Mapping[str, Float64[Tensor, " slots"]]
    solo: Mapping[str, Float64[Tensor, " slots"]]
    passes: int
    sequences: float


def scores_of(
    slots: Slots,
    drop: Float64[Tensor, " n"],
    solo: Float64[Tensor, " n"],
    *,
    model: float,
    base: float,
    passes: int,
    sequences: float,
) -> Scores:
    """Scores from the terms of all ranks in one row, layer by layer."""
    sizes = [len(chosen) for chosen in slots.values()]
    return Scores(
        model=model,
        base=base,
        slots={name: tuple(chosen) for name, chosen in slots.items()},
        drop=dict(zip(slots, torch.split(drop, sizes), strict=True)),
        solo=dict(zip(slots, torch.split(solo, sizes), strict=True)),
        passes=passes,
        sequences=sequences,
    )


def token_losses(
    logits: Float[Tensor, "rows *positions classes"], labels: Int64[Tensor, "rows *positions"], *, shifted: bool
) -> Float[Tensor, "rows n"]:
    """Cross-entropy of every label in float32, 0 where it is -100.

    Args:
        logits: one vector a position, or a row.
        labels: classes, -100 for positions that do not count.
        shifted: whether position t predicts label t + 1, as causal models do.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=-100, reduction="none"
    )
    return flat.view(len(labels), -1)


def repeated(tree: Any, rows: int, times: int) -> Any:
    """Copies of a batch one after another: of every tensor with `rows` rows, in whatever containers it lies."""
    if isinstance(tree, Tensor):
        return tree.repeat(times, *[1] * (tree.dim() - 1)) if tree.dim() and len(tree) == rows else tree
    if isinstance(tree, Mapping):
        return {key: repeated(value, rows, times) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(repeated(value, rows, times) for value in tree)
    return tree


def block_list(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> tuple[nn.Module, ...]:
    """The blocks: the longest list of modules of one class that hold adapted layers; none if there is no such list.

    A list within a member of another (the experts of a block) does not count; of equally long ones the first is taken.
    """
    adapted = {id(layer.module) for layer in layers.values()}
    found: list[tuple[nn.Module, ...]] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside or len({type(one) for one in module}) != 1:
            continue
        if len(module) > 1 and any(id(part) in adapted for part in module.modules()):
            found.append(tuple(module))
            inside |= {id(part) for part in module.modules()}
    return max(found, key=len, default=())


class Ablation:
    """Scores the ranks of one model on one batch, as often as asked.

    Args:
        model: the attached model, unwrapped.
        layers: its adapted layers.
        gates: their masks, on the model.
        loss: `loss(model, batch) -> (mean loss, weight)` if the model's own does not serve.
        memory_bytes: about how much the activations of one pass may take; decides how many ablations share it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLayer],
        gates: RankGates,
        *,
        loss: Loss | None = None,
        memory_bytes: int = 2**30,
    ) -> None:
        self.remarks: tuple[str, ...] = ()
        """What could not be saved, once `prepare` has looked."""
        self._model, self._layers, self._gates = model, dict(layers), gates
        self._loss, self._own_loss = loss or model_loss, loss is None
        self._memory_bytes = memory_bytes
        self._blocks = block_list(model, layers)
        self._shifted: bool | None = None
        self._dims: dict[str, int] = {}
        self._bytes_each = memory_bytes
        self._positions = self._classes = 1
        self._row_seconds = 0.0
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._passes, self._sequences = 0, 0.0
        self._listener = model.register_forward_pre_hook(self._listen)

    def close(self) -> None:
        """Takes its hook off the model; called any number of times."""
        self._listener.remove()

    @property
    def blocks(self) -> int:
        """How many blocks hand out what they computed once; 0 where passes go through the whole model."""
        return len(self._blocks)

    @property
    def shared(self) -> int:
        """How many ablations share one pass over a batch as `prepare` saw it."""
        return self._fitting(self._bytes_each, self._positions)

    def _shared(self, batch: Any) -> int:
        """How many share one over this batch."""
        return 1 if self._shifted is None else self._fitting(self._bytes(batch), _positions(batch))

    def _fitting(self, size: int, positions: int) -> int:
        """As many as memory allows, and on a processor as are of use."""
        if self._shifted is None:
            return 1
        fitting, useful = max(1, self._memory_bytes // size), max(1, _POSITIONS_AT_ONCE // positions)
        return min(fitting, useful) if self._device.type == "cpu" else fitting

    def _bytes(self, batch: Mapping[str, Any], *, kept: bool = False) -> int:
        """A rough peak of one pass: logits and log-probabilities in float32, and a few vectors a position.

        With `kept` those of all layers, which wait for a backward pass; else of the widest.
        """
        costs = [layer.base.shape.cost for layer in self._layers.values()]
        vectors = 2 * sum(costs) if kept else 4 * max(costs)
        return 4 * (3 * int(batch["labels"].numel()) * self._classes + _positions(batch) * vectors)

    def _pieces(self, batches: Sequence[Any], *, kept: bool = False) -> Iterator[Any]:
        """The batches on the device, cut to as many rows as one pass has memory for, where losses are known by row."""
        for batch in batches:
            rows = _rows(batch)
            size = rows
            if self._shifted is not None:
                size = max(1, rows * self._memory_bytes // max(1, self._bytes(batch, kept=kept)))
            for start in range(0, rows, size) if size < rows else (None,):
                part = [batch] if start is None else rows_between([batch], start, min(rows, start + size))
                yield from (batch_to(one, self._device) for one in part)

    @property
    def by_rows(self) -> bool:
        """Whether losses and slopes are known row by row."""
        return self._shifted is not None and self._dims.keys() == self._layers.keys()

    @property
    def pass_bytes(self) -> int:
        """About what the activations of one pass take."""
        return self.shared * self._bytes_each

    def prepare(self, batch: Any) -> None:
        """Looks, in a few passes over a batch, which savings give what the model itself gives."""
        failure: Exception | None = None
        try:
            self._look_at(batch)
        except Exception as error:  # noqa: BLE001  (re-raised below, once the other processes know)
            failure = error
        _raise_everywhere(failure)
        self._agree()
        self._passes, self._sequences = 0, 0.0  # what scoring costs, without this look

    def _agree(self) -> None:
        """Processes that found other savings on their devices take none, or they would compute different passes."""
        found = (self._shifted, len(self._blocks), sorted(self._dims.items()))
        if any(other != found for other in gather_objects(found)):
            self._shifted, self._blocks, self._dims = None, (), {}
            self.remarks = ("processes found different savings: every ablation takes a whole pass of its own",)

    def _look_at(self, batch: Any) -> None:
        remarks = []
        with self._as_found(), torch.no_grad():
            batch = batch_to(batch, self._device)
            self._shifted = self._find_loss(batch)
            order = self._find_shapes(batch)
            begun = time.perf_counter()
            alone = self._sums(batch, 1)  # on the CPU when it returns, so that the clock has seen all of it
            self._row_seconds = (time.perf_counter() - begun) / _rows(batch)
            if self._shifted is None:
                remarks.append("the loss is no cross-entropy of the logits: every ablation takes a pass of its own")
            elif not _close(self._sums(batch, 2), alone, self._tolerance()):
                self._shifted = None
                remarks.append("rows of a batch change each other's loss: every ablation takes a pass of its own")
            if not self._blocks:
                remarks.append("no list of equal blocks holds adapted layers: passes go through the whole model")
            elif order != list(range(len(self._blocks))) or not self._skips_well(batch):
                self._blocks = ()
                remarks.append("the blocks do not simply follow one another: passes go through the whole model")
        self.remarks = tuple(remarks)

    def forecast(self, batches: Sequence[Any], slots: Slots) -> float:
        """Seconds that `exact` will take in this process, from the pass that `prepare` timed; 0 before it."""
        last = len(self._blocks) - 1
        outputs = 2 * max(0, last) / max(1, len(self._blocks))
        shares = [
            2 * sum(len(slots[name]) for name in names) * (1 - max(0, index) / max(1, len(self._blocks)))
            for index, names in self._stages(slots)
        ]
        return (2 + outputs + sum(shares)) * self.pass_seconds(batches) / world_size()

    def pass_seconds(self, batches: Sequence[Any]) -> float:
        """What one plain pass over the batches takes, as `prepare` timed it; 0 before it."""
        return sum(map(_rows, batches)) * self._row_seconds

    def plain(self, batches: Sequence[Any], slots: Slots) -> Scores:
        """Both terms by the definition: one pass of the whole model for every term, nothing shared."""
        losses, weight = [], 0.0
        with self._as_found(), torch.no_grad():
            for batch in batches:
                losses.append(self._plain_losses(batch_to(batch, self._device), slots).sum(dim=2))
                weight += self._weight(batch)
        return self._scores(slots, torch.stack(losses).sum(dim=0), weight, *self.counted())

    def exact(self, batches: Sequence[Any], slots: Slots) -> Scores:
        """Both terms as `plain` finds them, at a fraction of the cost; shared out over processes, equal in all of them.

        Raises:
            CalibrationError: in every process when another process failed; the failing one raises its own error.
        """
        losses, weight = self.losses(batches, slots)
        return self._scores(slots, losses.sum(dim=2), weight, *self.counted())

    def taylor(self, batches: Sequence[Any], slots: Slots) -> Scores:
        """The slopes of S in each gate in place of differences: at M for `drop`, with all gates 0 for `solo`.

        An approximation, and on trained adapters a poor one; every process computes all of it, and takes process 0's.
        """
        slopes, ends, weight = self.slopes(batches, slots)
        # A slope stands where the difference to no ablation does, so the losses are put together to give it.
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
        losses = torch.cat(
            [ends.sum(dim=1, keepdim=True) + signs * slopes.sum(dim=2), ends.sum(dim=1, keepdim=True)], 1
        )
        return self._scores(slots, losses, weight, *self.counted())

    def counted(self) -> tuple[int, float]:
        """Passes and sequences since this was last asked, in all processes."""
        work = all_reduce_sum(torch.tensor([self._passes, self._sequences], dtype=torch.float64))
        self._passes, self._sequences = 0, 0.0
        return int(work[0]), float(work[1])

    def losses(self, batches: Sequence[Any], slots: Slots) -> tuple[Float64[Tensor, "2 n rows"], float]:
        """Loss sums of every ablation and row: [0] without the rank, [1] with it alone; the last one is no ablation's.

        Beside them the number of labels. One column a batch stands for its rows where losses are not known by row.
        """
        failure: Exception | None = None
        parts, weight = [], 0.0
        try:
            with self._as_found(), torch.no_grad():
                for batch in self._pieces(batches):
                    parts.append(self._losses_of(batch, slots))
                    weight += self._weight(batch)
        except Exception as error:  # noqa: BLE001  (re-raised below, once the other processes know)
            failure = error
        _raise_everywhere(failure)
        return all_reduce_sum(torch.cat(parts, dim=2)), weight

    def slopes(
        self, batches: Sequence[Any], slots: Slots
    ) -> tuple[Float64[Tensor, "2 n rows"], Float64[Tensor, "2 rows"], float]:
        """Slopes of every row's summed -losses in each scored gate, at M and at 0; the losses there; the labels."""
        slopes, ends, weight = [], [], 0.0
        failure: Exception | None = None
        try:
            with self._as_found(), torch.enable_grad():
                for batch in self._pieces(batches, kept=True):
                    found = [self._slopes_at(batch, slots, float(at)) for at in (1, 0)]
                    slopes.append(torch.stack([slope for slope, _ in found]))
                    ends.append(torch.stack([end for _, end in found]))
                    with torch.no_grad():
                        weight += self._weight(batch)
        except Exception as error:  # noqa: BLE001  (re-raised below, once the other processes know)
            failure = error
        _raise_everywhere(failure)
        both = (torch.cat(slopes, dim=2), torch.cat(ends, dim=1))
        if process_index() > 0:
            both = (torch.zeros_like(both[0]), torch.zeros_like(both[1]))
        return all_reduce_sum(both[0]), all_reduce_sum(both[1]), weight

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _sums(self, batch: Any, times: int, share: float = 1.0) -> Float64[Tensor, "times rows"]:
        """The sum of the labels' losses of every row, in each of `times` copies of the batch, under the gates as now.

        One column stands for the whole batch where the loss is not known label by label; `times` is 1 then. `share` is
        that of the blocks that compute.
        """
        self._count(batch, times * share)
        if self._shifted is None:
            mean, weight = self._loss(self._model, batch)
            return mean.detach().cpu().double().reshape(1, 1) * weight
        losses = self._label_losses(repeated(batch, _rows(batch), times))
        return losses.cpu().double().sum(dim=1).view(times, -1)

    def _label_losses(self, batch: Mapping[str, Any]) -> Float[Tensor, "rows n"]:
        return token_losses(self._logits(batch), batch["labels"], shifted=bool(self._shifted))

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The model computes no loss of its own, except where it makes the decoder's inputs from the labels."""
        keeps = bool(getattr(getattr(self._model, "config", None), "is_encoder_decoder", False))
        output = self._model(**{key: value for key, value in batch.items() if keeps or key != "labels"})
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        return found if isinstance(found, Tensor) else torch.empty(0)

    def _weight(self, batch: Any) -> float:
        """How many labels of a batch count."""
        if self._shifted is None:
            return float(self._loss(self._model, batch_to(batch, self._device))[1])
        labels = batch["labels"]
        return float(((labels[:, 1:] if self._shifted else labels) != -100).sum())

    def _count(self, batch: Any, times: float) -> None:
        self._passes += 1
        self._sequences += times * _rows(batch)

    def _plain_losses(self, batch: Any, slots: Slots) -> Float64[Tensor, "2 n rows"]:
        zeros = {name: torch.zeros_like(self._gates.value(name)) for name in self._layers}
        off, on = [], []
        for name, slot in _flat(slots):
            mask, only = self._gates.value(name).clone(), zeros[name].clone()
            mask[slot], only[slot] = 0, 1
            with self._gates.sampled({name: mask}):
                off.append(self._sums(batch, 1))
            with self._gates.sampled({**zeros, name: only}):
                on.append(self._sums(batch, 1))
        off.append(self._sums(batch, 1))
        with self._gates.sampled(zeros):
            on.append(self._sums(batch, 1))
        return torch.stack([torch.cat(off), torch.cat(on)])

    # --- block by block ---------------------------------------------------------------------------------------------

    def _losses_of(self, batch: Any, slots: Slots) -> Float64[Tensor, "2 n rows"]:
        """A process's share of one batch; the entries of the others are 0."""
        places = {rank: index for index, rank in enumerate(_flat(slots))}
        losses = torch.zeros(2, len(places) + 1, _rows(batch) if self._shifted is not None else 1, dtype=torch.float64)
        turn = 0
        for row, patches in ((0, {}), (1, self._bare(()))):
            if process_index() == 0:
                with _computing(patches):
                    losses[row, -1] = self._sums(batch, 1)[0]
        before: list[Any] = [None, None]
        for index, names in self._stages(slots):
            for chunk in self._chunks(slots, names, self._shared(batch)):
                for row in (0, 1):
                    if turn % world_size() == process_index():
                        found = self._ablated(batch, index, before[row], chunk, row)
                        losses[row, [places[rank] for rank in chunk]] = found
                    turn += 1
            if index + 1 < len(self._blocks):
                bare = self._bare(())
                before = [self._output_of(batch, index, before[row], bare if row else {}) for row in (0, 1)]
        return losses

    def _stages(self, slots: Slots) -> Iterator[tuple[int, list[str]]]:
        """The layers outside blocks, which take the whole model, then each block's; by the first block to compute."""
        owners = {id(part): index for index, block in enumerate(self._blocks) for part in block.modules()}
        placed = {name: owners.get(id(self._layers[name].module), -1) for name in slots}
        yield -1, [name for name, index in placed.items() if index < 0]
        for index in range(len(self._blocks)):
            yield index, [name for name, own in placed.items() if own == index]

    def _chunks(self, slots: Slots, names: Sequence[str], shared: int) -> Iterator[list[tuple[str, int]]]:
        """Ranks that share a pass; those of layers that do not see whole samples take one each."""
        together = [(name, slot) for name in names if name in self._dims for slot in slots[name]]
        for start in range(0, len(together), shared):
            yield together[start : start + shared]
        yield from ([(name, slot)] for name in names if name not in self._dims for slot in slots[name])

    def _ablated(
        self, batch: Any, index: int, before: Any, chunk: Sequence[tuple[str, int]], row: int
    ) -> Float64[Tensor, "chunk rows"]:
        """Loss sums of one pass: each rank of the chunk switched off (row 0), or on as the only one (row 1)."""
        active = tuple(dict.fromkeys(name for name, _ in chunk))
        patches = self._skipped(index, before, _rows(batch), len(chunk))
        if row:
            patches |= self._bare(active)
        gates = {name: self._gate_of(name, chunk, row, _rows(batch)) for name in active}
        with _computing(patches), self._gates.sampled(gates):
            return self._sums(batch, len(chunk), 1 - max(0, index) / max(1, len(self._blocks)))

    def _gate_of(self, name: str, chunk: Sequence[tuple[str, int]], row: int, rows: int) -> Tensor:
        """The gate of one layer for every sample: [samples, 1, rank], or [rank] where the pass is one ablation's."""
        mask = self._gates.value(name)
        gate = (torch.zeros_like(mask) if row else mask).repeat(len(chunk), 1)
        for place, (owner, slot) in enumerate(chunk):
            if owner == name:
                gate[place, slot] = row
        if len(chunk) == 1:
            return gate[0]
        # A layer that sees one vector a sample has no position between samples and ranks.
        between = [1] * (self._dims[name] - 2)
        return gate.repeat_interleave(rows, dim=0).view(len(chunk) * rows, *between, -1)

    def _output_of(self, batch: Any, index: int, before: Any, patches: Patches) -> Any:
        """What a block puts out after `before`; the blocks behind it compute nothing."""
        rows = _rows(batch)
        if index < 0:
            return None
        found: list[Any] = []
        handle = self._blocks[index].register_forward_hook(lambda module, inputs, output: found.append(output))
        behind = {block: (lambda *args, **kwargs: found[-1]) for block in self._blocks[index + 1 :]}
        try:
            with _computing({**self._skipped(index, before, rows, 1), **patches, **behind}):
                self._sums(batch, 1, 1 / len(self._blocks))
        finally:
            handle.remove()
        return repeated(found[0], rows, 1)

    def _skipped(self, index: int, before: Any, rows: int, times: int) -> dict[nn.Module, Callable[..., Any]]:
        """The blocks in front of `index` hand out what the last of them puts out."""
        if index <= 0:
            return {}
        value = repeated(before, rows, times)
        return {block: (lambda *args, **kwargs: value) for block in self._blocks[:index]}

    def _bare(self, active: Sequence[str]) -> dict[nn.Module, Callable[..., Any]]:
        """All layers but the active ones compute as their base layer."""
        return {
            cast(nn.Module, layer.module): _forward_of(layer.base.module)
            for name, layer in self._layers.items()
            if name not in active
        }

    def _slopes_at(
        self, batch: Any, slots: Slots, scale: float
    ) -> tuple[Float64[Tensor, "n rows"], Float64[Tensor, " rows"]]:
        """Slopes with all gates times `scale`, in a gate of its own for every row where the layer sees rows."""
        self._count(batch, 1)
        rows = _rows(batch) if self._shifted is not None else 1
        leaves = {}
        for name in self._layers:
            gate = self._gates.value(name).detach() * scale
            if self._shifted is not None and name in self._dims:
                gate = gate.repeat(rows, 1).view(rows, *[1] * (self._dims[name] - 2), -1)
            leaves[name] = gate.requires_grad_()
        with self._gates.sampled(leaves):
            if self._shifted is not None:
                losses = self._label_losses(batch).sum(dim=1)
            else:
                mean, weight = self._loss(self._model, batch)
                losses = mean.float().reshape(1) * weight
        names = [name for name, chosen in slots.items() if chosen]
        found = torch.autograd.grad(losses.sum(), [leaves[name] for name in names], allow_unused=True)
        parts = []
        for name, slope in zip(names, found, strict=True):
            part = torch.zeros(rows, self._layers[name].rank, dtype=torch.float64)
            if slope is not None:
                whole = slope.detach().cpu().double().view(-1, part.shape[1])
                part[: len(whole)] = -whole
            parts.append(part[:, list(slots[name])].T)
        return torch.cat(parts), losses.detach().cpu().double()

    # --- what holds of this model -----------------------------------------------------------------------------------

    def _find_loss(self, batch: Any) -> bool | None:
        """Whether the labels are shifted in the loss; None if it is not the mean cross-entropy of the logits.

        A loss of the user's own is taken as it is: a term that vanishes now may count later.
        """
        if not self._own_loss:
            return None
        own = float(self._loss(self._model, batch)[0])
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim():
            return None
        logits = self._logits(batch)
        if logits.shape[:-1] != labels.shape:
            return None
        apart = {}
        for shifted in (False, True) if labels.dim() > 1 else (False,):
            losses = token_losses(logits, labels, shifted=shifted)
            counted = int(((labels[:, 1:] if shifted else labels) != -100).sum())
            apart[shifted] = abs(float(losses.cpu().double().sum()) / max(1, counted) - own)
        self._positions, self._classes = _positions(batch), logits.shape[-1]
        self._bytes_each = self._bytes(batch)
        best = min(apart, key=lambda shifted: apart[shifted])
        return best if apart[best] <= self._tolerance() * max(1.0, abs(own)) else None

    def _find_shapes(self, batch: Any) -> list[int]:
        """Notes which layers see whole samples, and how; returns the blocks in the order in which they compute."""
        order: list[int] = []
        shapes: dict[str, list[torch.Size]] = {name: [] for name in self._layers}
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_hook(_noting(order, index)).remove)
            for name, layer in self._layers.items():
                inner = layer.module.lora_A[layer.adapter_name]
                stack.callback(inner.register_forward_hook(_noting_shape(shapes[name])).remove)
            self._sums(batch, 1)
            once, in_order = {name: list(seen) for name, seen in shapes.items()}, list(order)
            for seen in shapes.values():
                seen.clear()
            if self._shifted is not None:
                self._sums(batch, 2)
        rows = _rows(batch)

        def sees_rows(name: str) -> bool:
            """Once for one row and twice for two; how many tokens come to an expert follows no batch."""
            first, second = once[name], shapes[name]
            doubled = self._shifted is None or all(one[0] == 2 * rows for one in second)
            return (
                bool(first) and all(one[0] == rows for one in first) and doubled and not self._layers[name].base.expert
            )

        whole = {name: once[name] for name in self._layers if sees_rows(name)}
        self._dims = {name: len(seen[0]) for name, seen in whole.items() if len(set(map(len, seen))) == 1}
        return in_order

    def _skips_well(self, batch: Any) -> bool:
        """Whether the last block gives what the whole model gives when those in front hand out what they computed."""
        alone, before, last = self._sums(batch, 1), None, len(self._blocks) - 1
        for index in range(last):
            before = self._output_of(batch, index, before, {})
        with _computing(self._skipped(last, before, _rows(batch), 1)):
            return _close(self._sums(batch, 1), alone, self._tolerance())

    def _tolerance(self) -> float:
        """How far two ways to one loss may lie apart, relative; wide where 16 bits round."""
        narrow = (torch.float16, torch.bfloat16)
        rounded = self._autocast is not None and self._autocast[0]
        return 5e-3 if rounded or any(one.dtype in narrow for one in self._model.parameters()) else 1e-5

    # --- the model as found -----------------------------------------------------------------------------------------

    def _listen(self, module: nn.Module, inputs: Any) -> None:
        """Notes the autocast of a training pass, for the passes that score."""
        if module.training:
            kind = self._device.type
            self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            self._listener.remove()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).lora_A.device

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """Evaluation mode, training's autocast and no key-value cache inside; all as found afterwards."""
        modes = [(module, module.training) for module in self._model.modules()]
        configs = {id(c): c for c in (getattr(one, "config", None) for one in self._model.modules()) if c is not None}
        with random_states_restored(), ExitStack() as stack:
            stack.callback(_restore_modes, modes)
            for config in configs.values():
                if getattr(config, "use_cache", False) is True:
                    stack.callback(setattr, config, "use_cache", True)
                    config.use_cache = False
            self._model.eval()
            if self._autocast is not None:
                on, dtype = self._autocast
                stack.enter_context(torch.autocast(self._device.type, dtype=dtype, enabled=on))
            yield

    def _scores(
        self, slots: Slots, losses: Float64[Tensor, "2 n"], weight: float, passes: int, sequences: float
    ) -> Scores:
        """Differences of sums to the one without ablation, then the mean over labels."""
        apart = (losses[:, :-1] - losses[:, -1:]) / weight
        model, base = (float(end) for end in -losses[:, -1] / weight)
        return scores_of(slots, apart[0], -apart[1], model=model, base=base, passes=passes, sequences=sequences)


@contextmanager
def _computing(patches: Patches) -> Iterator[None]:
    """These modules compute by other functions inside; what they computed by before is put back."""
    with ExitStack() as stack:
        for module, function in patches.items():
            stack.callback(_put_back, module, module.__dict__.get("forward"))
            module.forward = function
        yield


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _restore_modes(found: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in found:
        module.training = training


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: module(*args, **kwargs)


def _noting(order: list[int], index: int) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, inputs, output: order.append(index)


def _noting_shape(seen: list[torch.Size]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, inputs, output: seen.append(output.shape)


def _flat(slots: Slots) -> list[tuple[str, int]]:
    return [(name, slot) for name, chosen in slots.items() for slot in chosen]


def _positions(batch: Any) -> int:
    """Tokens of a batch, or labels where it holds no tokens."""
    if not isinstance(batch, Mapping):
        return 1
    return max(
        1, *(one.numel() for one in batch.values() if isinstance(one, Tensor) and not one.is_floating_point()), 1
    )


def _rows(batch: Any) -> int:
    """How many samples a batch has: by its labels, or its first tensor."""
    if not isinstance(batch, Mapping):
        return 1
    tensors = [batch["labels"]] if isinstance(batch.get("labels"), Tensor) else list(batch.values())
    return next((len(one) for one in tensors if isinstance(one, Tensor) and one.dim()), 1)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool(((found - wanted).abs() <= tolerance * wanted.abs().clamp(min=1.0)).all())


def _raise_everywhere(failure: Exception | None) -> None:
    """Raises the failure here and a short error in the other processes, so that none waits for another for ever."""
    messages = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message is not None:
            raise CalibrationError(f"scoring failed in process {index}: {message}")
