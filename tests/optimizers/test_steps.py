"""A step of the pair optimizers keeps what torch.optim promises: groups, schedulers, closures, missing gradients."""

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rankwise.errors import ConfigError
from rankwise.methods.lora_pro import LoRAProOptimizer
from rankwise.methods.lora_rite import LoRARITEOptimizer
from tests.optimizers.support import (
    MAKERS,
    MIXED,
    Pair,
    assert_same_bits,
    dense_gradients,
    factors,
    group_of,
    make,
    new_pair,
    new_pairs,
    random,
    relative,
    walk,
)

KINDS = [kind for kind in sorted(MAKERS) if kind != "rite-escape"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def unclipped(kind: str) -> dict[str, Any]:
    """Without the norm that RITE's pairs share."""
    return {"clip_unmagnified_grad": 0.0} if kind.startswith("rite") else {}


# P-3: stacking changes nothing.


@every_kind
def test_a_stack_of_mixed_shapes_equals_one_optimizer_a_pair(kind: str) -> None:
    pairs, singles = new_pairs(MIXED), new_pairs(MIXED)
    gradients = dense_gradients(pairs, 8)
    walk(make(kind, pairs, **unclipped(kind)), pairs, gradients)
    for number, pair in enumerate(singles):
        walk(make(kind, [pair], **unclipped(kind)), [pair], [[G[number]] for G in gradients])
    for found, expected in zip(factors(pairs), factors(singles), strict=True):
        assert relative(found, expected) <= 1e-12


@settings(max_examples=8)
@given(st.sampled_from(KINDS), st.permutations(range(len(MIXED))))
def test_the_order_of_the_pairs_is_irrelevant(kind: str, order: Sequence[int]) -> None:
    pairs, mixed = new_pairs(MIXED), new_pairs(MIXED)
    gradients = dense_gradients(pairs, 4)
    walk(make(kind, pairs), pairs, gradients)
    shuffled = [mixed[number] for number in order]
    walk(make(kind, shuffled), shuffled, [[G[number] for number in order] for G in gradients])
    for found, expected in zip(factors(mixed), factors(pairs), strict=True):
        assert relative(found, expected) <= 1e-12


@every_kind
def test_the_same_steps_give_the_same_bits_and_leave_the_random_streams_alone(kind: str) -> None:
    first, second = new_pairs(dtype=torch.float32), new_pairs(dtype=torch.float32)
    before = torch.get_rng_state()
    for pairs in (first, second):
        walk(make(kind, pairs), pairs, dense_gradients(pairs, 4))
    assert_same_bits(factors(first), factors(second))
    assert torch.equal(torch.get_rng_state(), before)


# Groups.


@every_kind
def test_each_group_has_its_own_settings(kind: str) -> None:
    pairs, alone = new_pairs([(10, 6, 2), (10, 6, 2)]), new_pairs([(10, 6, 2), (10, 6, 2)])
    own = [
        {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.5, 0.9), "eps": 1e-5, "weight_decay": 0.0},
    ]
    gradients = dense_gradients(pairs, 6)
    groups = [group_of([pair], **mine) for pair, mine in zip(pairs, own, strict=True)]
    walk(MAKERS[kind](groups, lr=1.0, **unclipped(kind)), pairs, gradients)
    for number, (pair, mine) in enumerate(zip(alone, own, strict=True)):
        walk(make(kind, [pair], **mine, **unclipped(kind)), [pair], [[G[number]] for G in gradients])
    for found, expected in zip(factors(pairs), factors(alone), strict=True):
        assert relative(found, expected) <= 1e-13


@every_kind
def test_a_group_added_later_starts_at_its_own_first_step(kind: str) -> None:
    pairs, alone = new_pairs([(10, 6, 2), (10, 6, 2)]), new_pairs([(10, 6, 2), (10, 6, 2)])
    gradients = dense_gradients(pairs, 6)
    optimizer = make(kind, pairs[:1], **unclipped(kind))
    walk(optimizer, pairs[:1], [[G[0]] for G in gradients[:3]])
    optimizer.add_param_group(group_of(pairs[1:], lr=3e-3))
    walk(optimizer, pairs, gradients[3:])
    walk(make(kind, alone[:1], **unclipped(kind)), alone[:1], [[G[0]] for G in gradients])
    walk(make(kind, alone[1:], lr=3e-3, **unclipped(kind)), alone[1:], [[G[1]] for G in gradients[3:]])
    for found, expected in zip(factors(pairs), factors(alone), strict=True):
        assert relative(found, expected) <= 1e-13


