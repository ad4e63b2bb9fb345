"""XGBLoRA trains in rounds; after each of them the model is the same and the optimizer remembers nothing."""

import copy
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.checkpoint import read_safetensors
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.state import FoldState
from rankwise.errors import BudgetError, CheckpointError, ConfigError, HealthError
from rankwise.export.fold import fold
from rankwise.export.live import base_as_found
from rankwise.export.write import export_adapter
from rankwise.linalg.factors import relative_difference
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.methods.base import Budget, Start
from rankwise.methods.xgblora import (
    XGBLoRA,
    block_of,
    blocks_of,
    booster_pair,
    capacities,
    default_rounds,
    drawn_blocks,
    layers_per_round,
    round_layout,
)
from rankwise.ranks.shapes import LayerShape
from tests.adapters.test_perturbation import Linear8bitLt
from tests.methods.boosted import begun, boosted, logits, relative, train
from tests.methods.perturbed import BATCHES, Adapted, adapted, faults_of
from tests.support.models import tiny_gpt2, tiny_llama, tiny_t5

LAYERS = tuple(LayerShape(f"layers.{k}.q", 16, 8) for k in range(3))


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"booster_rank": 0}, "xgblora.booster_rank: 0 is out of range"),
        ({"booster_alpha": 0}, "xgblora.booster_alpha: 0 trains nothing"),
        ({"booster_alpha": math.nan}, "xgblora.booster_alpha: nan is out of range"),
        ({"rounds": 0}, "xgblora.rounds: 0 is out of range"),
        ({"round_steps": 2.5}, "xgblora.round_steps: 2.5 is out of range"),
        ({"layers_fraction": 0}, "xgblora.layers_fraction: 0 trains nothing"),
        ({"layers_fraction": 1.5}, "xgblora.layers_fraction: 1.5 is out of range"),
        ({"layers_per_round": 0}, "xgblora.layers_per_round: 0 is out of range"),
        ({"shrinkage": 1.1}, "xgblora.shrinkage: 1.1 is out of range"),
        ({"shrinkage": 0.0}, "xgblora.shrinkage: 0 trains nothing"),
        ({"a_init": "normal"}, "xgblora.a_init: 'normal' is not known"),
        ({"max_rank": 8}, "xgblora.max_rank: 8 is not known"),
        ({"accumulate": "sum"}, "xgblora.accumulate: 'sum' is not known; use one of factors, merge"),
        ({"rounds": 4, "round_steps": 8}, "say the same twice"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(wrong: dict[str, object], told: str) -> None:
    (fault,) = faults_of(XGBLoRA, **wrong)
    assert told in fault


def test_every_wrong_setting_is_told_at_once() -> None:
    assert len(faults_of(XGBLoRA, booster_rank=0, shrinkage=-1, a_init="x", accumulate="base")) == 4


@pytest.mark.parametrize("name", XGBLoRA.presets)
def test_presets_are_settings(name: str) -> None:
    XGBLoRA(**XGBLoRA.presets[name])  # type: ignore[arg-type]


def test_boosters_have_a_rank_and_an_alpha_of_their_own() -> None:
    budget = Budget(r=8, lora_alpha=16.0, parameters=8 * 3 * 24)
    method = XGBLoRA(booster_rank=2, booster_alpha=6)
    assert method.allocate(LAYERS, budget, None).ranks == (2, 2, 2)
    assert method.live_budget(budget) == Budget(r=8, lora_alpha=6.0, parameters=8 * 3 * 24)
    assert any("lora_alpha is not used" in note for note in method.notes({}, budget))
    assert any("576 parameters" in note for note in method.notes({}, budget))
    assert any("every rank" in note for note in XGBLoRA(max_rank="none").notes({}, budget))
    assert method.export_budget(budget.parameters) == 576
    assert XGBLoRA(max_rank="none").export_budget(576) is None
    (foreign, _) = method.notes({"q": 8, "v": 3, "k": 0}, budget)
    assert "the ranks of the plan, 3 to 8, and its alpha 16; booster_rank and booster_alpha are not used" in foreign


def test_a_booster_above_the_budget_or_a_layer_is_refused() -> None:
    with pytest.raises(BudgetError, match="booster_rank: 4 is above r: 2") as error:
        XGBLoRA(booster_rank=4).allocate(LAYERS, Budget(r=2, lora_alpha=4, parameters=96), None)
    assert len(error.value.faults) == 1
    with pytest.raises(BudgetError, match=r"above the size of layer layers\.0\.q") as error:
        XGBLoRA(booster_rank=9).allocate(LAYERS, Budget(r=16, lora_alpha=4, parameters=999), None)
    assert len(error.value.faults) == 3


def test_the_first_round_starts_as_plain_lora() -> None:
    layer = adapted(rank=1).first
    start = Start(
        layer=layer.base,
        rank=2,
        divisor=2.0,
        budget=Budget(r=8, lora_alpha=2, parameters=1),
        seed=5,
        dtype_cast=lambda tensor: tensor,
        statistics=None,
    )
    factors = XGBLoRA().initialize(start)
    assert torch.equal(factors.lora_A, kaiming_uniform(2, 32, generator(5, "lora_A", layer.name)))
    assert not factors.lora_B.any()
    drawn = XGBLoRA(a_init="gaussian").draw(200, 400, generator(0, "test"))
    assert drawn.std().item() == pytest.approx(1 / 20, rel=0.02)
    assert drawn.abs().max() > 3 / 20


# --- equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "rounds"), [(1, 1), (2, 2), (10, 2), (24, 3), (160, 20), (5000, 20)])
def test_a_round_for_every_eight_steps_within_bounds(steps: int, rounds: int) -> None:
    assert default_rounds(steps) == rounds


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((5000, None, 8), (625, 8)),  # specs/xgblora.md 3.2
        ((10000, 10, None), (10, 1000)),
        ((10000, 20, None), (20, 500)),
        ((41, 5, None), (5, 9)),
        ((81, 10, None), (9, 9)),  # ten rounds of nine would be more than the run
        ((7, 1, None), (1, 7)),
        ((7, None, 100), (1, 7)),
        ((1, None, None), (1, 1)),
    ],
)
def test_rounds_by_hand(arguments: tuple[int, int | None, int | None], found: tuple[int, int]) -> None:
    assert round_layout(*arguments) == found


