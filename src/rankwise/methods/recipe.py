"""Which methods go together: the slots of a recipe, the one table of refused combinations, and the one of remarks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from rankwise.errors import RecipeError
from rankwise.methods.base import Budget, Method, Slot
from rankwise.methods.lora import LoRA
from rankwise.methods.registry import METHODS, method_class, method_from_id

__all__ = [
    "LORA_OPTIONS",
    "METHODS",
    "REFUSALS",
    "REMARKS",
    "Recipe",
    "Refusal",
    "Remark",
    "Situation",
    "method_class",
    "method_from_id",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a recipe is asked to run in, as far as it is known; the defaults refuse nothing.

    Args:
        quantized: whether a target's weight is stored in 4 or 8 bits.
        offloaded: whether parameters lie on the meta device or on disk.
        collector: the gradient collector asked for.
        lora_options: options of PEFT's LoraConfig that were asked for beside ours.
        fsdp: whether the trainer shards the model with FSDP.
        deepspeed: the ZeRO stage of a DeepSpeed engine (0 shards nothing); None without one.
        learning_rate_ratio: the rate of lora_B over that of lora_A, as LoRA+ sets it.
        narrow: the dtype of a target's weight that is narrower than float32; empty if there is none.
        optim: the optimizer that the trainer builds where the recipe brings none, by TrainingArguments' name; empty
            where that is not known.
    """

    quantized: bool = False
    offloaded: bool = False
    collector: Literal["auto", "outer", "param"] = "auto"
    lora_options: Mapping[str, object] = field(default_factory=dict)
    fsdp: bool = False
    deepspeed: int | None = None
    learning_rate_ratio: float = 1.0
    narrow: str = ""
    optim: str = ""


@dataclass(frozen=True)
class Recipe:
    """A set of methods whose slots do not collide; slots that nobody fills behave as plain LoRA.

    Args:
        methods: in the order given; at least one.

    Raises:
        RecipeError: if two fill the same slot, one is named twice, `lora` stands beside another, or the table refuses
            them; all faults at once.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        self.check(Situation())

    @classmethod
    def of(cls, methods: "Method | str | Sequence[Method | str] | Recipe") -> Self:
        """A recipe from one method, one id, or a list of either.

        Raises:
            RecipeError: for an unknown id, or methods that do not go together.
        """
        if isinstance(methods, Recipe):
            return cls(methods.methods)
        listed = [methods] if isinstance(methods, Method | str) else list(methods)
        return cls(tuple(method_from_id(method) if isinstance(method, str) else method for method in listed))

    @property
    def ids(self) -> tuple[str, ...]:
        """The methods' ids, in order."""
        return tuple(method.id for method in self.methods)

    def owner(self, slot: Slot) -> Method | None:
        """The method that fills the slot, or None."""
        return next((method for method in self.methods if slot in method.slots), None)

    @property
    def allocate(self) -> Method:
        """Who decides the ranks; plain LoRA's uniform rank if nobody does."""
        return self.owner(Slot.ALLOCATE) or LoRA()

    @property
    def initialize(self) -> Method:
        """Who writes the factors at step 0; plain LoRA's if nobody does."""
        return self.owner(Slot.INITIALIZE) or LoRA()

    @property
    def scale(self) -> Method:
        """Who gives the scaling rule; plain LoRA's alpha / rank if nobody does."""
        return self.owner(Slot.SCALE) or LoRA()

    @property
    def optimize(self) -> Method | None:
        """Who moves the factors; None is AdamW."""
        return self.owner(Slot.OPTIMIZE)

    @property
    def schedule(self) -> Method | None:
        """Who acts around steps; None does nothing."""
        return self.owner(Slot.SCHEDULE)

    @property
    def needs_gradients(self) -> bool:
        """Whether a method asks for gradient statistics, so that calibration batches are needed."""
        return any(type(method).request is not Method.request for method in self.methods)

    @property
    def writes_base(self) -> Method | None:
        """The method that writes the base weights while training lasts, if there is one."""
        return next((method for method in self.methods if method.writes_base is not None), None)

    @property
    def unclipped(self) -> Method | None:
        """The method under which the trainer must not clip gradients, if there is one."""
        return next((method for method in self.methods if method.unclipped), None)

    @property
    def learning_rates(self) -> tuple[float, float, float]:
        """The recommended rates: those of whoever moves the factors, else of whoever starts them, else the first's."""
        return (self.optimize or self.owner(Slot.INITIALIZE) or self.methods[0]).learning_rates

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What the methods, and their combination, have to say beside a plan."""
        own = tuple(note for method in self.methods for note in method.notes(ranks, budget))
        return own + tuple(remark.text(self) for remark in REMARKS if remark.applies(self))

    def check(self, situation: Situation) -> None:
        """Refuses what cannot work in this situation, before anything is computed.

        Raises:
            RecipeError: with every refusal that applies; each names both sides and what is allowed.
        """
        faults = [refusal.reason(self, situation) for refusal in REFUSALS if refusal.applies(self, situation)]
        if faults:
            raise RecipeError(faults)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line of the table: when it applies, and why it is refused."""

    applies: Callable[[Recipe, Situation], bool]
    reason: Callable[[Recipe, Situation], str]