def test_a_plain_group_can_be_added_later() -> None:
    pair, plain = new_pair(), nn.Parameter(random(4, seed=1))
    optimizer = make("rite", [pair])
    walk(optimizer, [pair], dense_gradients([pair], 1))
    optimizer.add_param_group({"params": [plain], "kind": "plain", "lr": 0.1})
    start = plain.detach().clone()
    plain.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    assert relative(start - plain.detach(), torch.full((4,), 0.1 / (1 + 1e-8), dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (lambda pairs: {"params": [pairs[1].A], "kind": "lora_pair", "scaling": [1.0]}, "half"),
        (lambda pairs: group_of(pairs[:1]), "twice|already"),
        (lambda pairs: group_of(pairs[1:]) | {"kind": "pairs"}, "lora_pair.*plain"),
        (lambda pairs: group_of(pairs[1:], lr=-1.0), "-1"),
    ],
)
def test_a_group_that_cannot_be_used_is_refused_and_changes_nothing(group: Any, said: str) -> None:
    pairs = new_pairs([(10, 6, 2), (10, 6, 2)])
    optimizer = make("rite", pairs[:1])
    with pytest.raises(ConfigError, match=said):
        optimizer.add_param_group(group(pairs))
    assert len(optimizer.param_groups) == 1
    walk(optimizer, pairs[:1], dense_gradients(pairs[:1], 2))


@every_kind
def test_maximize_is_the_step_of_the_negative_gradient(kind: str) -> None:
    up, down = new_pairs(), new_pairs()
    gradients = dense_gradients(up, 4)
    walk(MAKERS[kind]([group_of(up, maximize=True)], lr=1e-2), up, [[-G for G in step] for step in gradients])
    walk(MAKERS[kind]([group_of(down)], lr=1e-2), down, gradients)
    assert_same_bits(factors(up), factors(down))


# Learning rates.


@every_kind
def test_schedulers_of_torch_and_transformers_set_the_rate_of_each_step(kind: str) -> None:
    for build in (
        lambda optimizer: LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1.0 + step]),
        lambda optimizer: get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6),
    ):
        pairs, by_hand = new_pairs([(10, 6, 2), (8, 9, 4)]), new_pairs([(10, 6, 2), (8, 9, 4)])
        optimizer, other = (MAKERS[kind]([group_of([pair]) for pair in both], lr=1e-2) for both in (pairs, by_hand))
        scheduler = build(optimizer)
        for G in dense_gradients(pairs, 5):
            for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = own["lr"]
            walk(optimizer, pairs, [G])
            scheduler.step()
            walk(other, by_hand, [G])
        assert_same_bits(factors(pairs), factors(by_hand))


@every_kind
def test_a_rate_of_zero_moves_nothing(kind: str) -> None:
    pairs = new_pairs()
    before = factors(pairs)
    walk(make(kind, pairs, lr=0.0, weight_decay=0.1), pairs, dense_gradients(pairs, 2))
    assert_same_bits(factors(pairs), before)


@every_kind
def test_the_rate_may_be_a_tensor(kind: str) -> None:
    pairs, twins = new_pairs(), new_pairs()
    optimizer = make(kind, twins)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
    gradients = dense_gradients(pairs, 3)
    walk(make(kind, pairs), pairs, gradients)
    walk(optimizer, twins, gradients)
    assert_same_bits(factors(twins), factors(pairs))


# Closures, gradients.


@every_kind
def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back(kind: str) -> None:
    pairs, twins = new_pairs([(10, 6, 2)]), new_pairs([(10, 6, 2)])
    target, calls = random(10, 6, seed=8), []

    def loss_of(pair: Pair) -> Tensor:
        return 0.5 * (pair.scaling * pair.B @ pair.A - target).square().sum()

    optimizer = make(kind, pairs)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(pairs[0])
        loss.backward()
        return loss

    with torch.no_grad():
        found = optimizer.step(closure)
    assert calls == [True]
    assert found.item() == loss_of(new_pair()).item()
    loss_of(twins[0]).backward()
    make(kind, twins).step()
    assert_same_bits(factors(pairs), factors(twins))