@given(st.integers(1, 3000), st.one_of(st.none(), st.integers(1, 3000)), st.booleans())
def test_rounds_cover_the_run_and_none_is_empty(steps: int, value: int | None, counted: bool) -> None:
    rounds, round_steps = (value, None) if counted else (None, value)
    if rounds is not None and rounds > steps:
        with pytest.raises(ConfigError, match=f"{rounds} rounds do not fit in {steps}"):
            round_layout(steps, rounds, round_steps)
        return
    count, kappa = round_layout(steps, rounds, round_steps)
    assert (count - 1) * kappa < steps <= count * kappa
    assert rounds is None or count <= rounds


def test_a_run_without_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes 0 optimizer steps"):
        round_layout(0)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.10.self_attn.q_proj", "model.layers.10"),
        ("model.layers.3.mlp.experts.7.up_proj", "model.layers.3"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1"),
        ("bert.encoder.layer.2.output.dense", "bert.encoder.layer.2"),
        ("0", "0"),
        ("net.12", "net.12"),
        ("lm_head", None),
        ("bert.pooler.dense", None),
        ("conv1.q2_proj", None),
    ],
)
def test_the_block_is_the_name_up_to_its_first_number(name: str, block: str | None) -> None:
    assert block_of(name) == block


def test_blocks_do_not_depend_on_the_order_of_names() -> None:
    names = ["m.10.q", "m.9.v", "m.10.v", "head", "m.9.q"]
    found = blocks_of(names)
    assert found == {"head": ("head",), "m.9": ("m.9.q", "m.9.v"), "m.10": ("m.10.q", "m.10.v")}
    assert list(found) == ["head", "m.9", "m.10"]
    assert list(blocks_of(reversed(names)).items()) == list(found.items())


def test_encoder_and_decoder_blocks_are_different() -> None:
    names = [name for name, _ in tiny_t5().named_modules() if name.endswith(".q")]
    assert len(blocks_of(names)) == 4


@pytest.mark.parametrize(
    ("arguments", "found"), [((32, 1 / 3), 11), ((32, 1.0), 32), ((2, 1 / 3), 1), ((1, 0.1), 1), ((4, 0.1, 9), 4)]
)
def test_a_third_of_32_layers_is_11(arguments: tuple[Any, ...], found: int) -> None:
    assert layers_per_round(*arguments) == found


def test_x9_every_layer_is_drawn_equally_often() -> None:
    blocks = [f"layers.{k}" for k in range(12)]
    rounds, count = 200, 4
    draws = [drawn_blocks(blocks, count, 7, number) for number in range(1, rounds + 1)]
    assert {len(chosen) for chosen in draws} == {count}
    times = Counter(block for chosen in draws for block in chosen)
    share = count / len(blocks)
    deviation = math.sqrt(rounds * share * (1 - share))
    assert all(abs(times[block] - rounds * share) <= 4 * deviation for block in blocks)
    assert len(set(draws)) > 100
    assert draws[4] == drawn_blocks(blocks, count, 7, 5)
    assert draws != [drawn_blocks(blocks, count, 8, number) for number in range(1, rounds + 1)]


