"""Recipes: slots and their owners, ids, and the table of refused combinations."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from rankwise.errors import ConfigError, RecipeError
from rankwise.methods.base import Method, Slot
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.recipe import METHODS, REFUSALS, RESERVED, Recipe, Situation, method_class, method_from_id
from rankwise.methods.rora import RoRA


@dataclass(frozen=True, kw_only=True)
class Mover(Method):
    """A stand-in for the optimizers of later versions: fills the optimize slot alone."""

    id: ClassVar[str] = "mover"
    title: ClassVar[str] = "Mover"
    source: ClassVar[str] = "none"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 1e-3)


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


def test_lora_beside_another_method_is_refused() -> None:
    with pytest.raises(RecipeError, match="lora is what every unfilled slot does already, beside rora"):
        Recipe.of(["rora", "lora"])


def test_naming_a_method_twice_or_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="names a method twice"):
        Recipe.of([GoRA(), GoRA(gamma=0.1)])
    with pytest.raises(RecipeError, match="at least one method; use one of lora, gora, rora"):
        Recipe.of([])


@pytest.mark.parametrize("method_id", sorted(RESERVED))
def test_methods_of_later_versions_are_named_as_such(method_id: str) -> None:
    with pytest.raises(
        RecipeError, match=f"{method_id} .*arXiv.* is not yet in this version; use one of lora, gora, rora"
    ):
        Recipe.of(method_id)


def test_reserved_and_present_ids_are_the_ten_methods_and_lora() -> None:
    assert set(METHODS) | set(RESERVED) == {
        "lora", "gora", "rora", "lora-ga", "lora-pro", "lora-rite", "ggpo", "mgpo", "ab-lora", "sora", "beamlora",
        "xgblora",
    }  # fmt: skip
    assert not set(METHODS) & set(RESERVED)


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


def test_only_gora_needs_gradients() -> None:
    assert {name: Recipe.of(name).needs_gradients for name in METHODS} == {"lora": False, "gora": True, "rora": False}


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
    for other in ("lora", "rora"):
        Recipe.of(other).check(situation)


def test_all_refusals_are_told_at_once() -> None:
    situation = Situation(quantized=True, collector="param", offloaded=True, lora_options={"use_dora": True})
    with pytest.raises(RecipeError) as caught:
        Recipe.of("gora").check(situation)
    assert len(caught.value.faults) == 3


def test_a_plain_situation_refuses_nothing() -> None:
    for method_id in METHODS:
        Recipe.of(method_id).check(Situation())
    assert len(REFUSALS) >= 7
