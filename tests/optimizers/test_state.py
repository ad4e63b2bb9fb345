"""State of the pair optimizers survives saving and 16-bit parameters (P-1 and P-2 of the common rules)."""

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import RankwiseError
from tests.optimizers.support import (
    MAKERS,
    MIXED,
    Pair,
    assert_same_bits,
    copied,
    dense_gradients,
    factors,
    group_of,
    make,
    new_pair,
    new_pairs,
    random,
    walk,
)

KINDS = sorted(MAKERS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ADAPTIVE = [kind for kind in KINDS if kind != "pro-sgd"]

every_kind = pytest.mark.parametrize("kind", KINDS)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What torch.save and a load that unpickles nothing give back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_plain(kind: str, pairs: Sequence[Pair], plain: nn.Parameter, **settings: Any) -> Optimizer:
    return MAKERS[kind]([group_of(pairs), {"params": [plain], "kind": "plain"}], lr=1e-2, **settings)


def walk_both(optimizer: Optimizer, pairs: Sequence[Pair], plain: nn.Parameter, first: int, last: int) -> None:
    for step, G in enumerate(dense_gradients(pairs, last), start=1):
        if step >= first:
            plain.grad = random(*plain.shape, seed=500 + step, dtype=plain.dtype)
            walk(optimizer, pairs, [G])


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    pairs, plain = new_pairs(dtype=dtype), nn.Parameter(random(5, 3, seed=1, dtype=dtype))
    optimizer = with_plain(kind, pairs, plain, weight_decay=0.01)
    walk_both(optimizer, pairs, plain, 1, 4)
    saved = through_a_file(optimizer.state_dict())
    others, other_plain = copied(pairs), nn.Parameter(plain.detach().clone())
    resumed = with_plain(kind, others, other_plain, weight_decay=0.01)
    resumed.load_state_dict(saved)
    walk_both(optimizer, pairs, plain, 5, 9)
    walk_both(resumed, others, other_plain, 5, 9)
    assert_same_bits([*factors(others), other_plain.detach()], [*factors(pairs), plain.detach()])
    assert_same_state(resumed, optimizer)


@every_kind
def test_loading_into_a_running_optimizer_replaces_what_it_had(kind: str) -> None:
    pairs, others = new_pairs(), new_pairs()
    first, second = make(kind, pairs), make(kind, others)
    gradients = dense_gradients(pairs, 6)
    walk(first, pairs, gradients[:3])
    walk(second, others, dense_gradients(pairs, 2, seed=5))
    with torch.no_grad():
        for pair, other in zip(pairs, others, strict=True):
            other.A.copy_(pair.A), other.B.copy_(pair.B)
    second.load_state_dict(through_a_file(first.state_dict()))
    walk(first, pairs, gradients[3:])
    walk(second, others, gradients[3:])
    assert_same_bits(factors(others), factors(pairs))


@every_kind
def test_loading_before_any_step_and_saving_again_changes_nothing(kind: str) -> None:
    pairs = new_pairs()
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 3))
    saved = through_a_file(optimizer.state_dict())
    other = make(kind, copied(pairs))
    other.load_state_dict(saved)
    assert_equal_trees(other.state_dict(), saved)


@every_kind
def test_a_state_dict_is_a_copy_in_time_of_nothing_but_tensors(kind: str) -> None:
    pairs = new_pairs()
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 2))
    for entry in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in entry.values())
    own = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    assert {id(key) for key in optimizer.state} <= own  # under the parameters, nowhere else


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_16_bit_parameters_is_wider_and_stays_so(kind: str, dtype: torch.dtype) -> None:
    pairs = new_pairs(dtype=dtype)
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 3))
    other = make(kind, copied(pairs))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for state in (optimizer.state_dict(), other.state_dict()):
        floating = [v for entry in state["state"].values() for v in entry.values() if v.is_floating_point()]
        assert floating
        assert all(value.dtype in (torch.float32, torch.float64) for value in floating)
    assert_same_state(other, optimizer)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("rite", torch.float16)])
def test_the_master_of_16_bit_parameters_is_the_float32_run(kind: str, dtype: torch.dtype) -> None:
    pairs = new_pairs([(10, 6, 2), (6, 12, 4)], dtype=dtype)
    wide = copied(pairs, torch.float32)
    optimizers = make(kind, pairs, lr=1e-3, weight_decay=0.01), make(kind, wide, lr=1e-3, weight_decay=0.01)
    for step in range(50):
        for number, (pair, twin) in enumerate(zip(pairs, wide, strict=True)):
            for key, factor in (("A", pair.A), ("B", pair.B)):
                factor.grad = 0.05 * random(*factor.shape, seed=91 * step + 7 * number + len(key), dtype=dtype)
                getattr(twin, key).grad = factor.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    masters = [optimizers[0].state[factor]["master"] for pair in pairs for factor in (pair.A, pair.B)]
    assert_same_bits(masters, factors(wide))
    assert_same_bits(factors(pairs), [value.to(dtype) for value in factors(wide)])


@pytest.mark.parametrize("kind", ["rite", "pro-efficient"])
def test_small_steps_of_bfloat16_parameters_add_up(kind: str) -> None:
    pair = new_pair(dtype=torch.bfloat16)
    start = pair.product()
    optimizer = make(kind, [pair], lr=1e-5)
    G = 0.05 * random(10, 6, seed=4)
    for _ in range(100):
        walk(optimizer, [pair], [[G]])
    assert not torch.equal(pair.product(), start)