def test_room_is_the_times_drawn_times_the_rank() -> None:
    assert capacities([{"a", "b"}, {"a"}, {"a", "c"}], {"a": 2, "b": 1, "c": 3, "d": 5}) == {"a": 6, "b": 1, "c": 3}


def test_a_booster_is_shrunk_on_one_side() -> None:
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0], [8.0]])
    assert [part.tolist() for part in booster_pair(A, B, 0.25)] == [[[1.0, 2.0]], [[1.0], [2.0]]]
    assert booster_pair(A, B, 1.0)[1] is B


# --- rounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_x1_one_round_in_all_layers_is_plain_lora(dropout: float) -> None:
    plain, one = adapted(rank=2, dropout=dropout), adapted(rank=2, dropout=dropout)
    torch.manual_seed(3)
    expected = train(plain, None, plain.adamw(), range(1, 7))
    schedule, optimizer = begun(one, XGBLoRA(rounds=1, layers_fraction=1.0), 6)
    before: list[list[torch.Tensor]] = []
    torch.manual_seed(3)
    found = train(
        one,
        schedule,
        optimizer,
        range(1, 7),
        after=lambda step: before.append([factor.detach().clone() for factor in one.factors]),
    )
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))
    assert all(torch.equal(mine, its) for mine, its in zip(before[-1], plain.factors, strict=True))
    mine, its = fold(one.model, schedule.fold_state()), fold(plain.model)
    for name, layer in its.layers.items():
        other = mine.layers[name]
        assert other.scaling == layer.scaling
        assert relative_difference((other.lora_A, other.lora_B), (layer.lora_A, layer.lora_B)) < 1e-6


@pytest.mark.parametrize(("accumulate", "bound"), [("factors", 1e-6), ("merge", 1e-5)])
def test_x2_a_fold_leaves_the_model_as_it_was(accumulate: Any, bound: float) -> None:
    one = adapted(rank=2, dropout=0.2)
    schedule, optimizer = begun(one, XGBLoRA(rounds=4, layers_fraction=0.5, accumulate=accumulate), 12)
    before: dict[int, torch.Tensor] = {}
    changes = []

    def after(step: int) -> None:
        before[step] = logits(one)

    for step in range(1, 13):
        train(one, schedule, optimizer, [step], after=after)
        changes.append(relative(logits(one), before[step]))
    assert len(schedule.events()) == 5
    assert max(changes) < bound
    assert [step for step in range(1, 13) if step % 3] == [step for step in range(1, 13) if changes[step - 1] == 0.0]


def test_a_shrunk_booster_counts_less() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(rounds=1, layers_fraction=1.0, shrinkage=0.5), 3)
    factors: list[torch.Tensor] = []
    train(one, schedule, optimizer, [1, 2, 3], after=lambda _: factors.append(one.first.lora_B.detach().clone()))
    assert torch.equal(schedule.fold_state().boosters[one.first.name].lora_B, 0.5 * factors[-1])


class Merging:
    """The paper's own way, by hand: frozen layers, float64 weights that every booster is added to, a new AdamW."""

    def __init__(self, method: XGBLoRA, steps: int, seed: int) -> None:
        self.one = adapted(tiny_llama().double(), rank=method.booster_rank)
        self.one.model.double()
        self.method, self.steps, self.seed = method, steps, seed
        self.rounds, self.kappa = round_layout(steps, method.rounds, method.round_steps)

    def run(self) -> None:
        blocks = blocks_of(self.one.layers)
        count = layers_per_round(len(blocks), self.method.layers_fraction)
        for number in range(1, self.rounds + 1):
            chosen = drawn_blocks(list(blocks), count, self.seed, number)
            live = {name: layer for name, layer in self.one.layers.items() if block_of(name) in chosen}
            for name, layer in self.one.layers.items():
                layer.lora_A.requires_grad_(name in live)
                layer.lora_B.requires_grad_(name in live)
            if number > 1:
                for name, layer in live.items():
                    source = generator(self.seed, "xgblora lora_A", number, name)
                    layer.lora_A.data.copy_(kaiming_uniform(layer.rank, layer.base.shape.in_features, source))
            optimizer = torch.optim.AdamW([x for y in live.values() for x in (y.lora_A, y.lora_B)], lr=1e-2)
            first = (number - 1) * self.kappa + 1
            for step in range(first, min(first + self.kappa, self.steps + 1)):
                self.one.model(**BATCHES[step % len(BATCHES)]).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.one.factors, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            for layer in live.values():
                weight: Any = layer.base.module.weight
                weight.data += layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
                layer.lora_B.data.zero_()