@dataclass(frozen=True, slots=True)
class Remark:
    """One combination that is allowed and worth a word."""

    applies: Callable[[Recipe], bool]
    text: Callable[[Recipe], str]


LORA_OPTIONS: Mapping[str, str] = {
    "bias": "a plain adapter holds no bias; leave it out",
    "init_lora_weights": "the method owns the start of the factors; leave it out",
    "use_rslora": "the method owns the scaling; use rora for alpha / sqrt(rank)",
    "rank_pattern": "the plan owns the ranks; edit them in a plan file",
    "alpha_pattern": "the plan owns the scalings; leave it out",
    "trainable_token_indices": "it trains embedding rows outside the factors; leave it out",
    "use_dora": "its norm depends on the update; leave it out",
    "lora_bias": "a bias on lora_B is not part of a plain adapter; leave it out",
    "use_qalora": "QALoRA pools the input of lora_A; leave it out",
    "use_bdlora": "it splits the factors in blocks; leave it out",
    "kasa_config": "KaSA writes the base weights; leave it out",
    "velora_config": "VeLoRA changes what lora_A sees; leave it out",
    "monteclora_config": "MonteCLoRA samples the update; leave it out",
    "arrow_config": "Arrow routes between adapters; leave it out",
    "alora_invocation_tokens": "Activated LoRA adapts some tokens only; leave it out",
    "target_parameters": "expert and other bare parameters are not linear layers; use target_modules",
    "layer_replication": "replicated layers share weights; leave it out",
    "loftq_config": "LoftQ writes the base weights; leave it out",
    "corda_config": "CorDA writes the base weights; leave it out",
    "eva_config": "EVA initializes lora_A itself; leave it out",
    "lora_ga_config": "PEFT's LoRA-GA writes the base weights; leave it out",
}
"""PEFT options that change what lora_B @ lora_A means, or who owns the factors: the reason, and what to do."""
_NEUTRAL: Mapping[str, object] = {"bias": "none", "init_lora_weights": True}
"""Those whose value that changes nothing is not an empty one."""


def _colliding(recipe: Recipe) -> dict[Slot, list[str]]:
    owners = {slot: [method.id for method in recipe.methods if slot in method.slots] for slot in Slot}
    return {slot: ids for slot, ids in owners.items() if len(ids) > 1}


def _refused_options(situation: Situation) -> list[str]:
    told = []
    for key, value in situation.lora_options.items():
        if key in _NEUTRAL and value != _NEUTRAL[key]:
            told.append(f"{key}: {value!r}: {LORA_OPTIONS[key]}")
        elif key in LORA_OPTIONS and key not in _NEUTRAL and value not in (None, False, (), [], {}):
            told.append(f"{key}: {LORA_OPTIONS[key]}")
    return told