@every_kind
def test_without_any_gradient_a_step_does_nothing(kind: str) -> None:
    pairs = new_pairs()
    optimizer, before = make(kind, pairs, weight_decay=0.1), factors(pairs)
    optimizer.step()
    assert_same_bits(factors(pairs), before)
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    assert not torch.equal(factors(pairs)[0], before[0])


@every_kind
def test_a_pair_without_gradients_keeps_its_factors_and_state_and_the_others_move_as_without_it(kind: str) -> None:
    pairs, others = new_pairs(), new_pairs()
    optimizer, alone = make(kind, pairs, **unclipped(kind)), make(kind, others, **unclipped(kind))
    gradients = dense_gradients(pairs, 5)
    walk(optimizer, pairs, gradients[:2])
    walk(alone, others, gradients[:2])
    quiet = pairs[1]
    kept = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (quiet.A, quiet.B)]
    before = factors([quiet])
    for pair, other, G in zip(pairs, others, gradients[2], strict=True):
        pair.give(G), other.give(G)
    quiet.A.grad = quiet.B.grad = None
    optimizer.step(), alone.step()
    assert_same_bits(factors([quiet]), before)
    for state, factor in zip(kept, (quiet.A, quiet.B), strict=True):
        assert all(torch.equal(optimizer.state[factor][key], value) for key, value in state.items())
    assert_same_bits(
        factors([pair for pair in pairs if pair is not quiet]),
        factors([other for number, other in enumerate(others) if number != 1]),
    )


@every_kind
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(float("nan"), torch.float64), (float("inf"), torch.float32), (float("-inf"), torch.bfloat16)],
)
def test_a_gradient_that_is_not_finite_leaves_its_pair_alone_for_the_step(kind, bad, dtype) -> None:
    pairs, others = new_pairs(dtype=dtype), new_pairs(dtype=dtype)
    optimizer, alone = make(kind, pairs, **unclipped(kind)), make(kind, others, **unclipped(kind))
    gradients = dense_gradients(pairs, 5)
    walk(optimizer, pairs, gradients[:2])
    walk(alone, others, gradients[:2])
    sick = pairs[4]
    kept = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (sick.A, sick.B)]
    before = factors([sick])
    for pair, other, G in zip(pairs, others, gradients[2], strict=True):
        pair.give(G), other.give(G)
    sick.B.grad[1, 0] = bad
    optimizer.step(), alone.step()
    assert_same_bits(factors([sick]), before)
    for state, factor in zip(kept, (sick.A, sick.B), strict=True):
        assert all(torch.equal(optimizer.state[factor][key], value) for key, value in state.items())
    healthy = [number for number in range(len(pairs)) if number != 4]
    assert_same_bits(factors([pairs[n] for n in healthy]), factors([others[n] for n in healthy]))
    walk(optimizer, pairs, gradients[3:])  # and it goes on with good ones
    assert all(factor.isfinite().all() for factor in factors(pairs))
    assert not torch.equal(sick.A.detach(), before[0])


@every_kind
def test_all_gradients_not_finite_leave_everything_alone(kind: str) -> None:
    pairs = new_pairs()
    optimizer, before = make(kind, pairs), factors(pairs)
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.full_like(pair.A, float("nan")), torch.full_like(pair.B, float("nan"))
    optimizer.step()
    assert_same_bits(factors(pairs), before)


@every_kind
def test_clipped_gradients_are_what_is_stepped_on(kind: str) -> None:
    pairs, twins = new_pairs(), new_pairs()
    (G,) = dense_gradients(pairs, 1, size=5.0)
    for pair, twin, one in zip(pairs, twins, G, strict=True):
        pair.give(one), twin.give(one)
    flat = [factor for pair in pairs for factor in (pair.A, pair.B)]
    norm = torch.nn.utils.clip_grad_norm_(flat, 1.0)
    for factor, twin in zip(flat, (f for pair in twins for f in (pair.A, pair.B)), strict=True):
        twin.grad = factor.grad.clone()
    assert norm > 1
    make(kind, pairs).step(), make(kind, twins).step()
    assert_same_bits(factors(pairs), factors(twins))