@pytest.mark.parametrize("method", [XGBLoRA(rounds=5, layers_fraction=0.5), XGBLoRA(booster_rank=2, round_steps=4)])
def test_x3_factors_equal_merging_into_wide_weights(method: XGBLoRA) -> None:
    slow = Merging(method, 14, seed=3)
    slow.run()
    one = adapted(rank=method.booster_rank)
    schedule, optimizer = begun(one, method, 14, seed=3)
    train(one, schedule, optimizer, range(1, 15))
    assert relative(logits(one).double(), logits(slow.one)) < 1e-5
    wide = adapted(tiny_llama().double(), rank=method.booster_rank)
    wide.model.double()
    schedule, optimizer = begun(wide, method, 14, seed=3)
    train(wide, schedule, optimizer, range(1, 15))
    assert relative(logits(wide), logits(slow.one)) < 1e-12


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])  # GPT-2 keeps its weights the other way round
def test_x3_merging_equals_factors(model: Any) -> None:
    targets = ["c_attn", "c_fc"] if model is tiny_gpt2 else ["q_proj", "v_proj", "up_proj", "down_proj"]
    runs = {}
    for accumulate in ("factors", "merge"):
        one = adapted(model(), rank=1, targets=targets)
        before = copy.deepcopy(one.first.base.module.weight)
        method = XGBLoRA(round_steps=2, layers_fraction=0.5, accumulate=accumulate)  # type: ignore[arg-type]
        schedule, optimizer = begun(one, method, 14, seed=3)
        train(one, schedule, optimizer, range(1, 15))
        assert torch.equal(one.first.base.module.weight, before) == (accumulate == "factors")  # type: ignore[arg-type]
        runs[accumulate] = (logits(one), schedule.fold_state().boosters, schedule.memory_bytes())
    (mine, pairs, size), (its, others, same) = runs["merge"], runs["factors"]
    assert relative(mine, its) < 1e-5
    assert size == same
    assert pairs.keys() == others.keys()
    for name, pair in pairs.items():
        other = others[name]
        assert relative_difference((pair.lora_A, pair.lora_B), (other.lora_A, other.lora_B)) < 1e-4


def test_an_interrupt_right_after_a_write_leaves_a_base_that_is_given_back() -> None:
    one = adapted(rank=1)
    before = weights_fingerprint(one.model)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=1, layers_fraction=1.0, accumulate="merge"), 3)
    weight: Any = one.first.base.module.weight

    def written_and_interrupted(value: torch.Tensor) -> None:
        del weight.copy_
        weight.copy_(value)
        raise KeyboardInterrupt

    weight.copy_ = written_and_interrupted
    with pytest.raises(KeyboardInterrupt):
        train(one, schedule, optimizer, [1])
    assert weights_fingerprint(one.model) != before
    schedule.close()
    assert weights_fingerprint(one.model) == before


def test_what_merging_will_take_is_foretold_of_the_layers_that_are_drawn() -> None:
    one = adapted(rank=1)
    before = weights_fingerprint(one.model)
    method = XGBLoRA(rounds=1, layers_per_round=1, accumulate="merge")
    schedule, optimizer = begun(one, method, 4)
    drawn = [layer for name, layer in one.layers.items() if schedule.live_ranks()[name]]
    assert len(drawn) == len(one.layers) // 2
    sizes = [layer.base.shape.out_features * layer.base.shape.in_features for layer in drawn]
    assert schedule.base_copy_bytes() == 4 * sum(sizes)
    assert schedule.event_seconds() > 0
    assert weights_fingerprint(one.model) == before
    train(one, schedule, optimizer, range(1, 5))
    assert schedule.event_seconds() == 0.0
    schedule.close()
    assert schedule.base_copy_bytes() == 0
    factors, _ = begun(adapted(rank=1), XGBLoRA(rounds=1), 4)
    assert (factors.base_copy_bytes(), factors.event_seconds()) == (0, 0.0)


def test_weights_are_written_again_where_they_are_when_a_resumed_run_begins(tmp_path: Path) -> None:
    one, method = adapted(rank=1), XGBLoRA(round_steps=1, layers_fraction=1.0, accumulate="merge")
    schedule, optimizer = begun(one, method, 4)
    train(one, schedule, optimizer, [1, 2])
    wanted = weights_fingerprint(one.model)
    state = through_a_file(schedule.state_dict(), tmp_path / "state.safetensors")
    other = adapted(rank=1)
    resumed = boosted(other, method)
    resumed.load_state_dict(state)
    assert weights_fingerprint(other.model) == wanted
    with torch.no_grad():
        other.first.base.module.weight.add_(1e-3)  # as another device's product would be
    resumed.begin(other.adamw(), 4)
    assert weights_fingerprint(other.model) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_into_16_bits_is_refused(dtype: torch.dtype) -> None:
    one = adapted(tiny_llama().to(dtype), rank=1)
    told = rf"and 8 of 8 hold no such sum \(model\S+ first, which is {str(dtype).removeprefix('torch.')}\)"
    with pytest.raises(ConfigError, match=told):
        boosted(one, XGBLoRA(accumulate="merge"))
    assert not any("rankwise" in name for name, _ in one.model.named_modules())
    boosted(one, XGBLoRA()).close()