def _apart(first: Collection[str], second: Collection[str], why: str) -> Refusal:
    """Methods of two groups that never go together."""

    def named(recipe: Recipe, group: Collection[str]) -> list[str]:
        return [method_id for method_id in recipe.ids if method_id in group]

    return Refusal(
        lambda recipe, _: bool(named(recipe, first) and named(recipe, second)),
        lambda recipe, _: (
            f"method: {' and '.join([*named(recipe, first), *named(recipe, second)])} do not go together: {why}; "
            "keep one of them"
        ),
    )


def _moved_start(recipe: Recipe) -> bool:
    """Whether a start is subtracted again, beside the adapter or from the base."""
    return recipe.initialize.offset_place != "none"


def _unready_engine(recipe: Recipe, situation: Situation) -> str:
    """The engine that a method of the recipe cannot train under, in words; empty if it can."""
    if situation.fsdp and (recipe.optimize or {"ab-lora", "beamlora", "sora"} & set(recipe.ids)):
        return "FSDP"
    stage = situation.deepspeed
    perturbs = {"ggpo", "mgpo"} & set(recipe.ids)
    if stage is not None and (recipe.optimize or _NO_DEEPSPEED & set(recipe.ids) or (perturbs and stage >= 2)):
        return f"DeepSpeed ZeRO-{stage}"
    return ""


def _unread_momentum(recipe: Recipe, situation: Situation) -> str:
    """The optimizer whose momentum mgpo wants and cannot read, by name; empty if it can, or keeps its own."""
    schedule = recipe.schedule
    wanted = getattr(schedule, "own_momentum", "") == "never" and getattr(schedule, "rho", 0) > 0
    if not wanted:
        return ""
    if recipe.optimize is not None:
        return recipe.optimize.id
    return "" if situation.optim in ("", *_READABLE) else situation.optim


