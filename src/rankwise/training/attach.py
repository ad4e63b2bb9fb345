"""From a model and a recipe to a session: targets, calibration, plan, adapter, start; refusals come before the cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.attach import AdaptedLayer, adapted_layers, attach_lora, in_slots, write_factors
from rankwise.adapters.fingerprint import architecture_fingerprint, check_finite_weights, weights_fingerprint
from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.adapters.refusals import refuse_adapted, refuse_wrapped
from rankwise.adapters.targets import resolve_targets
from rankwise.adapters.written import narrow_dtype
from rankwise.calibration.as_found import random_states_restored
from rankwise.calibration.batches import Loss
from rankwise.calibration.processes import assert_equal_everywhere
from rankwise.calibration.statistics import GradientStatistics, StatisticsRequest
from rankwise.errors import CalibrationError, ConfigError, PlanError, RecipeError
from rankwise.methods.base import Budget, Factors, Method, Slot, Start
from rankwise.methods.recipe import METHODS, Recipe, Situation
from rankwise.ranks.plan import ModelIdentity, RankPlan
from rankwise.ranks.shapes import LayerShape, uniform_budget
from rankwise.training.beside import kept_validation, make_schedule, planned_slots, put_offset
from rankwise.training.calibrating import Calibration, calibration_notes, gathered, kept_calibration
from rankwise.training.session import AdapterSettings, CalibrationSummary, Session
from rankwise.training.trial import TrialLoss, reread

__all__ = ["Calibration", "Methods", "Patterns", "attach", "plan"]

Methods = Method | str | Sequence[Method | str] | Recipe
Patterns = str | Sequence[str]


def plan(
    model: nn.Module,
    methods: Methods = "lora",
    *,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: Patterns | None = "all-linear",
    exclude_modules: Patterns | None = None,
    modules_to_save: Sequence[str] | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    seed: int = 0,
    loss: Loss | None = None,
) -> RankPlan:
    """The ranks that `attach` would give this model, without attaching anything; the model is left as it was.

    Args:
        model: the base model.
        methods: one method or id, or a list of them.
        r: the budget: the parameters of a uniform LoRA of this rank on the same layers.
        lora_alpha: alpha, > 0.
        target_modules: which linear layers; see `adapters.targets.resolve_targets`.
        exclude_modules: which of them to leave out.
        modules_to_save: modules that will be trained in full.
        calibration: batches, needed if a method asks for gradient statistics.
        seed: the run's seed.
        loss: `loss(model, batch) -> (mean loss, weight)` if the model's own does not serve.

    Returns:
        The plan, equal in every process.

    Raises:
        ConfigError: a setting, target, budget or recipe that cannot be used.
        CalibrationError: statistics that could not be taken.
        ModelError: non-finite base weights.
    """
    job = _prepare(
        model,
        methods,
        r,
        lora_alpha,
        target_modules,
        exclude_modules,
        modules_to_save,
        seed,
        kept_calibration(calibration),
    )
    job.require_calibration((job.recipe.allocate,))
    made = job.early_plan() or job.allocate(job.collect((job.recipe.allocate,), loss))
    job.check_ranks(made)
    return made


def attach(
    model: nn.Module,
    methods: Methods = "lora",
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Patterns | None = "all-linear",
    exclude_modules: Patterns | None = None,
    modules_to_save: Sequence[str] | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    plan: RankPlan | None = None,
    task_type: str | None = None,
    seed: int | None = None,
    validation: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Session:
    """Puts an adapter on the model as the methods want it, and hands back the session that trains it.

    The base weights are written only where a method was told to (LoRA-GA's `offset: base`, XGBLoRA's `accumulate:
    merge`; undone by `close`), and the global random states stay as they are.

    Args:
        model: the base model, without adapters.
        methods: one method or id, or a list of them.
        r: the budget: the parameters of a uniform LoRA of this rank on the same layers.
        lora_alpha: alpha, > 0.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        target_modules: which linear layers; see `adapters.targets.resolve_targets`.
        exclude_modules: which of them to leave out.
        modules_to_save: modules that are trained in full.
        calibration: batches, needed if a method asks for gradient statistics.
        plan: ranks to use instead of allocating; `r`, `lora_alpha`, the scaling rule and the layers are then the
            plan's, `target_modules` is not looked at, and the methods give the start. Calibration is needed only if the
            start asks for it.
        task_type: PEFT's task type.
        seed: the run's seed; by default the plan's, or 0.
        validation: batches for schedules that score.
        loss: `loss(model, batch) -> (mean loss, weight)` if the model's own does not serve.

    Returns:
        The session; `session.model` is a stock `peft.PeftModel`.

    Raises:
        ConfigError: a setting, target, budget, plan or recipe that cannot be used.
        CalibrationError: statistics that could not be taken.
        ModelError: non-finite base weights, or a model that is wrapped or already carries an adapter.
    """
    source = kept_calibration(calibration)
    if plan is None:
        job = _prepare(
            model, methods, r, lora_alpha, target_modules, exclude_modules, modules_to_save, seed or 0, source
        )
        owners: tuple[Method, ...] = (job.recipe.allocate, job.recipe.initialize)
    else:
        job = _prepare_planned(model, methods, plan, seed, source)
        owners = (job.recipe.initialize,)
    with random_states_restored():
        scored = kept_validation(job.recipe, validation)
    job.require_calibration(owners)
    early = job.early_plan()
    if early is not None:
        job.check_ranks(early)
        job = replace(job, budget=replace(job.budget, ranks=early.ranks))
    statistics = job.collect(owners, loss)
    final = job.allocate(statistics) if early is None else early
    job.check_ranks(final)
    settings = AdapterSettings(
        lora_dropout=lora_dropout, modules_to_save=tuple(modules_to_save or ()), task_type=task_type
    )
    # Hashed before anything can write it.
    untouched = None if job.recipe.writes_base is None else weights_fingerprint(model)
    with random_states_restored():
        peft_model = attach_lora(model, final, slots=planned_slots(job.recipe, final), **settings.arguments())
        layers = adapted_layers(peft_model, settings.adapter_name)
        told = _write_start(peft_model, layers, job, final, statistics, loss)
    assert_equal_everywhere(_hash(final, layers), "the plan and the factors at step 0")
    offset = put_offset(peft_model, layers, job.recipe)
    with random_states_restored():
        schedule = make_schedule(
            job.recipe, peft_model, layers, final.seed, offset=offset, validation=scored, loss=loss
        )
    return Session(
        peft_model,
        final,
        job.recipe,
        final.seed,
        settings=settings,
        offset=offset,
        schedule=schedule,
        calibration=None if statistics is None else CalibrationSummary.of(statistics),
        notes=(*(calibration_notes(model, source, statistics) if statistics and source else ()), *told),
        base_weights=untouched,
    )


@dataclass(frozen=True)
class _Job:
    """What attach and plan have in common once the settings are checked."""

    model: nn.Module
    recipe: Recipe
    layers: tuple[LinearLayer, ...]
    budget: Budget
    seed: int
    identity: ModelIdentity
    notes: tuple[str, ...]
    calibration: Calibration | None
    given: RankPlan | None = None

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    def request(self, owners: Sequence[Method]) -> StatisticsRequest | None:
        asked = {owner.id: owner.request(self.shapes, self.budget, self.seed) for owner in owners}
        requests = {name: request for name, request in asked.items() if request is not None}
        if len(requests) > 1:
            raise RecipeError(f"{' and '.join(requests)} both ask for gradient statistics: use one of them")
        return next(iter(requests.values()), None)

    def require_calibration(self, owners: Sequence[Method]) -> None:
        if self.calibration is None and self.request(owners) is not None:
            raise CalibrationError(
                f"{'+'.join(self.recipe.ids)} needs gradient statistics: pass calibration=batches, a few dozen "
                "batches with labels as training will see them"
            )

    def collect(self, owners: Sequence[Method], loss: Loss | None) -> GradientStatistics | None:
        request = self.request(owners)
        if request is None or self.calibration is None:
            return None
        with random_states_restored():
            return gathered(self.model, self.layers, self.calibration, request, seed=self.seed, loss=loss)

    def early_plan(self) -> RankPlan | None:
        """The plan, if it is known before calibration: a given one, or that of an allocator that asks for nothing."""
        if self.given is not None:
            return self.given
        return self.allocate(None) if self.request((self.recipe.allocate,)) is None else None

    def check_ranks(self, final: RankPlan) -> None:
        ranks = final.ranks
        live = [shape for shape in self.shapes if ranks[shape.name] > 0]
        for method in self.recipe.methods:
            method.check_ranks(live, [ranks[shape.name] for shape in live])

    def allocate(self, statistics: GradientStatistics | None) -> RankPlan:
        allocation = self.recipe.allocate.allocate(self.shapes, self.budget, statistics)
        ranks = dict(zip((shape.name for shape in self.shapes), allocation.ranks, strict=True))
        made = RankPlan.from_shapes(
            self.shapes,
            allocation.ranks,
            r=self.budget.r,
            lora_alpha=self.budget.lora_alpha,
            scaling_rule=self.recipe.scale.scaling_rule(),
            methods=self.recipe.ids,
            budget=self.budget.parameters,
            seed=self.seed,
            model=self.identity,
            importance=allocation.importance,
            reasons=allocation.reasons,
            notes=(*self.notes, *allocation.notes, *self.recipe.notes(ranks, self.budget)),
            overspend_allowed=allocation.overspend_allowed,
        )
        assert_equal_everywhere(made.hash(), "the rank plan")
        return made


def _prepare(
    model: nn.Module,
    methods: Methods,
    r: int,
    lora_alpha: float,
    target_modules: Patterns | None,
    exclude_modules: Patterns | None,
    modules_to_save: Sequence[str] | None,
    seed: int,
    calibration: Calibration | None,
) -> _Job:
    recipe = Recipe.of(methods)
    _check_budget(r, lora_alpha)
    targets = resolve_targets(model, target_modules, exclude_modules=exclude_modules, modules_to_save=modules_to_save)
    recipe.check(_situation(targets.layers, calibration))
    shapes = [layer.shape for layer in targets.layers]
    said = Budget(r=r, lora_alpha=float(lora_alpha), parameters=uniform_budget(shapes, r))
    budget = recipe.allocate.live_budget(said)
    check_finite_weights(targets.layers, model)
    return _Job(model, recipe, targets.layers, budget, seed, _identity(model), targets.notes, calibration)


def _prepare_planned(
    model: nn.Module, methods: Methods, given: RankPlan, seed: int | None, calibration: Calibration | None
) -> _Job:
    recipe = Recipe.of(methods)
    refuse_wrapped(model)
    refuse_adapted(model)
    identity = _identity(model)
    modules = dict(model.named_modules())
    views = [view_linear(name, modules[name]) for name in given.ranks if name in modules]
    found = [view for view in views if view is not None]
    if not found:
        raise PlanError(
            f"the plan was made for another model ({given.model.name or 'unnamed'}): none of its {len(given.layers)} "
            f"layers (first: {given.layers[0].name!r}) is a linear layer of this {type(model).__name__}"
        )
    given.validate_for([view.shape for view in found])
    if given.model.fingerprint and given.model.fingerprint != identity.fingerprint:
        raise PlanError(
            f"the plan was made for {given.model.name or 'a model'} with the architecture {given.model.fingerprint}; "
            f"this model ({identity.name or type(model).__name__}) has {identity.fingerprint}: make a new plan for it"
        )
    live = tuple(view for view in found if given.ranks[view.name] > 0)
    recipe.check(_situation(live, calibration))
    check_finite_weights(live, model)
    _check_scaling(recipe, given)
    notes = _notes_of_ranks(given)
    budget = Budget(r=given.r, lora_alpha=given.lora_alpha, parameters=given.budget)
    if given.methods != recipe.ids:
        notes = (
            *notes,
            f"ranks and the scaling rule {given.scaling_rule} from a plan of {'+'.join(given.methods)}, "
            f"start from {'+'.join(recipe.ids)}",
        )
    notes += tuple(note for note in recipe.notes(given.ranks, budget) if note not in notes)
    used = replace(given, methods=recipe.ids, seed=given.seed if seed is None else seed, model=identity, notes=notes)
    return _Job(model, recipe, live, budget, used.seed, identity, (), calibration, given=used)


def _notes_of_ranks(given: RankPlan) -> tuple[str, ...]:
    """What a plan's notes say of its ranks; what other methods said of their settings then is said anew."""
    silent = [name for name in given.methods if name in METHODS and Slot.ALLOCATE not in METHODS[name].slots]
    leads = tuple(f"{lead}: " for lead in (*silent, *([" + ".join(given.methods)] if len(given.methods) > 1 else ())))
    return tuple(note for note in given.notes if not leads or not note.startswith(leads))