def test_x14_merging_into_packed_weights_is_refused() -> None:
    one = adapted(rank=1)
    for layer in one.layers.values():
        module: Any = layer.module
        module.base_layer = Linear8bitLt(module.base_layer.weight.detach())
    one.layers = adapted_layers(one.model)
    with pytest.raises(ConfigError, match=r"8 of 8 hold no such sum \(\S+ first, which is quantized"):
        boosted(one, XGBLoRA(accumulate="merge"))


@pytest.mark.parametrize("accumulate", ["factors", "merge"])
def test_x4_stock_peft_computes_the_same_from_the_exported_file(accumulate: Any, tmp_path: Path) -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(rounds=4, layers_fraction=0.5, accumulate=accumulate), 20)
    train(one, schedule, optimizer, range(1, 18))  # in the middle of the last round
    assert any(gate.any() for gate in schedule.fold_state().gates.values())
    live = logits(one)
    report = export_adapter(one.model, tmp_path / "adapter", state=schedule.fold_state(), batch=BATCHES[0])
    assert report.logit_error is not None
    assert report.logit_error < 1e-5
    stock = Adapted(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")), {})
    assert relative(logits(stock), live) < 1e-5


@pytest.mark.parametrize("accumulate", ["factors", "merge"])
def test_x5_the_base_and_the_global_random_state_stay_as_they_were(accumulate: Any) -> None:
    one = adapted(rank=1)
    before, state = weights_fingerprint(one.model), torch.get_rng_state()
    schedule, optimizer = begun(one, XGBLoRA(rounds=3, accumulate=accumulate), 9)
    train(one, schedule, optimizer, range(1, 10))
    schedule.end(9)
    assert (weights_fingerprint(one.model) == before) == (accumulate == "factors")
    trained = weights_fingerprint(one.model)
    with base_as_found(one.model):
        assert weights_fingerprint(one.model) == before
    assert weights_fingerprint(one.model) == trained
    schedule.fold_state(), schedule.state_dict(), schedule.close()
    assert weights_fingerprint(one.model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank", [1, 2])
def test_x6_the_exported_rank_is_the_times_a_layer_was_drawn(rank: int) -> None:
    one = adapted(rank=rank)
    schedule, optimizer = begun(one, XGBLoRA(rounds=5, layers_fraction=0.5), 10)
    train(one, schedule, optimizer, range(1, 11))
    times = Counter(block for n in range(1, 6) for block in drawn_blocks(["model.layers.0", "model.layers.1"], 1, 0, n))
    folded = fold(one.model, schedule.fold_state())
    for name, layer in folded.layers.items():
        expected = rank * times[block_of(name) or ""]
        assert layer.rank == expected == schedule.live_ranks()[name]
        update = layer.lora_B.double() @ layer.lora_A.double()
        assert int(torch.linalg.matrix_rank(update)) == expected


def test_x8_after_a_fold_nothing_of_the_booster_is_left() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=3, layers_fraction=1.0), 9, weight_decay=0.1)
    train(one, schedule, optimizer, [1, 2])
    assert len(optimizer.state) == len(one.factors)
    train(one, schedule, optimizer, [3])
    assert not optimizer.state
    for name, layer in one.layers.items():
        assert not layer.lora_B.any()
        expected = kaiming_uniform(1, layer.base.shape.in_features, generator(0, "xgblora lora_A", 2, name))
        assert torch.equal(layer.lora_A, expected)
    train(one, schedule, optimizer, [4])
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("kind", ["fused", "foreach", "amsgrad"])
def test_x8_every_form_of_adamw_forgets(kind: str) -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=2, layers_fraction=1.0), 6, **{kind: True})
    train(one, schedule, optimizer, range(1, 4))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_x10_layers_outside_the_round_do_not_move() -> None:
    one = adapted(rank=1)
    method = XGBLoRA(round_steps=4, layers_per_round=1)
    schedule, optimizer = begun(one, method, 12, weight_decay=0.5)
    kept = {name: layer.lora_A.detach().clone() for name, layer in one.layers.items()}
    seen: list[set[str]] = []
    gradients: dict[str, float] = {}

    for name, layer in one.layers.items():

        def note(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            gradients[name] = gradients.get(name, 0.0) + float(parameter.grad.abs().sum())

        layer.lora_B.register_post_accumulate_grad_hook(note)

    def within(_: int) -> None:
        seen.append({name for name, layer in one.layers.items() if layer.lora_B.grad is not None})
        assert all((layer.lora_A.grad is None) == (layer.lora_B.grad is None) for layer in one.layers.values())

    train(one, schedule, optimizer, range(1, 4), within=within)
    live = {
        name for name in one.layers if block_of(name) in drawn_blocks(["model.layers.0", "model.layers.1"], 1, 0, 1)
    }
    assert seen == [live] * 3
    assert {name for name, total in gradients.items() if total > 0} == live
    assert gradients.keys() == one.layers.keys()  # zeros, not missing: DistributedDataParallel waits for them
    for name, layer in one.layers.items():
        still = torch.equal(layer.lora_A, kept[name]) and not layer.lora_B.any()
        assert still == (name not in live)
        assert (layer.lora_A in optimizer.state) == (name in live)


def test_x13_a_last_round_of_fewer_steps_is_folded_once() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=4, layers_fraction=1.0), 10)
    train(one, schedule, optimizer, range(1, 11))
    before = logits(one)
    assert set(schedule.live_ranks().values()) == {3}
    schedule.end(10)
    schedule.end(10)
    assert set(schedule.live_ranks().values()) == {3}
    assert torch.equal(logits(one), before)
    assert [event.kind for event in schedule.events()] == ["round", "fold", "fold", "fold"]