_READABLE = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
"""Of transformers 5.23's optimizers, those that are torch's Adam or derive from it."""
_PAIR_OPTIMIZERS = ("lora-pro", "lora-rite")
_NO_DEEPSPEED = frozenset({"sora", "ab-lora", "beamlora", "xgblora"})

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        lambda recipe, _: not recipe.methods,
        lambda *_: f"method: a recipe needs at least one method; use one of {', '.join(METHODS)}",
    ),
    Refusal(
        lambda recipe, _: len(set(recipe.ids)) < len(recipe.ids),
        lambda recipe, _: f"method: {', '.join(recipe.ids)} names a method twice; name each once",
    ),
    Refusal(
        lambda recipe, _: "lora" in recipe.ids and len(set(recipe.ids)) > 1,
        lambda recipe, _: (
            f"method: lora is what every unfilled slot does already, beside {_others(recipe, 'lora')}; leave lora out"
        ),
    ),
    Refusal(
        lambda recipe, _: len(set(recipe.ids)) == len(recipe.ids) and bool(_colliding(recipe)),
        lambda recipe, _: "; ".join(
            f"method: {' and '.join(ids)} both fill the {slot} slot; keep one of them"
            for slot, ids in _colliding(recipe).items()
        ),
    ),
    _apart(
        _PAIR_OPTIMIZERS,
        ("sora", "beamlora"),
        "the optimizer's algebra takes the update for scaling * lora_B @ lora_A, and a gate stands between the two",
    ),
    _apart(
        _PAIR_OPTIMIZERS,
        ("xgblora",),
        "each round throws the optimizer's state away, and pairs of rank 1 leave it nothing to do",
    ),
    _apart(
        _PAIR_OPTIMIZERS,
        ("ab-lora",),
        "a rank that is switched on again empties its moments, which a pair optimizer does not keep rank by rank",
    ),
    _apart(
        ("gora", "lora-ga"),
        ("xgblora",),
        "every round draws a fresh booster, so that a start computed from gradients would last one round",
    ),
    _apart(
        ("lora-ga",),
        ("ab-lora",),
        "ranks are switched on from a Kaiming start, and pruning breaks the cancellation against lora-ga's own start",
    ),
    Refusal(
        lambda recipe, _: "lora-ga" in recipe.ids and _moved_start(recipe) and _has(recipe, "sora", "beamlora"),
        lambda recipe, _: (
            f"method: lora-ga's start is subtracted again (lora-ga.offset: {recipe.initialize.offset_place}), and "
            f"{_others(recipe, 'lora-ga')} prunes ranks, which breaks the cancellation; keep one of them"
        ),
    ),
    _apart(
        ("gora",),
        ("ab-lora", "beamlora"),
        "both decide the ranks, one before training and one in it",
    ),
    Refusal(
        lambda recipe, _: {"gora", "sora"} <= set(recipe.ids) and not getattr(recipe.schedule, "plan_as_caps", False),
        lambda *_: (
            "method: gora and sora both decide the ranks; gora's can only be the caps that sora prunes from: set "
            "sora.plan_as_caps: true for that, or keep one of them"
        ),
    ),
    Refusal(
        lambda recipe, _: "beamlora" in recipe.ids and recipe.scale.id not in ("lora", "gora", "beamlora"),
        lambda recipe, _: (
            f"method: beamlora runs with the scaling alpha / rank, and {recipe.scale.id} changes it; keep one of them"
        ),
    ),
    Refusal(
        lambda recipe, situation: "beamlora" in recipe.ids and situation.optim not in ("", *_READABLE),
        lambda _, situation: (
            f"training.optim: {situation.optim}: beamlora copies and empties the moments of single ranks, as torch's "
            "Adam and AdamW keep them; use adamw_torch"
        ),
    ),
    Refusal(
        lambda recipe, situation: "lora-rite" in recipe.ids and situation.learning_rate_ratio != 1,
        lambda _, situation: (
            f"loraplus_lr_ratio: {situation.learning_rate_ratio:g}: lora-rite moves lora_A and lora_B by one rate, or "
            "its invariance is lost; use 1"
        ),
    ),
    Refusal(
        lambda _, situation: bool(_refused_options(situation)),
        lambda recipe, situation: f"{_together(recipe)} cannot run with " + "; ".join(_refused_options(situation)),
    ),
    Refusal(
        lambda recipe, situation: recipe.needs_gradients and situation.quantized and situation.collector == "param",
        lambda recipe, _: (
            f"calibration.collector: param reads the gradient of packed weights, which {_together(recipe)} cannot "
            "use on a quantized model; use outer or auto"
        ),
    ),
    Refusal(
        lambda recipe, situation: recipe.needs_gradients and situation.offloaded,
        lambda recipe, _: (
            f"{_together(recipe)} needs gradients, and parts of the model are offloaded to disk or the meta device; "
            "load it without offloading, or use lora or rora"
        ),
    ),
    Refusal(
        lambda recipe, situation: recipe.writes_base is not None and bool(_unwritable(situation)),
        lambda recipe, situation: _written_base(recipe, _unwritable(situation)),
    ),
    Refusal(
        lambda recipe, situation: (
            bool(situation.narrow) and "xgblora" in recipe.ids and recipe.writes_base is recipe.schedule
        ),
        lambda recipe, situation: (
            _written_base(recipe, f"are {situation.narrow} and would lose most of every booster")
            + "; or load the base in float32 (dtype: float32)"
        ),
    ),
    Refusal(
        lambda recipe, situation: bool(_unready_engine(recipe, situation)),
        lambda recipe, situation: (
            f"{_together(recipe)} cannot train under {_unready_engine(recipe, situation)}, which "
            f"{_engine_reason(recipe)}; start it with torchrun or accelerate launch without that engine (DDP)"
            f"{_instead_of_engine(recipe, situation)}"
        ),
    ),
    Refusal(
        lambda recipe, situation: bool(_unread_momentum(recipe, situation)),
        lambda recipe, situation: (
            f"mgpo.own_momentum: never, and {_unread_momentum(recipe, situation)} keeps no momentum of the gradients "
            "that could be read; use auto, or train with AdamW or SGD with momentum"
        ),
    ),
)
"""Every refused combination of methods, and of a recipe with where it runs; a method that arrives adds its lines here.

What is refused whatever the recipe stands where the fact is known: budgets below one rank a layer and ranks above a
layer's size in `ranks`, wrapped models in `adapters.refusals`, sums that do not fit in `calibration.memory`, what the
reader of an export cannot load in `export.consumers`.
"""