def _check_scaling(recipe: Recipe, given: RankPlan) -> None:
    """A method that is its scaling may not run under another one's: the result would carry its name only."""
    for method in recipe.methods:
        if given.scaling_rule not in method.scaling_rules:
            allowed = " or ".join(f'"{rule}"' for rule in sorted(method.scaling_rules))
            raise PlanError(
                f'the plan\'s scaling rule is "{given.scaling_rule}" (made by {"+".join(given.methods)}), and '
                f'{method.id} runs with {allowed}: set "scaling_rule" in the plan file, or make the plan anew'
            )
    owner = recipe.owner(Slot.SCALE)
    if owner is not None and owner.scaling_rule() != given.scaling_rule:
        raise PlanError(
            f'the plan\'s scaling rule is "{given.scaling_rule}" (made by {"+".join(given.methods)}) and {owner.id} '
            f'scales by "{owner.scaling_rule()}": make the plan with {owner.id}, or set "scaling_rule" to '
            f'"{owner.scaling_rule()}" in the plan file'
        )


def _check_budget(r: int, lora_alpha: float) -> None:
    faults = []
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        faults.append(f"r is {r!r}: it must be a whole number of at least 1")
    number = isinstance(lora_alpha, int | float) and not isinstance(lora_alpha, bool)
    if not number or not 0 < lora_alpha < float("inf"):
        faults.append(f"lora_alpha is {lora_alpha!r}: it must be a number above 0")
    if faults:
        raise ConfigError(faults)