@every_kind
def test_gradients_are_not_changed_by_a_step(kind: str) -> None:
    pairs = new_pairs(dtype=torch.float32)
    (G,) = dense_gradients(pairs, 1)
    for pair, one in zip(pairs, G, strict=True):
        pair.give(one)
    before = [factor.grad.clone() for pair in pairs for factor in (pair.A, pair.B)]
    make(kind, pairs).step()
    assert_same_bits([factor.grad for pair in pairs for factor in (pair.A, pair.B)], before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_let_go_after_the_step(kind: str, dtype: torch.dtype) -> None:
    pairs = new_pairs([*MIXED, (4200, 8, 16)], dtype=dtype)  # the last is too large to be stacked with others
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    (G,) = dense_gradients(pairs, 1, seed=3)
    for pair, one in zip(pairs, G, strict=True):
        pair.give(one)
    kept = [weakref.ref(factor.grad) for pair in pairs for factor in (pair.A, pair.B)]
    held = tensor_bytes()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [one() for one in kept] == [None] * len(kept)
    assert tensor_bytes() < held


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Of no other class: those that torch.compile left behind have no memory to ask for.
        alive = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


@every_kind
def test_a_loss_scaler_unscales_and_skips_a_step_that_overflowed(kind: str) -> None:
    pairs, twins = new_pairs(dtype=torch.float32), new_pairs(dtype=torch.float32)
    optimizer, plain = make(kind, pairs), make(kind, twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, G in enumerate(dense_gradients(pairs, 4)):
        overflow = number == 1
        for pair, twin, one in zip(pairs, twins, G, strict=True):
            pair.give(one), twin.give(one)
            pair.A.grad.mul_(scaler.get_scale()), pair.B.grad.mul_(scaler.get_scale())
        scaler.scale(torch.zeros(()))  # as a backward pass would make it known
        if overflow:
            pairs[0].A.grad[0, 0] = float("inf")
        before = factors(pairs)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_same_bits(factors(pairs), before)
        else:
            plain.step()
    assert_same_bits(factors(pairs), factors(twins))


@every_kind
def test_hooks_of_torch_run(kind: str) -> None:
    pairs, heard = new_pairs(), []
    optimizer = make(kind, pairs)
    optimizer.register_step_post_hook(lambda *given: heard.append("after"))
    optimizer.register_step_pre_hook(lambda *given: heard.append("before"))
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    assert heard == ["before", "after"]


@every_kind
def test_a_coarse_matmul_precision_is_set_aside_within_the_step(kind: str) -> None:
    """Set for one back end: torch's older setting for all of them raises once anything used the newer ones."""
    pairs, twins = new_pairs([(64, 96, 8)], dtype=torch.float32), new_pairs([(64, 96, 8)], dtype=torch.float32)
    gradients = dense_gradients(pairs, 3)
    walk(make(kind, pairs), pairs, gradients)
    optimizer, setting = make(kind, twins), torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        for G in gradients:
            twins[0].give(G[0])
            setting.fp32_precision = "bf16"
            optimizer.step()
            assert setting.fp32_precision == "bf16"
            setting.fp32_precision = before
    finally:
        setting.fp32_precision = before
    assert_same_bits(factors(twins), factors(pairs))


@every_kind
def test_parameters_on_a_non_default_layout_are_stepped_right(kind: str) -> None:
    pair, twin = new_pair((12, 9, 4)), new_pair((12, 9, 4))
    turned = Pair(
        nn.Parameter(twin.A.detach().mT.contiguous().mT), nn.Parameter(twin.B.detach().mT.contiguous().mT), 2.0
    )
    assert not turned.A.is_contiguous()
    gradients = dense_gradients([pair], 4)
    walk(make(kind, [pair]), [pair], gradients)
    walk(make(kind, [turned]), [turned], gradients)
    for found, expected in zip(factors([turned]), factors([pair]), strict=True):
        assert relative(found, expected) <= 1e-13


# Something else writes to the factors between steps.


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_that_something_else_wrote_are_where_the_next_step_starts(kind: str, dtype: torch.dtype) -> None:
    pairs = new_pairs(dtype=dtype)
    optimizer = make(kind, pairs, lr=1e-3)
    gradients = dense_gradients(pairs, 4)
    walk(optimizer, pairs, gradients[:2])
    fresh = new_pairs([tuple(shape) for shape in MIXED], dtype=dtype)
    with torch.no_grad():
        for pair, new in zip(pairs, fresh, strict=True):
            pair.A.copy_(-2.0 * new.A), pair.B.copy_(3.0 * new.B)
    before = [pair.product() for pair in pairs]
    walk(optimizer, pairs, gradients[2:])
    for pair, product in zip(pairs, before, strict=True):
        assert pair.product().isfinite().all()
        assert relative(pair.product(), product) <= 0.5  # at lr 1e-3 two steps do not undo what was written


def test_with_rite_only_the_coordinates_of_an_edited_pair_start_again() -> None:
    """Scaling A by c and B by 1/c leaves the product and the bases, so the step goes on as if nothing had happened."""
    pairs, twins = new_pairs([(10, 6, 2)]), new_pairs([(10, 6, 2)])
    optimizers = make("rite", pairs), make("rite", twins)
    gradients = dense_gradients(pairs, 6)
    for both, optimizer in zip((pairs, twins), optimizers, strict=True):
        walk(optimizer, both, gradients[:3])
    with torch.no_grad():
        twins[0].A.mul_(4.0), twins[0].B.div_(4.0)
    for both, optimizer in zip((pairs, twins), optimizers, strict=True):
        walk(optimizer, both, gradients[3:4])
    assert relative(twins[0].product(), pairs[0].product()) <= 0.05


# Settings.


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": 1e-3, "betas": (1.0, 0.999)}, "betas"),
        ({"lr": 1e-3, "betas": (0.9, -0.1)}, "betas"),
        ({"lr": 1e-3, "eps": -1e-8}, "eps"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay"),
        ({"lr": 1e-3, "weight_decay": float("nan")}, "weight_decay"),
    ],
)
@pytest.mark.parametrize("optimizer", [LoRARITEOptimizer, LoRAProOptimizer])
def test_a_setting_out_of_range_is_refused_by_name(optimizer: Any, settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer([group_of([new_pair()])], **settings_)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"mode": "best"}, "efficient.*full.*sgd"),
        ({"x_mode": "ones"}, "sylvester.*zero.*symmetry"),
        ({"delta": -1.0}, "delta"),
        ({"delta_rel": -1.0}, "delta_rel"),
        ({"mode": "efficient", "amsgrad": True}, "amsgrad.*full"),
        ({"mode": "sgd", "amsgrad": True}, "amsgrad.*full"),
    ],
)
def test_settings_of_lora_pro_are_refused_with_what_is_allowed(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoRAProOptimizer([group_of([new_pair()])], lr=1e-3, **settings_)


def test_sgd_of_lora_pro_refuses_momentum() -> None:
    for words in ({"momentum": 0.9}, {"dampening": 0.1}, {"nesterov": True}):
        with pytest.raises(ConfigError, match=r"momentum|nesterov|dampening"):
            LoRAProOptimizer([group_of([new_pair()], **words)], lr=1e-3, mode="sgd")


def test_rite_refuses_rates_that_differ_between_the_factors() -> None:
    for key in ("lr_ratio", "loraplus_lr_ratio"):
        with pytest.raises(ConfigError, match=r"LoRA\+"):
            LoRARITEOptimizer([group_of([new_pair()], **{key: 16.0})], lr=1e-3)


@pytest.mark.parametrize("kind", ["rite", "pro-efficient", "pro-full", "pro-sgd"])
def test_a_padded_stack_at_zero_lora_B_is_not_taken_for_ill_conditioned(kind: str, monkeypatch: Any) -> None:
    pairs = new_pairs([(10, 6, 2), (12, 8, 4), (8, 16, 3)], dtype=torch.float32, zero_B=True)
    optimizer = make(kind, pairs)
    looked: list[Any] = []
    monkeypatch.setattr(type(optimizer._rule), "look_again", lambda self, pair: looked.append(pair))
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    assert not looked
    assert all(factor.isfinite().all() for factor in factors(pairs))
