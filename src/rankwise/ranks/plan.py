"""The plan: which layer gets how many ranks, with which scaling, and why; immutable, kept as JSON, editable by hand."""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from rankwise.errors import PlanError
from rankwise.ranks import plan_file
from rankwise.ranks.plan_file import nearest
from rankwise.ranks.shapes import LayerShape, ScalingRule, uniform_budget

__all__ = ["LayerPlan", "ModelIdentity", "RankPlan"]

_FAULTS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What tells one base model's architecture from another's.

    Args:
        name: what the user calls the model: a hub id or a folder's name.
        fingerprint: `adapters.fingerprint.architecture_fingerprint` of the model.
    """

    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer gets.

    Args:
        name: the full dotted name, relative to the base model.
        out_features: rows of the weight [out, in].
        in_features: columns of the weight.
        rank: 0 (no adapter) to min(in, out).
        importance: the number behind the rank, in the allocator's own unit; None if nothing was measured.
        reason: why this rank, in a few words.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    importance: float | None = None
    reason: str = ""

    @property
    def shape(self) -> LayerShape:
        """The layer's name and size."""
        return LayerShape(self.name, self.out_features, self.in_features)

    @property
    def parameters(self) -> int:
        """The parameters of lora_A and lora_B: rank * (in + out)."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class RankPlan:
    """Ranks and scalings of all adapted layers; a plan that exists is consistent and within its budget.

    Args:
        layers: one entry a layer, in the order of the model; rank 0 means no adapter.
        r: the reference rank, >= 1.
        lora_alpha: alpha, > 0.
        scaling_rule: what the scaling of every layer follows from.
        methods: ids of the methods behind the plan.
        budget: the most parameters that lora_A and lora_B of all layers may have together.
        seed: the run's seed.
        model: the base model that the plan was made for.
        notes: remarks on the plan as a whole.
        overspend_allowed: whether the ranks may cost more than the budget: the rule of the method keeps none.

    Raises:
        PlanError: a rank outside 0 to min(in, out), a layer named twice, no layer, or more parameters than the budget;
            every fault at once.
    """

    layers: tuple[LayerPlan, ...]
    r: int
    lora_alpha: float
    scaling_rule: ScalingRule
    methods: tuple[str, ...]
    budget: int
    seed: int = 0
    model: ModelIdentity = ModelIdentity()
    notes: tuple[str, ...] = ()
    overspend_allowed: bool = False

    def __post_init__(self) -> None:
        faults = _setting_faults(self.r, self.lora_alpha) + _layer_faults(self.layers)
        faults = faults or _budget_faults(self.layers, self.budget, self.overspend_allowed)
        if faults:
            raise PlanError(_shortened(faults))

    @classmethod
    def from_shapes(
        cls,
        shapes: Sequence[LayerShape],
        ranks: Sequence[int],
        *,
        r: int,
        lora_alpha: float,
        scaling_rule: ScalingRule = ScalingRule.ALPHA_OVER_RANK,
        methods: Sequence[str] = ("lora",),
        budget: int | None = None,
        seed: int = 0,
        model: ModelIdentity | None = None,
        importance: Sequence[float] | None = None,
        reasons: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        overspend_allowed: bool = False,
    ) -> "RankPlan":
        """A plan from layers and their ranks; the budget defaults to a uniform LoRA of rank `r` on these layers."""
        layers = tuple(
            LayerPlan(
                name=shape.name,
                out_features=shape.out_features,
                in_features=shape.in_features,
                rank=rank,
                importance=None if importance is None else importance[i],
                reason="" if reasons is None else reasons[i],
            )
            for i, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
        )
        return cls(
            layers=layers,
            r=r,
            lora_alpha=lora_alpha,
            scaling_rule=scaling_rule,
            methods=tuple(methods),
            budget=uniform_budget(shapes, r) if budget is None else budget,
            seed=seed,
            model=model or ModelIdentity(),
            notes=tuple(notes),
            overspend_allowed=overspend_allowed,
        )

    @cached_property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def __getitem__(self, name: str) -> LayerPlan:
        """The entry of one layer, by its full name.

        Raises:
            PlanError: the plan has no such layer.
        """
        if name not in self._by_name:
            raise PlanError(f"the plan has no layer {name!r}{nearest(name, self._by_name)}")
        return self._by_name[name]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer, by full name, zeros included."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def parameters(self) -> int:
        """The live parameters of lora_A and lora_B over all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def over_budget(self) -> float:
        """By which share of the budget the parameters exceed it; 0.0 within it."""
        return max(0.0, self.parameters / self.budget - 1.0) if self.budget else 0.0

    def scaling(self, name: str) -> float:
        """The multiplier of lora_B @ lora_A in one layer; 0.0 where the rank is 0."""
        rank = self[name].rank
        return self.scaling_rule.scaling(self.lora_alpha, rank, self.r) if rank else 0.0

    def with_ranks(self, ranks: Mapping[str, int]) -> "RankPlan":
        """The plan with other ranks for the named layers.

        Raises:
            PlanError: a name that the plan does not have, or what `RankPlan` itself refuses.
        """
        unknown = [name for name in ranks if name not in self._by_name]
        if unknown:
            raise PlanError(_shortened([f"the plan has no layer {n!r}{nearest(n, self._by_name)}" for n in unknown]))
        layers = tuple(
            replace(layer, rank=ranks[layer.name], reason="set by hand")
            if ranks.get(layer.name, layer.rank) != layer.rank
            else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def hash(self) -> str:
        """16 hexadecimal digits, equal for plans that build the same adapter on the same model.

        Importance, reasons, notes and the budget do not enter; the order of the layers does not matter.
        """
        parts = [
            self.r,
            float(self.lora_alpha),
            self.scaling_rule.value,
            list(self.methods),
            self.seed,
            self.model.fingerprint,
            sorted([x.name, x.out_features, x.in_features, x.rank] for x in self.layers),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The plan as JSON, one line a layer, made to be edited by hand."""
        head = {
            "format": plan_file.FORMAT,
            "version": plan_file.VERSION,
            "model": asdict(self.model),
            "methods": list(self.methods),
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "scaling_rule": self.scaling_rule.value,
            "budget": self.budget,
            "seed": self.seed,
            "notes": list(self.notes),
        }
        if self.overspend_allowed:
            head["overspend_allowed"] = True
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        layers = [f"    {json.dumps(asdict(layer), ensure_ascii=False)}" for layer in self.layers]
        lines.append('  "layers": [\n' + ",\n".join(layers) + "\n  ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> "RankPlan":
        """The plan that `text` holds.

        Args:
            text: what `to_json` wrote, perhaps edited.
            source: what to call it in errors, normally its path.

        Raises:
            PlanError: damaged text, unknown or missing keys, wrong types, ranks above a layer's size, a layer named
                twice, or a budget exceeded; every fault at once.
        """
        data = plan_file.parse(text, source)
        faults: list[str] = []
        settings = plan_file.read_settings(data, faults)
        model = plan_file.read_model(data["model"], faults) if "model" in data else {}
        read = plan_file.read_layers(data["layers"], faults) if "layers" in data else []
        layers = tuple(LayerPlan(**fields) for fields in read)
        faults += _layer_faults(layers) if layers or not faults else []
        if not faults:
            faults = _budget_faults(layers, settings["budget"], settings.get("overspend_allowed", False))
        if faults:
            raise PlanError(_shortened([f"{source}: {fault}" for fault in faults]))
        settings["scaling_rule"] = ScalingRule(settings["scaling_rule"])
        settings["methods"] = tuple(settings["methods"])
        settings["notes"] = tuple(settings.get("notes", ()))
        return cls(layers=layers, model=ModelIdentity(**model), **settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; the file is never seen half-written.

        Raises:
            PlanError: the file cannot be written.
        """
        target = Path(path)
        staged = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            staged.write_text(self.to_json(), encoding="utf-8")
            staged.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                staged.unlink()
            raise PlanError(f"{path}: the plan cannot be written ({error.strerror}): check the path") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RankPlan":
        """The plan in a file.

        Raises:
            PlanError: no such file, or what `from_json` refuses.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise PlanError(f"{path}: the plan is not UTF-8 text: it is damaged or not a plan") from None
        except OSError as error:
            raise PlanError(f"{path}: the plan cannot be read ({error.strerror}): check the path") from None
        return cls.from_json(text, source=str(path))

    def validate_for(self, shapes: Sequence[LayerShape]) -> None:
        """Passes if the plan names exactly these layers with these sizes.

        Args:
            shapes: the target layers of the model at hand.

        Raises:
            PlanError: every layer that is missing on either side or has another size.
        """
        found = {shape.name: shape for shape in shapes}
        if found and not found.keys() & self._by_name.keys():
            raise PlanError(
                f"the plan was made for another model ({self.model.name or 'unnamed'}): none of its {len(self.layers)} "
                f"layers (first: {self.layers[0].name!r}) is among the {len(shapes)} target layers of this one "
                f"(first: {shapes[0].name!r})"
            )
        faults = []
        for layer in self.layers:
            shape = found.get(layer.name)
            if shape is None:
                faults.append(
                    f"layer {layer.name!r} of the plan is not among the model's target layers"
                    f"{nearest(layer.name, found)}"
                )
            elif shape != layer.shape:
                faults.append(
                    f"layer {layer.name!r} is [{layer.out_features}, {layer.in_features}] in the plan and "
                    f"[{shape.out_features}, {shape.in_features}] in the model: the plan is for another model"
                )
        faults += [
            f"target layer {name!r} is missing from the plan: add it (rank 0 leaves it without an adapter) "
            "or take it out of target_modules"
            for name in found
            if name not in self._by_name
        ]
        if faults:
            raise PlanError(_shortened(faults))

    def __str__(self) -> str:
        rows = [("layer", "out x in", "rank", "scaling", "parameters", "importance", "reason")]
        for layer in self.layers:
            size = f"{layer.out_features} x {layer.in_features}"
            importance = "-" if layer.importance is None else f"{layer.importance:.4g}"
            scaling = f"{self.scaling(layer.name):.4g}" if layer.rank else "-"
            rows.append((layer.name, size, str(layer.rank), scaling, f"{layer.parameters:,}", importance, layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in range(1, 6)] + [row[6]]
            lines.append("  ".join(cells).rstrip())
        share = self.parameters / self.budget if self.budget else 0.0
        over = f", over budget by {self.over_budget:.1%}" if self.over_budget else ""
        lines.append(
            f"{self.parameters:,} of {self.budget:,} parameters ({share:.1%}{over}), {'+'.join(self.methods)}, "
            f"r {self.r}, lora_alpha {self.lora_alpha:g}, scaling {self.scaling_rule}"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _setting_faults(r: int, lora_alpha: float) -> list[str]:
    faults = [] if r >= 1 else [f"r is {r}: the reference rank is a whole number >= 1"]
    return faults + ([] if 0 < lora_alpha < math.inf else [f"lora_alpha is {lora_alpha}: it must be a number above 0"])


def _layer_faults(layers: Sequence[LayerPlan]) -> list[str]:
    faults = [] if layers else ["the plan has no layers: at least one is needed"]
    faults += [
        f"layer {x.name!r}: rank {x.rank} is outside 0 to {x.shape.max_rank}, "
        f"the size of a [{x.out_features}, {x.in_features}] layer"
        for x in layers
        if not 0 <= x.rank <= x.shape.max_rank
    ]
    counts = Counter(layer.name for layer in layers)
    return faults + [f"layer {name!r} appears {n} times: keep one" for name, n in counts.items() if n > 1]


def _budget_faults(layers: Sequence[LayerPlan], budget: int, overspend_allowed: bool) -> list[str]:
    used = sum(layer.parameters for layer in layers)
    if used <= budget or overspend_allowed:
        return []
    return [
        f'the ranks cost {used} parameters, {used - budget} above "budget": {budget}; lower some ranks, or set '
        f'"budget" to {used} if the larger adapter is wanted'
    ]


def _shortened(faults: Sequence[str]) -> list[str]:
    more = len(faults) - _FAULTS_SHOWN
    return list(faults) if more <= 1 else [*faults[:_FAULTS_SHOWN], f"... and {more} more of this kind"]