def test_a_run_that_stops_early_folds_the_open_round_once() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=4, layers_fraction=1.0), 12)
    train(one, schedule, optimizer, range(1, 7))
    before = logits(one)
    schedule.end(6)
    schedule.end(6)
    assert set(schedule.live_ranks().values()) == {2}
    assert relative(logits(one), before) < 1e-6
    assert not schedule.fold_state().gates[one.first.name].any()


# --- what can go wrong --------------------------------------------------------------------------------------------


def test_a_booster_that_is_not_finite_is_discarded_and_the_third_ends_the_run() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(round_steps=2, layers_fraction=1.0), 20)
    train(one, schedule, optimizer, [1, 2])
    kept = schedule.fold_state().boosters

    def spoil(step: int) -> None:
        if step % 2 == 0:
            one.first.lora_B.data[0, 0] = math.nan

    for number in (2, 3):
        train(one, schedule, optimizer, [2 * number - 1, 2 * number], after=spoil)
        found = schedule.fold_state().boosters
        assert all(torch.equal(found[name].lora_B, pair.lora_B) for name, pair in kept.items())
        assert torch.isfinite(logits(one)).all()
    with pytest.raises(HealthError, match="the boosters of 3 rounds held NaN"):
        train(one, schedule, optimizer, [7, 8], after=spoil)
    assert [event.kind for event in schedule.events()] == ["round", "fold", "discard", "discard", "discard"]


def test_rounds_that_moved_nothing_are_a_fault() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(rounds=2), 4, lr=0.0)
    train(one, schedule, optimizer, range(1, 4))  # as if the run ended here, in the second round
    assert schedule.fault() is not None
    train(one, schedule, optimizer, [4])
    fault = schedule.fault()
    assert fault is not None
    assert "of 2 rounds 2 ended with lora_B of every layer still zero" in fault.message
    assert not schedule.fold_state().boosters
    good = adapted(rank=1)
    schedule, optimizer = begun(good, XGBLoRA(rounds=2), 4)
    for step in range(1, 5):
        train(good, schedule, optimizer, [step])
        assert schedule.fault() is None


def test_a_round_that_nobody_ended_is_a_fault() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(rounds=2), 4)
    train(one, None, optimizer, range(1, 5))
    fault = schedule.fault()
    assert fault is not None
    assert fault.message == "round 1 of 2 ends at step 2 and is still open after 0"
    assert "session.after_step" in fault.advice


def test_the_run_is_told_what_looks_wrong() -> None:
    def told(method: XGBLoRA, steps: int) -> str:
        one = adapted(rank=1)
        schedule, _ = begun(one, method, steps)
        assert set(schedule.remarks()) <= set(schedule.outlook(steps))
        return " ".join(schedule.remarks())

    assert "a single round is LoRA" in told(XGBLoRA(rounds=1), 20)
    assert "a single round is LoRA" in told(XGBLoRA(round_steps=50), 20)
    assert "rounds of 5 steps are shorter than the 8" in told(XGBLoRA(rounds=4), 20)
    assert "layers_per_round 9 is above the 2 blocks" in told(XGBLoRA(layers_per_round=9), 20)
    assert told(XGBLoRA(layers_fraction=1.0), 20) == ""
    assert "4 of 8 layers are drawn in no round" in told(XGBLoRA(rounds=1), 20)


