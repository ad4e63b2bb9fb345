"""One optimizer for every step rule over pairs, with AdamW for everything else in the same groups.

A step has three parts: every chunk of factors is reduced to small products; the rule solves all of them at once in
float64; every chunk is moved. Pairs without a gradient, or with one that is not finite, are left as they are with their
state. On an accelerator nothing waits for the device but the stacked eigendecompositions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import CheckpointError, ConfigError
from rankwise.linalg.precision import full_float32
from rankwise.optimizers.checks import check_gradients, check_settings, state_faults
from rankwise.optimizers.layout import Layout, Present, build_layout
from rankwise.optimizers.pairs import ScalingReader, check_groups, groups_of_model, pairs_of
from rankwise.optimizers.plain import step_plain
from rankwise.optimizers.ready import Ready
from rankwise.optimizers.rule import SIDES, Block, Coefficients, FactorRule, Half, JointRule, Measured, PairView, Side
from rankwise.optimizers.stacks import Chunk, Scratch, full
from rankwise.optimizers.tall import Tall

__all__ = ["PairOptimizer", "Source"]

Source = nn.Module | Iterable[dict[str, Any]]
"""A PEFT model, or parameter groups."""

_Loss = TypeVar("_Loss")
_HYPER = ("beta1", "beta2", "eps", "weight_decay")
_Hyper = Mapping[Side, Mapping[str, float]]
_Products = dict[Side, dict[str, Tensor]]


class PairOptimizer(Optimizer):
    """Runs a step rule over pairs of lora_A and lora_B, and AdamW over plain parameters.

    Args:
        source: a PEFT model (its trainable pairs and, in a plain group, whatever else is trainable), or groups
            `{"params": [A1, B1, A2, B2, ...], "kind": "lora_pair", "scaling": [s1, s2, ...]}` and
            `{"params": [...], "kind": "plain"}`. Both take `lr`, `betas`, `eps`, `weight_decay` and `maximize` of their
            own, a group of pairs `names` (for messages) and `lr_ratio` (LoRA+: the rate of lora_B over lora_A's).
        rule: how pairs move.
        defaults: `lr`, `betas`, `eps`, `weight_decay` of groups that do not say; `plain_eps` is AdamW's.
        adapter_name: which adapter of the model.

    Raises:
        ConfigError: settings out of range, no pair, a missing half, shared or unsuitable parameters.
    """

    def __init__(
        self, source: Source, rule: FactorRule | JointRule, defaults: dict[str, Any], adapter_name: str = "default"
    ) -> None:
        self._rule = rule
        self._layout: Layout | None = None
        self._scratch = Scratch()
        self._readers: dict[int, ScalingReader] = {}
        self._versions: dict[int, int] = {}
        if isinstance(source, nn.Module):
            groups, self._readers = groups_of_model(source, adapter_name)
        else:
            groups = _given_groups(source)
        self._plain_eps = defaults.pop("plain_eps", defaults["eps"])
        for group in groups:
            self._complete(group)
        check_groups(groups)
        self._building = True
        super().__init__(groups, {"maximize": False, "kind": None, **defaults})
        self._building = False
        check_settings(self.param_groups)
        if not any(group["kind"] == "lora_pair" for group in self.param_groups):
            raise ConfigError("there is no pair to optimize: give a group of kind 'lora_pair', or use AdamW")
        self._known_scalings = self._scalings()

    def _complete(self, group: dict[str, Any]) -> None:
        """What a group needs beyond what was said."""
        if group.get("kind") == "plain":
            group.setdefault("eps", self._plain_eps)
        if group.get("kind") == "lora_pair":
            self._check_pair_group(group)
            halves = group["params"]
            group["shapes"] = [[list(a.shape), list(b.shape)] for a, b in zip(halves[::2], halves[1::2], strict=False)]

    def _step_plain(self, group: dict[str, Any]) -> None:
        """Moves the parameters of a plain group: AdamW."""
        step_plain(group, self.state)

    def _check_pair_group(self, group: Mapping[str, Any]) -> None:
        """What a method refuses in a group of pairs."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; pairs are checked like those given at first.

        Raises:
            ConfigError: an unknown kind, a missing half, a parameter that is there already, settings out of range.
        """
        if self._building:
            super().add_param_group(param_group)
            return
        group = {**param_group, "params": _listed(param_group["params"])}
        check_groups([*self.param_groups, group])
        self._complete(group)
        group = {**self.defaults, **group}
        check_settings([group])
        self._detach_state()
        super().add_param_group(group)
        self._known_scalings = self._scalings()

    def announce_scaling(self, lora_A: Tensor, scaling: float) -> None:
        """Tells of a new multiplier of one layer; a change that nobody announced is refused at the next step.

        Raises:
            ConfigError: the factor is not one of ours, or the scaling is 0 or not finite.
        """
        for pair in pairs_of(self.param_groups):
            if pair.lora_A is lora_A:
                group = self.param_groups[pair.group]
                scalings = [*group["scaling"]]
                scalings[pair.place] = float(scaling)
                check_groups([{**group, "scaling": scalings}])
                group["scaling"] = scalings
                self._known_scalings = self._scalings()
                return
        raise ConfigError("announce_scaling: this lora_A belongs to no pair of the optimizer")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every pair and every plain parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients again; called once, with gradients on.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigError: parameters that something replaced (FSDP1, DeepSpeed), gradients that cannot be used, or a
                scaling that changed unannounced.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, self._names)
        layout = self._ready()
        self._check_scalings(layout)
        with full_float32():
            self._step_pairs(layout)
        for group in self.param_groups:
            if group["kind"] == "plain":
                self._step_plain(group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Torch's format: state by parameter number, tensors only."""
        self._ready()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`, every tensor in the type it was saved in.

        Raises:
            CheckpointError: the state is of other groups, pairs, ranks or another method.
        """
        expected = {
            id(parameter): {name: tuple(value.shape) for name, value in self.state[parameter].items()}
            for pair in self._ready().pairs
            for parameter in (pair.lora_A, pair.lora_B)
        }
        faults = state_faults(state_dict, self.param_groups, self._names(), expected)
        if faults:
            raise CheckpointError(
                f"the optimizer state does not fit: {'; '.join(faults[:3])}. Load the state that was saved with this "
                "plan and method, or start without it"
            )
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # Torch rounds state to the parameters' type, which would lose the float32 state of 16-bit parameters.
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved is not None:
                self.state[parameter] = {k: v.detach().to(parameter.device, copy=True) for k, v in saved.items()}
        self._layout = None
        self._versions = {}
        self._known_scalings = self._scalings()

    # --- layout ---------------------------------------------------------------------------------------------------

    def _ready(self) -> Layout:
        if self._layout is None:
            self._layout = build_layout(pairs_of(self.param_groups), self._rule, self.state)
            self._scratch.reserve(self._layout.chunks)
            return self._layout
        halves = [p for group in self.param_groups if group["kind"] == "lora_pair" for p in group["params"]]
        known = [p for pair in self._layout.pairs for p in (pair.lora_A, pair.lora_B)]
        if len(halves) != len(known) or any(a is not b for a, b in zip(halves, known, strict=True)):
            raise ConfigError(
                "something put other parameters into the optimizer's groups: build the optimizer after the model is "
                "wrapped (FSDP2), and do not hand it to an engine that flattens parameters (DeepSpeed ZeRO)"
            )
        cast = [p for p, dtype in zip(known, self._layout.dtypes, strict=True) if p.dtype != dtype]
        if cast:
            raise ConfigError(
                f"{len(cast)} factors were cast to {cast[0].dtype} since the last step: cast the model before its "
                "optimizer is built, or build a new one"
            )
        if any(p.device != device for p, device in zip(known, self._layout.devices, strict=True)):
            self._detach_state()
            return self._ready()
        return self._layout

    def _detach_state(self) -> None:
        """Copies of the state in place of views, so that new stacks can be filled from it."""
        if self._layout is not None:
            for pair in self._layout.pairs:
                for parameter in (pair.lora_A, pair.lora_B):
                    own = self.state[parameter].items()
                    self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in own}
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take: the state itself, no stacks and no readers of a model's scalings."""
        kept = {name: getattr(self, name) for name in ("_rule", "_known_scalings", "_plain_eps", "_building")}
        gone: dict[str, Any] = {"_layout": None, "_readers": {}, "_versions": {}, "_scratch": Scratch()}
        return {**super().__getstate__(), **kept, **gone}

    # --- a step ---------------------------------------------------------------------------------------------------

    def _step_pairs(self, layout: Layout) -> None:
        present = Present(layout, self._versions)
        if not present.any:
            return
        self._reread_masters(layout, present)
        hyper = [{side: _hyper(group, side) for side in SIDES} for group in self.param_groups]
        products = self._reduced(layout, present, hyper)
        blocks = [self._block(layout, i, products[i], present, hyper) for i in range(len(layout.stacks))]
        measured = [self._measured(layout, i, block) for i, block in enumerate(blocks)]
        decided = self._rule.solve(blocks, measured)
        if isinstance(self._rule, JointRule):
            self._apply_pairs(self._rule, layout, decided, blocks)
        else:
            self._apply(self._rule, layout, decided, blocks, present, hyper)
        for chunk in layout.chunks:
            chunk.let_go()
        self._remember_versions(layout, blocks, present)
        for stack, block in zip(layout.stacks, blocks, strict=True):
            for side in SIDES:
                stack.steps[side].copy_(block.halves[side].steps)

    def _remember_versions(self, layout: Layout, blocks: Sequence[Block], present: Present) -> None:
        """An edit counts until its pair has moved; only a CPU is asked whether a pair with gradients did."""
        for stack, block in zip(layout.stacks, blocks, strict=True):
            moved = block.pair_moves.tolist() if block.on_host else [present.of_pair(i) for i in stack.pairs]
            for number, did in zip(stack.pairs, moved, strict=True):
                pair = layout.pairs[number]
                if did:
                    self._versions |= {id(pair.lora_A): pair.lora_A._version, id(pair.lora_B): pair.lora_B._version}

    def _tall(self, chunk: Chunk, skipped: Sequence[bool] | None, hyper: Mapping[str, float]) -> Tall:
        """The chunk as the rule sees it, with this step's factors and gradients."""
        factor = chunk.gather_factor()
        grad = chunk.gather_grad(bool(self.param_groups[chunk.group]["maximize"]), skipped)
        if chunk.tall is None:
            scratch = self._scratch
            on_cpu = factor.device.type == "cpu"
            chunk.tall = Tall(
                factor=factor,
                grad=grad,
                state=chunk.state,
                wide=chunk.side == "A",
                scratch=(lambda name: scratch.of(name, chunk)) if on_cpu else None,
            )
        tall = chunk.tall
        tall.factor, tall.grad, tall.hyper, tall.moving = factor, grad, hyper, None
        return tall

    def _reduced(self, layout: Layout, present: Present, hyper: Sequence[_Hyper]) -> list[_Products]:
        """The products of every chunk, in the stacks' order, padded with zeros."""
        rows: list[dict[Side, dict[str, list[Tensor]]]] = [{"A": {}, "B": {}} for _ in layout.stacks]
        for chunk in layout.chunks:
            stack = layout.stacks[chunk.stack]
            tall = self._tall(chunk, present.skipped(chunk, layout), hyper[chunk.group][chunk.side])
            if tall.scratch is None:
                tall = tall.to(torch.float64, self._rule.reduced_state)
            home, missing = rows[chunk.stack][chunk.side], stack.rank - chunk.rank
            for name, product in self._rule.reduce(tall).items():
                whole = torch.nn.functional.pad(product, (0, missing, 0, missing)) if missing else product
                places = home.setdefault(name, [whole] * len(stack.pairs))
                for slot, row in zip(chunk.slots, (whole,) if chunk.single else whole.unbind(0), strict=True):
                    places[slot] = row
        return [
            {side: {name: torch.stack(places) for name, places in one[side].items()} for side in SIDES} for one in rows
        ]

    def _block(
        self,
        layout: Layout,
        number: int,
        products: _Products,
        present: Present,
        hyper: Sequence[_Hyper],
    ) -> Block:
        """The block of a stack; pairs with a product that is not finite do not move, and their products are zero."""
        stack = layout.stacks[number]
        device = stack.ranks.device
        every = torch.cat([product for side in SIDES for product in products[side].values()], dim=-1)
        finite = every.isfinite().flatten(1).all(1)
        zeroed = device.type != "cpu" or not bool(finite.all())
        own = [hyper[layout.pairs[i].group] for i in stack.pairs]
        scaling = [self._known_scalings[i] for i in stack.pairs]
        numbers = [[one[side]["lr"] for one in own] for side in SIDES]
        numbers += [scaling, *([one["A"][name] for one in own] for name in _HYPER)]
        sent = stack.numbers_on_device(numbers)
        rates = dict(zip(SIDES, sent[:2], strict=True))
        halves: dict[Side, Half] = {}
        for side in SIDES:
            wide = {name: product.double() for name, product in products[side].items()}
            if zeroed:
                wide = {name: torch.where(finite[:, None, None], product, 0.0) for name, product in wide.items()}
            moves = present.moves(stack, side) & finite
            halves[side] = Half(
                products=wide,
                state=stack.state[side],
                steps=stack.steps[side] + moves,
                moves=moves,
                rate=rates[side],
                edited=_flags(present.edited(layout, stack, side), device),
                length=layout.lengths[number][side],
            )
        return Block(
            halves=halves,
            rank=stack.ranks,
            scaling=sent[2],
            hyper=dict(zip(_HYPER, sent[3:], strict=True)),
            padding=stack.padding,
            epsilon=stack.epsilon,
            on_host=device.type == "cpu",
        )

    def _measured(self, layout: Layout, number: int, block: Block) -> Measured:
        """What the rule measures; ill-conditioned pairs are looked at again."""
        measured, doubtful = self._rule.measure(block)
        if not block.on_host:
            return measured
        stack = layout.stacks[number]
        for slot in (doubtful & block.pair_moves).nonzero().flatten().tolist():
            pair, r = stack.pairs[slot], layout.pairs[stack.pairs[slot]].rank
            view = PairView(
                tall={side: self._alone(layout, pair, side) for side in SIDES},
                state={
                    side: {n: v[slot, :r, :r] if v.ndim == 3 else v[slot] for n, v in stack.state[side].items()}
                    for side in SIDES
                },
                epsilon=stack.epsilon,
            )
            for name, value in self._rule.look_again(view).items():
                row = measured[name][slot]
                if value.ndim:
                    row = row.zero_()[tuple(slice(size) for size in value.shape)]
                row.copy_(value)
        return measured

    def _alone(self, layout: Layout, number: int, side: Side) -> Tall:
        """One factor with its gradient and state, live."""
        chunk, row = layout.chunk_of[number, side]
        parameter = chunk.parameters[row]
        one = Chunk(side, [parameter], chunk.stack, [chunk.slots[row]], chunk.index[row : row + 1], chunk.group, True)
        one.master = None if chunk.master is None else chunk.rows(chunk.master)[row]
        one.state = {name: chunk.rows(tensor)[row] for name, tensor in chunk.state.items()}
        group = self.param_groups[chunk.group]
        grad = one.gather_grad(bool(group["maximize"]), None)
        return Tall(one.gather_factor(), grad, one.state, side == "A", _hyper(group, side))

    def _apply(
        self,
        rule: FactorRule,
        layout: Layout,
        decided: Sequence[Mapping[Side, Coefficients]],
        blocks: Sequence[Block],
        present: Present,
        hyper: Sequence[_Hyper],
    ) -> None:
        ready = [
            {side: Ready(one[side], stack.computing, block, side, rule.still()) for side in SIDES}
            for one, stack, block in zip(decided, layout.stacks, blocks, strict=True)
        ]
        for chunk in layout.chunks:
            own = ready[chunk.stack][chunk.side]
            stays = own.staying(chunk)
            if stays is not None and all(stays):
                continue
            # Small factors were stacked for the products and still are; large ones lie where they are.
            tall = chunk.tall
            if tall is None or chunk.single:
                tall = self._tall(chunk, present.skipped(chunk, layout), hyper[chunk.group][chunk.side])
            tall.moving, tall.steps = own.moving(chunk), own.steps(chunk)
            if own.some_stay:  # times zero, a NaN would stay one
                moves = own.pair_moves[chunk.index]
                tall.grad = torch.where(moves if chunk.single else moves[:, None, None], tall.grad, 0.0)
            rule.apply(tall, *own.of(chunk))
            chunk.scatter(tall.factor, stays)

    def _apply_pairs(
        self,
        rule: JointRule,
        layout: Layout,
        decided: Sequence[Mapping[Side, Coefficients]],
        blocks: Sequence[Block],
    ) -> None:
        for number, stack in enumerate(layout.stacks):
            moving = {side: blocks[number].halves[side].moves.tolist() for side in SIDES}
            numbers = {side: {n: v.tolist() for n, v in decided[number][side].numbers.items()} for side in SIDES}
            for slot, pair in enumerate(stack.pairs):
                if not (moving["A"][slot] or moving["B"][slot]):
                    continue
                r = layout.pairs[pair].rank
                tall = {side: self._alone(layout, pair, side) for side in SIDES}
                matrices = {
                    side: {n: m[slot, :r, :r] for n, m in decided[number][side].matrices.items()} for side in SIDES
                }
                own = {side: {n: v[slot] for n, v in numbers[side].items()} for side in SIDES}
                rule.apply_pair(tall, matrices, own, layout.dense[pair])
                for side in SIDES:
                    chunk, row = layout.chunk_of[pair, side]
                    if chunk.master is not None and moving[side][slot]:
                        chunk.scatter(chunk.master, [place != row for place in range(len(chunk.parameters))])

    def _reread_masters(self, layout: Layout, present: Present) -> None:
        """A 16-bit parameter that something else wrote to (not through `.data`) is believed, not its old master."""
        for stack in layout.stacks:
            for side in SIDES:
                for slot, edited in enumerate(present.edited(layout, stack, side) or ()):
                    chunk, row = layout.chunk_of[stack.pairs[slot], side]
                    if edited and chunk.master is not None:
                        chunk.rows(chunk.master)[row].copy_(full(chunk.parameters[row].detach()))

    # --- scalings and names ---------------------------------------------------------------------------------------

    def _scalings(self) -> list[float]:
        return [float(self.param_groups[p.group]["scaling"][p.place]) for p in pairs_of(self.param_groups)]

    def _check_scalings(self, layout: Layout) -> None:
        for pair, known in zip(layout.pairs, self._known_scalings, strict=True):
            group = self.param_groups[pair.group]
            said = float(group["scaling"][pair.place])
            reader = self._readers.get(id(pair.lora_A))
            found = said if reader is None else reader()
            if found != known or said != known:
                raise ConfigError(
                    f"the scaling of {pair.describe(group.get('names'))} went from {known:g} to "
                    f"{found if found != known else said:g} between steps, which changes the update in one jump: put "
                    "it back, or announce it with announce_scaling(lora_A, scaling)"
                )

    def _names(self) -> list[str]:
        found = []
        for number, group in enumerate(self.param_groups):
            count = len(group["params"])
            if group["kind"] == "lora_pair":
                told = group.get("names") or [f"pair {place} of group {number}" for place in range(count // 2)]
                found += [f"{name}.{half}" for name in told for half in ("lora_A", "lora_B")]
            else:
                found += [f"parameter {place} of group {number}" for place in range(count)]
        return found


def _given_groups(source: Iterable[Any]) -> list[dict[str, Any]]:
    found = list(source)
    if not all(isinstance(group, Mapping) and "params" in group for group in found):
        raise ConfigError(
            "an optimizer over pairs takes a PEFT model, or groups such as {'kind': 'lora_pair', 'params': [A1, B1, "
            "A2, B2, ...], 'scaling': [s1, s2, ...]}: a bare list of parameters does not say which are pairs"
        )
    return [{**group, "params": _listed(group["params"])} for group in found]


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _flags(edited: Sequence[bool] | None, device: torch.device) -> Tensor | None:
    return None if edited is None else torch.tensor(edited, device=device)


def _hyper(group: Mapping[str, Any], side: Side) -> dict[str, float]:
    """The settings of one side of a group; LoRA+ gives lora_B a rate of its own."""
    rate = float(group["lr"]) * (float(group.get("lr_ratio") or 1.0) if side == "B" else 1.0)
    values = (rate, *group["betas"], group["eps"], group["weight_decay"])
    return {name: float(value) for name, value in zip(("lr", *_HYPER), values, strict=True)}