REMARKS: tuple[Remark, ...] = (
    Remark(
        lambda recipe: recipe.optimize is not None and _has(recipe, "ggpo", "mgpo"),
        lambda recipe: (
            f"{_together(recipe)}: the perturbation was published with AdamW; nobody has measured it over "
            f"{_mover(recipe)}'s steps"
        ),
    ),
    Remark(
        lambda recipe: _mover(recipe) == "lora-pro" and recipe.scale.scaling_rule().rank_stabilized,
        lambda recipe: (
            f"{_together(recipe)}: the scaling {recipe.scale.scaling_rule()} changes the effective learning rate of "
            "lora-pro's efficient mode: tune the rate again"
        ),
    ),
    Remark(
        lambda recipe: (
            _has(recipe, "xgblora")
            and getattr(recipe.schedule, "booster_rank", None) == 1
            and recipe.scale.scaling_rule().rank_stabilized
        ),
        lambda recipe: (
            f"{_together(recipe)}: boosters of rank 1 have the same scaling under alpha / rank and "
            f"{recipe.scale.scaling_rule()}; {recipe.scale.id} changes nothing"
        ),
    ),
)
"""Combinations that run and deserve a word beside the plan."""


def _has(recipe: Recipe, *ids: str) -> bool:
    return bool(set(ids) & set(recipe.ids))


def _mover(recipe: Recipe) -> str:
    """Who moves the factors, by id."""
    return "adamw" if recipe.optimize is None else recipe.optimize.id


def _written_base(recipe: Recipe, why: str) -> str:
    owner = recipe.writes_base
    assert owner is not None
    assert owner.writes_base is not None
    setting, instead = owner.writes_base
    return f"{owner.id}.{setting} writes the base weights, which {why}; use {instead}, which leaves them alone"


def _unwritable(situation: Situation) -> str:
    """Why the base weights cannot be written; empty if they can."""
    if situation.quantized:
        return "are packed in 4 or 8 bits"
    if situation.fsdp:
        return "FSDP shards"
    return "ZeRO-3 shards" if situation.deepspeed == 3 else ""


def _engine_reason(recipe: Recipe) -> str:
    if recipe.optimize is not None:
        return f"takes the pairs of lora_A and lora_B apart that {recipe.optimize.id} moves together"
    return "owns the gradients and the optimizer's state that the schedule reads and edits"


def _instead_of_engine(recipe: Recipe, situation: Situation) -> str:
    """What would train beside DDP; under DeepSpeed no recipe does, because its optimizer cannot be watched."""
    sharded = "" if _has(recipe, "ab-lora", "beamlora", "sora") else "shard it by fully_shard in a loop of your own"
    if situation.deepspeed is not None:
        return f", or {sharded}" if sharded else ""
    bare = "or use lora, gora or rora, which bring no optimizer and no schedule of their own"
    return f", {sharded}, {bare}" if sharded else f", {bare}"


def _others(recipe: Recipe, method_id: str) -> str:
    return " and ".join(other for other in recipe.ids if other != method_id)


def _together(recipe: Recipe) -> str:
    return " + ".join(recipe.ids)