def test_layers_without_a_block_are_drawn_one_by_one() -> None:
    one = adapted(tiny_gpt2(layers=1), rank=1, targets=["transformer.h.0.attn.c_attn"])
    one.layers = {"c_attn": one.first}
    schedule, _ = begun(one, XGBLoRA(layers_fraction=1.0), 20)
    assert "no layer's name holds the number of a block" in " ".join(schedule.remarks())
    assert "each trains 1 of 1 layers" in schedule.outlook(20)[0]


def test_rounds_that_do_not_fit_the_run_are_refused_with_numbers() -> None:
    one = adapted(rank=1)
    with pytest.raises(ConfigError, match="20 rounds do not fit in 6 optimizer steps"):
        begun(one, XGBLoRA(rounds=20), 6)
    with pytest.raises(ConfigError, match="20 rounds do not fit in 6"):
        boosted(adapted(rank=1), XGBLoRA(rounds=20)).outlook(6)


# --- what others see ----------------------------------------------------------------------------------------------


def test_events_and_live_ranks_tell_each_fold_with_its_layers() -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, XGBLoRA(rounds=3, layers_fraction=0.5), 20)
    first, second = (
        {name for name in one.layers if block_of(name) in drawn_blocks(["model.layers.0", "model.layers.1"], 1, 0, n)}
        for n in (1, 2)
    )
    (start,) = schedule.events()
    assert (start.step, start.kind) == (0, "round")
    assert start.ranks == {name: int(name in first) for name in one.layers}
    train(one, schedule, optimizer, range(1, 8))
    (event,) = schedule.events()
    assert (event.step, event.kind) == (7, "fold")
    assert event.reason.startswith("round 1 of 3 ended: model.layers.")
    assert set(event.layers) == first
    assert set(event.ranks) == first | second
    assert all(detail["booster_norm"] > 0 and detail["accumulated_rank"] == 1 for detail in event.layers.values())
    assert event.figures["booster_norm"] == pytest.approx(
        math.sqrt(sum(detail["booster_norm"] ** 2 for detail in event.layers.values()))
    )
    assert schedule.live_ranks() == {name: (name in first) + (name in second) for name in one.layers}
    gates = schedule.fold_state().gates
    assert {name for name, gate in gates.items() if gate.all()} == second
    assert schedule.figures() == {"xgblora_round": 2.0, "xgblora_layers": float(len(second)), "xgblora_rank": 0.5}
    assert schedule.events() == ()


def test_the_outlook_is_what_then_happens() -> None:
    one = adapted(rank=2)
    schedule = boosted(one, XGBLoRA(round_steps=3, layers_fraction=0.5))
    told = schedule.outlook(10)
    assert told[0] == "xgblora: 4 rounds of 3 steps, the last of 1; each trains 1 of 2 blocks"
    optimizer = one.adamw()
    schedule.begin(optimizer, 10)
    train(one, schedule, optimizer, range(1, 11))
    ranks = schedule.live_ranks().values()
    pairs = schedule.fold_state().boosters.values()
    trained = sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in pairs)
    expected = f"add up to a rank of {sum(ranks) / len(ranks):.1f} on average, {max(ranks)} at most, {trained} param"
    assert expected in told[1]
    assert schedule.memory_bytes() == sum(
        4 * rank * layer.base.shape.cost for rank, layer in zip(ranks, one.layers.values(), strict=True)
    )


@pytest.mark.parametrize("accumulate", ["factors", "merge"])
def test_until_it_begins_and_after_it_is_closed_nothing_acts(accumulate: Any) -> None:
    one = adapted(rank=1)
    plain = logits(one)
    schedule = boosted(one, XGBLoRA(rounds=2, accumulate=accumulate))
    assert not any(gate.any() for gate in schedule.fold_state().gates.values())
    optimizer = one.adamw()
    schedule.begin(optimizer, 4)
    train(one, schedule, optimizer, range(1, 5))
    assert relative(logits(one), plain) > 1e-4
    saved = set(one.model.state_dict())
    assert not any("lora_" in name for name in saved if "rankwise" in name)
    schedule.close()
    schedule.close()
    assert torch.equal(logits(one), plain)  # every lora_B is zero
    for module in one.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any("rankwise" in name for name, _ in one.model.named_modules())


# --- across checkpoints -------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """As a checkpoint keeps it: tensors in safetensors, the rest in JSON."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    FoldState().save(path, method=tensors)
    read = {name.removeprefix("method."): value for name, value in read_safetensors(path).items()}
    rest = {name: value for name, value in state.items() if name not in tensors}
    assert all(isinstance(value, str | int) for value in rest.values())
    return {**rest, **read}


METHOD = XGBLoRA(round_steps=3, layers_fraction=0.5)