def _situation(layers: Sequence[LinearLayer], calibration: Calibration | None) -> Situation:
    return Situation(
        quantized=any(layer.quantized for layer in layers),
        offloaded=any(layer.device.type == "meta" for layer in layers),
        collector="auto" if calibration is None else calibration.collector,
        narrow=narrow_dtype(layers),
    )


def _write_start(
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    job: _Job,
    final: RankPlan,
    statistics: GradientStatistics | None,
    loss: Loss | None,
) -> tuple[str, ...]:
    """Factors at step 0: the initializer's, then what it refines by evaluating a few calibration batches; its notes."""
    method = job.recipe.initialize
    start: dict[str, Factors] = {}
    ranks = final.ranks
    for name, layer in layers.items():
        start[name] = method.initialize(
            Start(
                layer=layer.base,
                rank=ranks[name],
                divisor=final.lora_alpha / layer.scaling,
                budget=job.budget,
                seed=final.seed,
                dtype_cast=_rounding(layer.lora_A.dtype),
                statistics=None if statistics is None else statistics.layers[name],
            )
        )
        write_factors(layer, *in_slots(layer, start[name].lora_A, start[name].lora_B))
    told = method.start_notes(statistics, start, final.seed)
    if type(method).refine is Method.refine or job.calibration is None:
        return told
    source = job.calibration
    trial = TrialLoss(
        model,
        layers,
        reread(source.batches, source.max_batches),
        loss=loss,
        autocast_dtype=source.autocast_dtype,
    )
    for name, factors in (method.refine(start, trial) or {}).items():
        write_factors(layers[name], *in_slots(layers[name], factors.lora_A, factors.lora_B))
    return told


def _rounding(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype).to(torch.float32)


def _identity(model: nn.Module) -> ModelIdentity:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return ModelIdentity(
        name=Path(name).name if Path(name).is_dir() else name, fingerprint=architecture_fingerprint(model)
    )


def _hash(final: RankPlan, layers: Mapping[str, AdaptedLayer]) -> str:
    """The plan's hash with a sum over the start, cheap enough to compare in every process."""
    total = sum(float(layer.lora_A.detach().double().sum()) for layer in layers.values())
    total += sum(float(layer.lora_B.detach().double().abs().sum()) for layer in layers.values())
    return f"{final.hash()}:{total:.17g}"
