"""What cannot be optimized is refused before the first step, in words that say what would work."""

from typing import Any

import pytest
import torch
from torch import nn

from rankwise.errors import ConfigError
from tests.optimizers.support import (
    MAKERS,
    Pair,
    dense_gradients,
    factors,
    group_of,
    make,
    new_pair,
    new_pairs,
    random,
    walk,
)

every_maker = pytest.mark.parametrize("kind", ["rite", "pro-efficient", "pro-full", "pro-sgd"])


def build(kind: str, *groups: dict[str, Any]) -> torch.optim.Optimizer:
    return MAKERS[kind](list(groups), lr=1e-3)


@every_maker
def test_a_missing_half_is_named(kind: str) -> None:
    pair = new_pair()
    with pytest.raises(ConfigError, match=r"half is missing.*A1, B1"):
        build(kind, {"params": [pair.A], "kind": "lora_pair", "scaling": [1.0]})


@every_maker
def test_halves_in_the_wrong_order_or_of_other_ranks_are_shown_with_their_shapes(kind: str) -> None:
    pair, other = new_pair((10, 6, 2)), new_pair((10, 6, 3))
    for params in ([pair.B, pair.A], [pair.A, other.B]):
        with pytest.raises(ConfigError, match=r"\(2, 6\)|\(10, 2\)"):
            build(kind, {"params": params, "kind": "lora_pair", "scaling": [1.0]})


@every_maker
def test_a_parameter_listed_twice_is_refused(kind: str) -> None:
    pair, other = new_pair(), new_pair(seed=1)
    with pytest.raises(ConfigError, match="twice"):
        build(kind, group_of([pair, pair]))
    with pytest.raises(ConfigError, match="twice"):
        build(kind, group_of([pair, Pair(pair.A, other.B, 1.0)]))
    with pytest.raises(ConfigError, match="twice"):
        build(kind, group_of([pair]), {"params": [pair.B], "kind": "plain"})


@every_maker
def test_two_parameters_on_one_memory_are_refused(kind: str) -> None:
    pair = new_pair()
    tied = Pair(nn.Parameter(pair.A.detach()), new_pair(seed=1).B, 1.0)
    assert tied.A.data_ptr() == pair.A.data_ptr()
    with pytest.raises(ConfigError, match="shared"):
        build(kind, group_of([pair, tied]))


@every_maker
def test_overlapping_memory_that_starts_elsewhere_is_refused_too(kind: str) -> None:
    whole = random(5, 6, seed=1)
    first = Pair(nn.Parameter(whole[0:3]), nn.Parameter(random(10, 3, seed=2)), 1.0)
    second = Pair(nn.Parameter(whole[2:5]), nn.Parameter(random(10, 3, seed=3)), 1.0)
    with pytest.raises(ConfigError, match="shared"):
        build(kind, group_of([first, second]))


@every_maker
def test_neighbors_in_one_memory_are_not_shared(kind: str) -> None:
    whole = random(6, 6, seed=1)
    pairs = [Pair(nn.Parameter(whole[3 * k : 3 * k + 3]), nn.Parameter(random(10, 3, seed=k)), 1.0) for k in (0, 1)]
    optimizer = build(kind, group_of(pairs))
    walk(optimizer, pairs, dense_gradients(pairs, 2))
    assert all(factor.isfinite().all() for factor in factors(pairs))


@every_maker
def test_an_unknown_kind_or_none_is_told_the_two_there_are(kind: str) -> None:
    pair = new_pair()
    for group in ({"params": [pair.A, pair.B]}, {"params": [pair.A, pair.B], "kind": "lora"}):
        with pytest.raises(ConfigError, match=r"lora_pair.*plain"):
            build(kind, group)


@every_maker
def test_no_pair_at_all_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="pair"):
        build(kind, {"params": [nn.Parameter(torch.ones(3))], "kind": "plain"})


@every_maker
@pytest.mark.parametrize("scaling", [None, [], [1.0, 2.0], [0.0], [float("nan")], [float("inf")], ["2"]])
def test_a_scaling_that_is_missing_or_no_number_is_refused(kind: str, scaling: Any) -> None:
    group = group_of([new_pair()]) | {"scaling": scaling}
    with pytest.raises(ConfigError, match="scaling"):
        build(kind, group)