BOTH = pytest.mark.parametrize("method", [METHOD, dataclasses.replace(METHOD, accumulate="merge")])


def stopped(
    step: int, path: Path, method: XGBLoRA = METHOD
) -> tuple[Adapted, dict[str, Any], dict[str, Any], list[torch.Tensor]]:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, method, 11, weight_decay=0.1)
    train(one, schedule, optimizer, range(1, step + 1))
    state = through_a_file(schedule.state_dict(), path)
    kept = [factor.detach().clone() for factor in one.factors]
    saved = copy.deepcopy(optimizer.state_dict())
    train(one, schedule, optimizer, range(step + 1, 12))
    schedule.end(11)
    one.schedule_after = schedule  # type: ignore[attr-defined]
    return one, state, saved, kept


@BOTH
@pytest.mark.parametrize("step", [1, 3, 5, 9, 10, 11])
def test_x11_a_run_resumed_anywhere_is_bit_equal(step: int, method: XGBLoRA, tmp_path: Path) -> None:
    whole, state, saved, kept = stopped(step, tmp_path / "state.safetensors", method)
    resumed = adapted(rank=1)
    schedule = boosted(resumed, method)
    schedule.load_state_dict(state)
    for factor, value in zip(resumed.factors, kept, strict=True):
        factor.data.copy_(value)
    optimizer = torch.optim.AdamW(resumed.factors, lr=1e-2, weight_decay=0.1)
    optimizer.load_state_dict(saved)
    schedule.begin(optimizer, 11)
    train(resumed, schedule, optimizer, range(step + 1, 12))
    schedule.end(11)
    assert torch.equal(logits(resumed), logits(whole))
    mine, its = schedule.state_dict(), whole.schedule_after.state_dict()  # type: ignore[attr-defined]
    assert mine.keys() == its.keys()
    assert all(
        torch.equal(mine[key], its[key]) if isinstance(its[key], torch.Tensor) else mine[key] == its[key] for key in its
    )
    assert all(torch.equal(a, b) for a, b in zip(resumed.factors, whole.factors, strict=True))


@BOTH
def test_the_best_checkpoint_comes_back_at_the_end_with_its_boosters(method: XGBLoRA, tmp_path: Path) -> None:
    one = adapted(rank=1)
    schedule, optimizer = begun(one, method, 11)
    train(one, schedule, optimizer, range(1, 6))  # in the middle of the second round
    best, state = logits(one), through_a_file(schedule.state_dict(), tmp_path / "state.safetensors")
    kept = [factor.detach().clone() for factor in one.factors]
    train(one, schedule, optimizer, range(6, 12))
    assert relative(logits(one), best) > 1e-4
    for factor, value in zip(one.factors, kept, strict=True):
        factor.data.copy_(value)
    schedule.load_state_dict(state)
    assert torch.equal(logits(one), best)
    schedule.end(11)
    assert relative(logits(one), best) < (1e-6 if method.accumulate == "factors" else 1e-5)


def test_a_resumed_run_of_another_length_is_refused(tmp_path: Path) -> None:
    _, state, _, _ = stopped(5, tmp_path / "state.safetensors")
    one = adapted(rank=1)
    schedule = boosted(one, METHOD)
    schedule.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"laid out over 11 optimizer steps \(4 of 3\), and this run makes 20"):
        schedule.begin(one.adamw(), 20)


def test_another_state_is_refused_by_name(tmp_path: Path) -> None:
    _, state, _, _ = stopped(7, tmp_path / "state.safetensors")
    name = next(key.removeprefix("A.") for key in state if key.startswith("A."))
    wrong = {
        "is of 'ggpo', the run is xgblora": {**state, "method": "ggpo"},
        "is of None": {},
        "round_steps is missing": {key: value for key, value in state.items() if key != "round_steps"},
        f"B.{name} is missing": {key: value for key, value in state.items() if key != f"B.{name}"},
        f"A.{name} is missing": {key: value for key, value in state.items() if key != f"A.{name}"},
        f"rank.{name} is 9": {
            **state,
            f"rank.{name}": 9,
            f"A.{name}": torch.zeros(9, state[f"A.{name}"].shape[1]),
            f"B.{name}": torch.zeros(state[f"B.{name}"].shape[0], 9),
        },
        r"A.\S* has the shape \[1, 7\]": {**state, f"A.{name}": torch.zeros(1, 7)},
        "A.other belongs to no layer": {**state, "A.other": torch.zeros(1, 7)},
    }
    for told, changed in wrong.items():
        schedule = boosted(adapted(rank=1), METHOD)
        with pytest.raises(CheckpointError, match=told if "\\" in told else told.replace(".", r"\.")):
            schedule.load_state_dict(changed)
