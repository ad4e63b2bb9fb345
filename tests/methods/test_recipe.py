"""Recipes: slots and their owners, ids, and the table of refused combinations."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from rankwise.errors import ConfigError, RecipeError
from rankwise.methods.base import Budget, Method, Slot
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.recipe import METHODS, REFUSALS, Recipe, Situation, method_class, method_from_id
from rankwise.methods.rora import RoRA


@dataclass(frozen=True, kw_only=True)
class Mover(Method):
    """A stand-in for the optimizers of later versions: fills the optimize slot alone."""

    id: ClassVar[str] = "mover"
    title: ClassVar[str] = "Mover"
    source: ClassVar[str] = "none"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 1e-3)


SORA, BEAMLORA, AB_LORA, XGBLORA = (
    method_from_id(method_id) for method_id in ("sora", "beamlora", "ab-lora", "xgblora")
)
PRO, RITE = method_from_id("lora-pro"), method_from_id("lora-rite")
XGB_MERGE = method_from_id("xgblora", {"accumulate": "merge"})
LORA_GA, GA_BASE = method_from_id("lora-ga"), method_from_id("lora-ga", {"offset": "base"})
GGPO, MGPO = method_from_id("ggpo"), method_from_id("mgpo")


def test_slots_that_nobody_fills_are_plain_lora() -> None:
    recipe = Recipe.of(RoRA())
    assert isinstance(recipe.allocate, LoRA)
    assert isinstance(recipe.initialize, LoRA)
    assert isinstance(recipe.scale, RoRA)
    assert recipe.optimize is None
    assert recipe.schedule is None


def test_gora_owns_its_three_slots_beside_an_optimizer() -> None:
    gora, mover = GoRA(), Mover()
    recipe = Recipe.of([mover, gora])
    assert recipe.allocate is recipe.initialize is recipe.scale is gora
    assert recipe.optimize is mover
    assert recipe.ids == ("mover", "gora")


@pytest.mark.parametrize("given", ["gora", ["gora"], GoRA(), [GoRA()], (GoRA(),), Recipe.of("gora")])
def test_one_method_an_id_a_list_or_a_recipe_are_the_same(given: object) -> None:
    assert Recipe.of(given).methods == (GoRA(),)  # type: ignore[arg-type]


def test_two_methods_on_one_slot_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="gora and rora both fill the scale slot; keep one of them"):
        Recipe.of(["gora", "rora"])
    with pytest.raises(RecipeError, match="lora-pro and lora-rite both fill the optimize slot; keep one of them"):
        Recipe.of([PRO, RITE])
    with pytest.raises(RecipeError, match="ggpo and mgpo both fill the schedule slot"):
        Recipe.of([GGPO, MGPO])


def test_lora_beside_another_method_is_refused() -> None:
    with pytest.raises(RecipeError, match="lora is what every unfilled slot does already, beside rora"):
        Recipe.of(["rora", "lora"])


def test_naming_a_method_twice_or_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="names a method twice"):
        Recipe.of([GoRA(), GoRA(gamma=0.1)])
    with pytest.raises(RecipeError, match="at least one method; use one of lora, gora, rora"):
        Recipe.of([])


def test_the_ids_are_the_ten_methods_and_lora() -> None:
    assert set(METHODS) == {
        "lora", "gora", "rora", "lora-ga", "lora-pro", "lora-rite", "ggpo", "mgpo", "ab-lora", "sora", "beamlora",
        "xgblora",
    }  # fmt: skip


@pytest.mark.parametrize(("given", "near"), [("gorra", "gora"), ("LoRA", "lora"), ("lora_pro", "lora-pro")])
def test_an_unknown_id_tells_the_nearest_and_all(given: str, near: str) -> None:
    with pytest.raises(RecipeError, match=rf"not known.*did you mean {near}\?.*use one of lora, gora, rora"):
        method_class(given)


def test_unknown_settings_are_told_all_at_once_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        method_from_id("gora", {"gama": 0.1, "rank_max": 3})
    assert "gora.gama is not a setting (did you mean gamma?)" in caught.value.faults[0]
    assert "gora.rank_max is not a setting" in caught.value.faults[1]
    with pytest.raises(ConfigError, match="rora has no settings of its own"):
        method_from_id("rora", {"alpha": 16})


def test_unknown_presets_are_told() -> None:
    with pytest.raises(ConfigError, match="gora has no preset 'papers'; use one of paper, official"):
        method_from_id("gora", preset="papers")
    with pytest.raises(ConfigError, match="lora has no preset 'paper'; it has none"):
        method_from_id("lora", preset="paper")


def test_gora_and_lora_ga_need_gradients() -> None:
    assert {name for name in METHODS if Recipe.of(name).needs_gradients} == {"gora", "lora-ga"}


PRUNES = r"both decide the ranks, one before training and one in it; keep one of them"
STARTS = r"every round draws a fresh booster, so that a start computed from gradients would last one round"


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([SORA, PRO], "lora-pro and sora do not go together: the optimizer's algebra takes the update for scaling"),
        ([RITE, SORA], "lora-rite and sora do not go together: .*a gate stands between the two; keep one of them"),
        ([PRO, BEAMLORA], "lora-pro and beamlora do not go together: .*a gate stands between"),
        ([RITE, BEAMLORA], "lora-rite and beamlora do not go together: .*a gate stands between"),
        ([PRO, XGBLORA], "lora-pro and xgblora do not go together: each round throws the optimizer's state away"),
        ([XGBLORA, RITE], "lora-rite and xgblora do not go together: each round throws the optimizer's state away"),
        ([PRO, AB_LORA], "lora-pro and ab-lora do not go together: a rank that is switched on again empties"),
        ([RITE, AB_LORA], "lora-rite and ab-lora do not go together: a rank that is switched on again empties"),
        ([GoRA(), XGBLORA], f"gora and xgblora do not go together: {STARTS}"),
        ([LORA_GA, XGBLORA], f"lora-ga and xgblora do not go together: {STARTS}"),
        ([LORA_GA, AB_LORA], "lora-ga and ab-lora do not go together: ranks are switched on from a Kaiming start"),
        ([LORA_GA, SORA], r"lora-ga's start is subtracted again \(lora-ga.offset: adapter\), and sora prunes ranks"),
        ([GA_BASE, BEAMLORA], r"\(lora-ga.offset: base\), and beamlora prunes ranks, which breaks the cancellation"),
        ([GoRA(), AB_LORA], f"gora and ab-lora do not go together: {PRUNES}"),
        ([GoRA(), BEAMLORA], f"gora and beamlora do not go together: {PRUNES}"),
        ([GoRA(), SORA], "gora's can only be the caps that sora prunes from: set sora.plan_as_caps: true"),
        ([RoRA(), BEAMLORA], r"beamlora runs with the scaling alpha / rank, and rora changes it; keep one of them"),
    ],
    ids=lambda value: "+".join(method.id for method in value) if isinstance(value, list) else "",
)
def test_methods_that_do_not_go_together_are_refused_with_the_reason(methods: list[Method], reason: str) -> None:
    for order in (methods, methods[::-1]):
        with pytest.raises(RecipeError, match=reason):
            Recipe.of(order)


@pytest.mark.parametrize(
    "methods",
    [
        [GoRA(), RITE],
        [LORA_GA, PRO],
        [GoRA(), GGPO],
        [RoRA(), MGPO],
        [RoRA(), LORA_GA, RITE],
        [RoRA(), SORA],
        [RoRA(), XGBLORA],
        [RoRA(), AB_LORA],
        [LORA_GA, GGPO],
        [GoRA(), method_from_id("sora", {"plan_as_caps": True})],
        [method_from_id("lora-ga", {"offset": "none"}), SORA],
        [method_from_id("lora-ga", {"offset": "none"}), BEAMLORA],
    ],
    ids=lambda methods: "+".join(method.id for method in methods),
)
def test_methods_that_go_together_pass(methods: list[Method]) -> None:
    assert Recipe.of(methods).methods == tuple(methods)


@pytest.mark.parametrize(
    ("methods", "situation", "reason"),
    [
        ([RITE], Situation(fsdp=True), r"lora-rite cannot train under FSDP, which takes the pairs .* apart"),
        (
            [GoRA(), PRO],
            Situation(fsdp=True),
            r"gora \+ lora-pro cannot train under FSDP, .*\(DDP\), shard it by fully_shard",
        ),
        ([RITE], Situation(deepspeed=0), "lora-rite cannot train under DeepSpeed ZeRO-0"),
        ([PRO], Situation(deepspeed=2), "lora-pro cannot train under DeepSpeed ZeRO-2, which takes the pairs"),
        ([GGPO], Situation(deepspeed=2), "ggpo cannot train under DeepSpeed ZeRO-2, which owns the gradients"),
        ([MGPO], Situation(deepspeed=3), "mgpo cannot train under DeepSpeed ZeRO-3, which owns the gradients"),
        ([SORA], Situation(deepspeed=1), "sora cannot train under DeepSpeed ZeRO-1"),
        ([AB_LORA], Situation(deepspeed=1), "ab-lora cannot train under DeepSpeed ZeRO-1"),
        ([BEAMLORA], Situation(deepspeed=1), "beamlora cannot train under DeepSpeed ZeRO-1"),
        ([XGBLORA], Situation(deepspeed=1), "xgblora cannot train under DeepSpeed ZeRO-1"),
        ([AB_LORA], Situation(fsdp=True), "ab-lora cannot train under FSDP"),
        ([SORA], Situation(fsdp=True), "sora cannot train under FSDP"),
        ([BEAMLORA], Situation(optim="adafactor"), "training.optim: adafactor: beamlora copies .*; use adamw_torch"),
        ([BEAMLORA], Situation(fsdp=True), r"beamlora cannot train under FSDP, .*\(DDP\), or use lora"),
        ([GA_BASE], Situation(quantized=True), "lora-ga.offset: base writes the base weights, which are packed"),
        ([GA_BASE], Situation(fsdp=True), "which FSDP shards; use offset: adapter"),
        ([GA_BASE], Situation(deepspeed=3), "which ZeRO-3 shards; use offset: adapter"),
        ([XGB_MERGE], Situation(quantized=True), "xgblora.accumulate: merge writes the base weights, which are packed"),
        (
            [XGB_MERGE],
            Situation(narrow="float16"),
            r"are float16 and would .*use accumulate: factors.*float32",
        ),
        ([XGB_MERGE], Situation(fsdp=True), "which FSDP shards; use accumulate: factors, which leaves them alone"),
        ([RITE], Situation(learning_rate_ratio=16), "loraplus_lr_ratio: 16: lora-rite moves lora_A and lora_B by one"),
        ([LORA_GA], Situation(offloaded=True), "lora-ga needs gradients, and parts of the model are offloaded"),
        ([LORA_GA], Situation(quantized=True, collector="param"), "packed weights, which lora-ga cannot use"),
    ],
    ids=lambda value: "+".join(method.id for method in value) if isinstance(value, list) else "",
)
def test_what_cannot_run_there_is_refused_with_what_would(
    methods: list[Method], situation: Situation, reason: str
) -> None:
    recipe = Recipe.of(methods)
    recipe.check(Situation())
    with pytest.raises(RecipeError, match=reason):
        recipe.check(situation)


def test_under_deepspeed_only_what_trains_is_recommended() -> None:
    for method in (RITE, GGPO, SORA):  # its optimizer cannot be watched, whatever the recipe
        with pytest.raises(RecipeError) as caught:
            Recipe.of([method]).check(Situation(deepspeed=2))
        (told,) = caught.value.faults
        assert "(DDP)" in told
        assert "use lora" not in told


@pytest.mark.parametrize(("situation", "keeper"), [({"optim": "adafactor"}, "adafactor"), ({}, "")])
def test_a_momentum_that_mgpo_may_not_keep_must_be_the_optimizers(situation: dict[str, str], keeper: str) -> None:
    never, off = (method_from_id("mgpo", {"own_momentum": "never", **more}) for more in ({}, {"rho": 0.0}))
    refusal = "mgpo.own_momentum: never, and {} keeps no momentum of the gradients that could be read; use auto"
    if keeper:
        with pytest.raises(RecipeError, match=refusal.format(keeper)):
            Recipe.of(never).check(Situation(**situation))
    else:
        Recipe.of(never).check(Situation(**situation))
    with pytest.raises(RecipeError, match=refusal.format("lora-rite")):
        Recipe.of([RITE, never])
    Recipe.of([RITE, method_from_id("mgpo")]).check(Situation(**situation))
    Recipe.of(off).check(Situation(**situation))
    for optim in ("adamw_torch", "adamw_torch_fused"):
        Recipe.of(never).check(Situation(optim=optim))


@pytest.mark.parametrize(
    ("methods", "situation"),
    [
        (["lora"], Situation(fsdp=True)),
        (["gora"], Situation(deepspeed=3)),
        ([GGPO], Situation(deepspeed=1)),
        ([MGPO], Situation(fsdp=True)),
        ([XGBLORA], Situation(fsdp=True)),
        ([LORA_GA], Situation(quantized=True, fsdp=True)),
        ([GA_BASE], Situation(deepspeed=2)),
        ([PRO], Situation(learning_rate_ratio=16)),
    ],
)
def test_what_can_run_there_passes(methods: list[Method | str], situation: Situation) -> None:
    Recipe.of(methods).check(situation)


def remarks(*methods: Method) -> list[str]:
    budget = Budget(r=1, lora_alpha=16, parameters=10)
    own = {note for method in methods for note in method.notes({"q": 1}, budget)}
    return [note for note in Recipe.of(methods).notes({"q": 1}, budget) if note not in own]


@pytest.mark.parametrize(
    ("methods", "remark"),
    [
        (
            [GGPO, PRO],
            "the perturbation was published with AdamW; nobody has measured it over lora-pro's steps",
        ),
        ([RITE, MGPO], "lora-rite + mgpo: the perturbation was published with AdamW"),
        (
            [RoRA(), PRO],
            "alpha/sqrt(rank) changes the effective learning rate of lora-pro's efficient mode",
        ),
        ([PRO, GoRA()], r"the scaling alpha/sqrt(rank) changes the effective learning rate"),
        ([RoRA(), method_from_id("xgblora")], "boosters of rank 1 have the same scaling"),
    ],
    ids=lambda value: "+".join(method.id for method in value) if isinstance(value, list) else "",
)
def test_combinations_that_deserve_a_word_get_one(methods: list[Method], remark: str) -> None:
    (found,) = remarks(*methods)
    assert remark in found


def test_other_combinations_get_no_word() -> None:
    boosted = [RoRA(), method_from_id("xgblora", {"booster_rank": 2})]
    for methods in ([GoRA(), RITE], [LORA_GA, PRO], [RoRA(), RITE], [GoRA(), GGPO], boosted):
        assert remarks(*methods) == []


def test_the_learning_rate_is_that_of_whoever_moves_the_factors_else_of_whoever_starts_them() -> None:
    assert Recipe.of([GoRA(), RITE]).learning_rates == RITE.learning_rates
    assert Recipe.of([LORA_GA, RoRA()]).learning_rates == Recipe.of([RoRA(), LORA_GA]).learning_rates
    assert Recipe.of([RoRA(), LORA_GA]).learning_rates == LORA_GA.learning_rates
    assert Recipe.of([RoRA(), MGPO]).learning_rates == RoRA.learning_rates


def test_lists_of_settings_become_tuples() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Decaying(Mover):
        betas: tuple[float, float] = (0.9, 0.999)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankwise.methods.registry.METHODS", {**METHODS, "mover": Decaying})
        assert method_from_id("mover", {"betas": [0.8, 0.9]}) == Decaying(betas=(0.8, 0.9))


@pytest.mark.parametrize("method_id", sorted(METHODS))
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_rslora": True}, "use rora"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"rank_pattern": {"q": 4}}, "plan file"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "Activated LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights: False"),
    ],
)
def test_peft_options_that_change_what_the_factors_mean_are_refused_by_every_method(
    method_id: str, options: dict[str, object], named: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){method_id} cannot run with.*{named}"):
        Recipe.of(method_id).check(Situation(lora_options=options))


def test_harmless_peft_options_pass() -> None:
    options = {
        "use_dora": False,
        "target_parameters": None,
        "layer_replication": [],
        "init_lora_weights": True,
        "r": 8,
        "bias": "none",
    }
    Recipe.of("gora").check(Situation(lora_options=options))


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (Situation(quantized=True, collector="param"), "packed weights"),
        (Situation(offloaded=True), "offloaded to disk or the meta device"),
    ],
)
def test_gradients_that_cannot_be_read_are_refused_for_methods_that_need_them(
    situation: Situation, reason: str
) -> None:
    with pytest.raises(RecipeError, match=f"gora.*{reason}|{reason}.*gora"):
        Recipe.of("gora").check(situation)
    for other in ("lora", "rora", "lora-rite"):
        Recipe.of(other).check(situation)


def test_all_refusals_are_told_at_once() -> None:
    situation = Situation(quantized=True, collector="param", offloaded=True, lora_options={"use_dora": True})
    with pytest.raises(RecipeError) as caught:
        Recipe.of("gora").check(situation)
    assert len(caught.value.faults) == 3


def test_a_plain_situation_refuses_nothing() -> None:
    for method_id in METHODS:
        Recipe.of(method_id).check(Situation())
    assert len(REFUSALS) >= 18