@every_maker
def test_types_that_cannot_be_trained_are_refused(kind: str) -> None:
    complex_pair = Pair(nn.Parameter(torch.ones(2, 6, dtype=torch.complex64)), new_pair().B, 1.0)
    with pytest.raises(ConfigError, match="complex"):
        build(kind, group_of([complex_pair]))
    mixed = Pair(new_pair().A, new_pair(dtype=torch.float32).B, 1.0)
    with pytest.raises(ConfigError, match=r"float64.*float32"):
        build(kind, group_of([mixed]))
    with pytest.raises(ConfigError, match="complex"):
        build(
            kind,
            group_of([new_pair()]),
            {"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))], "kind": "plain"},
        )


@every_maker
def test_flattened_factors_are_named_by_their_layer(kind: str) -> None:
    pairs = new_pairs([(10, 6, 2), (8, 6, 2)])
    optimizer = build(kind, group_of(pairs, names=["layers.0.q_proj", "layers.0.k_proj"]))
    walk(optimizer, pairs, dense_gradients(pairs, 1))
    pairs[1].A.data = pairs[1].A.data.flatten()
    with pytest.raises(ConfigError, match=r"layers\.0\.k_proj\.lora_A has the shape \(12,\) now"):
        optimizer.step()


@every_maker
def test_sparse_gradients_are_refused_and_nothing_moved(kind: str) -> None:
    pair, plain = new_pair(), nn.Parameter(random(4, 3, seed=1))
    optimizer = build(kind, group_of([pair]), {"params": [plain], "kind": "plain"})
    before = factors([pair])
    pair.give(random(10, 6, seed=2))
    plain.grad = torch.eye(4, 3, dtype=torch.float64).to_sparse()
    with pytest.raises(ConfigError, match="the gradient of parameter 0 of group 1 is sparse"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(factors([pair]), before, strict=True))


@every_maker
def test_flat_shards_are_refused_at_construction_and_told_what_works(kind: str) -> None:
    pair = new_pair()
    flat = Pair(nn.Parameter(pair.A.detach().flatten()), nn.Parameter(pair.B.detach().flatten()), 1.0)
    with pytest.raises(ConfigError, match=r"FSDP1.*DeepSpeed.*(DDP|FSDP2)"):
        build(kind, group_of([flat]))


@every_maker
def test_the_empty_parameters_of_zero_3_are_refused(kind: str) -> None:
    empty = Pair(nn.Parameter(torch.empty(0, 6)), nn.Parameter(torch.empty(10, 0)), 1.0)
    with pytest.raises(ConfigError, match="ZeRO"):
        build(kind, group_of([empty]))


@every_maker
def test_an_engine_that_flattens_the_parameters_later_is_refused_at_the_step(kind: str) -> None:
    pair = new_pair()
    optimizer = build(kind, group_of([pair]))
    pair.A.data, pair.B.data = pair.A.data.flatten(), pair.B.data.flatten()
    pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    with pytest.raises(ConfigError, match=r"(DeepSpeed|ZeRO).*DDP"):
        optimizer.step()


@every_maker
def test_an_engine_that_replaces_the_groups_parameters_is_refused_at_the_step(kind: str) -> None:
    """DeepSpeed ZeRO puts one flat float32 partition in the place of a group's parameters."""
    pair = new_pair()
    optimizer = build(kind, group_of([pair]))
    flat = nn.Parameter(torch.cat([pair.A.detach().flatten(), pair.B.detach().flatten()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ConfigError, match=r"(DeepSpeed|ZeRO).*DDP"):
        optimizer.step()


@every_maker
def test_a_scaling_that_changes_between_steps_is_refused_until_it_is_announced(kind: str) -> None:
    pairs = new_pairs([(10, 6, 2), (8, 9, 4)])
    optimizer = make(kind, pairs)
    gradients = dense_gradients(pairs, 2)
    walk(optimizer, pairs, gradients[:1])
    optimizer.param_groups[0]["scaling"][1] = 4.0
    with pytest.raises(ConfigError, match=r"2.*4.*announce"):
        walk(optimizer, pairs, gradients[1:])
    optimizer.param_groups[0]["scaling"][1] = 2.0
    walk(optimizer, pairs, gradients[1:])
    optimizer.announce_scaling(pairs[1].A, 4.0)  # type: ignore[attr-defined]
    pairs[1].scaling = 4.0
    walk(optimizer, pairs, gradients[1:])
    with pytest.raises(ConfigError, match="no pair"):
        optimizer.announce_scaling(new_pair().A, 4.0)  # type: ignore[attr-defined]


@every_maker
def test_an_empty_plain_parameter_does_no_harm(kind: str) -> None:
    pair, empty = new_pair(), nn.Parameter(torch.empty(0, 3))
    optimizer = build(kind, group_of([pair]), {"params": [empty], "kind": "plain"})
    empty.grad = torch.empty(0, 3)
    walk(optimizer, [pair], dense_gradients([pair], 2))
    assert empty.shape == (0, 3)


def test_many_faults_are_told_at_once() -> None:
    pair = new_pair()
    with pytest.raises(ConfigError) as caught:
        build("rite", {"params": [pair.A], "kind": "lora_pair", "scaling": [1.0]}, {"params": [pair.B], "kind": "odd"})
    assert len(caught.value.faults) == 2