@every_kind
def test_state_bytes_do_not_exceed_those_of_adamw_by_more_than_a_quarter(kind: str) -> None:
    if kind == "pro-full":
        return  # its moments are dense by design
    pairs = new_pairs([(96, 128, 8), (128, 64, 8)], dtype=torch.float32)
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 2))
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for value in entry.values()
    }
    count = sum(factor.numel() for pair in pairs for factor in (pair.A, pair.B))
    assert sum(storages.values()) / count <= 8 * 1.25


@every_kind
def test_a_deep_copy_goes_on_by_itself(kind: str) -> None:
    pairs = new_pairs()
    optimizer = make(kind, pairs)
    gradients = dense_gradients(pairs, 5)
    walk(optimizer, pairs, gradients[:3])
    others, twin = copy.deepcopy((pairs, optimizer))
    before = factors(pairs)
    walk(twin, others, gradients[3:])
    assert_same_bits(factors(pairs), before)
    walk(optimizer, pairs, gradients[3:])
    assert_same_bits(factors(others), factors(pairs))


# A state that is not this optimizer's.


def saved_state(kind: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 2))
    return through_a_file(optimizer.state_dict())


@every_kind
@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(10, 6, 3), (8, 9, 4)], r"\(2, 6\).*\(3, 6\)|rank"),
        ([(10, 6, 2)], "4.*2"),
        ([(10, 6, 2), (8, 9, 4), (8, 9, 4)], "4.*6"),
        ([(8, 9, 4), (10, 6, 2)], r"\(2, 6\).*\(4, 9\)|\(10, 6\).*\(8, 9\)"),
    ],
)
def test_the_state_of_another_plan_is_refused_with_both_sizes(kind: str, shapes: Any, said: str) -> None:
    saved = saved_state(kind, new_pairs([(10, 6, 2), (8, 9, 4)]))
    pairs = new_pairs(shapes)
    optimizer = make(kind, pairs)
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(RankwiseError, match=said):
        optimizer.load_state_dict(saved)
    assert_equal_trees(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("saver", "loader"), [("rite", "pro-efficient"), ("pro-efficient", "rite"), ("pro-full", "rite")]
)
def test_the_state_of_another_method_is_refused_by_its_name(saver: str, loader: str) -> None:
    names = {"rite": "lora-rite", "pro-efficient": "lora-pro", "pro-full": "lora-pro"}
    with pytest.raises(RankwiseError, match=f"{names[saver]}.*{names[loader]}"):
        make(loader, new_pairs()).load_state_dict(saved_state(saver, new_pairs()))


@pytest.mark.parametrize(("saver", "loader"), [("pro-efficient", "pro-full"), ("pro-full", "pro-efficient")])
def test_the_state_of_another_mode_is_refused(saver: str, loader: str) -> None:
    with pytest.raises(RankwiseError, match=r"efficient.*full|full.*efficient"):
        make(loader, new_pairs()).load_state_dict(saved_state(saver, new_pairs()))


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("rite", {"update_skipping": 0.5}, "skip was 0.5 there and is 1.0 here"),
        ("rite", {"apply_escape": True}, "escape was True there and is False here"),
        ("pro-efficient", {"x_mode": "zero"}, "x_mode was 'zero' there and is 'sylvester' here"),
        ("pro-full", {"amsgrad": True}, "amsgrad was True there and is False here"),
    ],
)
def test_the_state_under_other_settings_of_the_method_is_refused(kind: str, setting: Any, said: str) -> None:
    pairs = new_pairs()
    optimizer = make(kind, pairs, **setting)
    walk(optimizer, pairs, dense_gradients(pairs, 2))
    saved = through_a_file(optimizer.state_dict())
    with pytest.raises(RankwiseError, match=said):
        make(kind, copied(pairs)).load_state_dict(saved)
    same = make(kind, copied(pairs), **setting)
    same.load_state_dict(saved)
    assert_same_state(same, optimizer)


def test_the_state_of_adamw_is_refused() -> None:
    pairs = new_pairs()
    adamw = torch.optim.AdamW([factor for pair in pairs for factor in (pair.A, pair.B)])
    walk(adamw, pairs, dense_gradients(pairs, 1))
    with pytest.raises(RankwiseError, match="group"):
        make("rite", copied(pairs)).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_state_with_a_missing_tensor_is_refused_by_name(kind: str) -> None:
    saved = saved_state(kind, new_pairs())
    key = "exp_avg"
    owner = next(entry for entry in saved["state"].values() if key in entry)
    del owner[key]
    with pytest.raises(RankwiseError, match=key):
        make(kind, new_pairs()).load_state_dict(saved)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_state_with_a_damaged_small_matrix_is_refused_before_the_step(kind: str) -> None:
    saved = saved_state(kind, new_pairs(MIXED))
    owner = next(iter(saved["state"].values()))
    key = next((key for key in ("precond", "exp_avg_sq") if key in owner), "exp_avg")
    owner = owner if key in owner else next(entry for entry in saved["state"].values() if key in entry)
    owner[key] = torch.zeros(3, 99)
    with pytest.raises(RankwiseError, match=r"\(3, 99\)"):
        make(kind, new_pairs(MIXED)).load_state_dict(saved)


def assert_same_state(found: Optimizer, expected: Optimizer) -> None:
    assert_equal_trees(found.state_dict()["state"], expected.state_dict()["state"])


def assert_equal_trees(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_trees(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_trees(one, other)
    else:
        assert found == expected
