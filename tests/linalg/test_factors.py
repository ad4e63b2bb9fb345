"""Factored updates against dense float64 references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.linalg.factors import (
    balance,
    compress,
    product_norm,
    project_onto_rows,
    regress_dense_on_rows,
    regress_on_rows,
    relative_difference,
    stack,
)
from rankwise.linalg.random import generator

SIDES = st.integers(1, 24)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed, "test", *shape), dtype=torch.float64).to(dtype)


def ill_conditioned(seed, rank, columns, condition):
    U, _, Vh = torch.linalg.svd(draw(seed, rank, columns), full_matrices=False)
    return U * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ Vh


def close(value, reference, tolerance):
    return float((value.double() - reference).norm()) <= tolerance * max(float(reference.norm()), 1e-300)


def test_projection_worked_by_hand():
    rows = torch.tensor([[3.0, 4.0]])
    matrix = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert torch.allclose(project_onto_rows(matrix, rows), torch.tensor([[0.36, 0.48], [2.4, 3.2]]))
    assert torch.allclose(regress_on_rows(matrix @ rows.T, rows), torch.tensor([[3 / 25], [20 / 25]]))


@given(SIDES, SIDES, SIDES, st.integers(0, 10**6))
def test_regression_equals_the_dense_pseudo_inverse(m, n, r, seed):
    G, A = draw(seed, m, n), draw(seed + 1, min(r, n), n)
    condition = float(torch.linalg.cond(A))
    reference = G @ torch.linalg.pinv(A)
    assert close(regress_on_rows(G @ A.T, A), reference, 1e-13 * condition**2)
    assert close(regress_dense_on_rows(G, A), reference, 1e-13 * condition)
    assert close(regress_on_rows((G @ A.T).float(), A.float()), reference, 1e-5 * condition**2)


@given(SIDES, SIDES, SIDES, st.integers(0, 10**6))
def test_the_residual_is_orthogonal_to_the_rows_and_projection_is_idempotent(m, n, r, seed):
    G, A = draw(seed, m, n, dtype=torch.float32), draw(seed + 1, min(r, n), n, dtype=torch.float32)
    P = project_onto_rows(G, A)
    bound = 1e-6 * float(G.norm() * A.norm())
    assert float(((G - P).double() @ A.double().T).abs().max()) <= bound
    assert float((project_onto_rows(P, A) - P).abs().max()) <= 2e-6 * float(G.norm())
    assert float(G.norm()) ** 2 == pytest.approx(float(P.norm()) ** 2 + float((G - P).norm()) ** 2, rel=1e-5)


def test_an_ill_conditioned_factor_keeps_its_digits_where_a_gram_inverse_loses_them():
    A = ill_conditioned(0, 8, 32, condition=1e5)
    G = draw(1, 16, 32)
    reference = G @ torch.linalg.pinv(A)
    gram = G @ A.T @ torch.linalg.inv(A @ A.T)
    ours = regress_dense_on_rows(G, A)
    assert close(ours, reference, 1e-9)
    assert not close(gram, reference, 1e-8)


@pytest.mark.parametrize("kind", ["repeated row", "zero row", "more rows than columns", "all zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_rows_give_a_bounded_result_with_the_right_projection(kind, dtype):
    A = draw(3, 4, 12, dtype=dtype)
    if kind == "repeated row":
        A[2] = A[1]
    elif kind == "zero row":
        A[2] = 0
    elif kind == "more rows than columns":
        A = draw(3, 15, 12, dtype=dtype)
    else:
        A = torch.zeros_like(A)
    G = draw(4, 6, 12, dtype=dtype)
    reference = G.double() @ torch.linalg.pinv(A.double()) @ A.double()
    for B in (regress_on_rows(G @ A.T, A), regress_dense_on_rows(G, A)):
        assert bool(B.isfinite().all())
        assert float(B.norm()) <= 10 * float(G.norm())
        # The relative ridge (eps * ||A||^2) costs eps * (sigma_max / sigma_min)^2 of the well-determined directions.
        assert close(B @ A, reference, 1e-4)
    assert close(project_onto_rows(G, A), reference, 1e-4)


def test_leading_dimensions_are_a_batch():
    G, A = draw(5, 2, 3, 7, 9), draw(6, 2, 3, 4, 9)
    assert torch.allclose(regress_on_rows(G @ A.mT, A)[1, 2], regress_on_rows(G[1, 2] @ A[1, 2].T, A[1, 2]))
    assert torch.allclose(project_onto_rows(G, A)[0, 1], project_onto_rows(G[0, 1], A[0, 1]))


def test_one_deficient_member_of_a_batch_does_not_disturb_the_others():
    A = draw(7, 2, 3, 8)
    A[0, 1] = A[0, 0]
    G = draw(8, 2, 5, 8)
    assert close(regress_dense_on_rows(G, A)[1], G[1] @ torch.linalg.pinv(A[1]), 1e-12)


@pytest.mark.parametrize(
    ("given_dtype", "returned"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_results_are_float32_or_as_wide_as_the_input(given_dtype, returned):
    dtype, wanted = getattr(torch, given_dtype), getattr(torch, returned)
    A, B, G = draw(0, 2, 5, dtype=dtype), draw(1, 4, 2, dtype=dtype), draw(2, 4, 5, dtype=dtype)
    results = [
        project_onto_rows(G, A),
        regress_on_rows(G @ A.T, A),
        regress_dense_on_rows(G, A),
        *stack([(A, B, 0.5)]),
        *balance(A, B),
        compress(A, B).lora_A,
        compress(A, B).lora_B,
    ]
    assert {result.dtype for result in results} == {wanted}


@given(SIDES, SIDES, st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 10**6))
def test_stacking_adds_the_updates(m, n, ranks, seed):
    parts = [(draw(seed + i, r, n), draw(seed - i, m, r), 0.5 + i) for i, r in enumerate(ranks)]
    lora_A, lora_B = stack(parts)
    assert lora_A.shape == (sum(ranks), n)
    dense = sum((s * B @ A for A, B, s in parts), torch.zeros(m, n, dtype=torch.float64))
    assert torch.allclose(lora_B @ lora_A, dense, atol=1e-12)


def test_stacking_nothing_is_refused():
    with pytest.raises(ValueError, match="no parts"):
        stack([])


@given(SIDES, SIDES, st.integers(1, 5), st.integers(-30, 30), st.integers(0, 10**6))
def test_balancing_equalizes_norms_and_keeps_the_product_bit_for_bit(m, n, r, exponent, seed):
    A, B = draw(seed, r, n, dtype=torch.float32) * 2.0**exponent, draw(seed + 1, m, r, dtype=torch.float32)
    A2, B2 = balance(A, B)
    # One rank at a time: a product of two numbers has the same bits when a power of two moves between them.
    for k in range(r):
        assert torch.equal(torch.outer(B2[:, k], A2[k]), torch.outer(B[:, k], A[k]))
    ratio = A2.norm(dim=1) / B2.norm(dim=0)
    assert bool(((ratio <= 2.001) & (ratio >= 0.499)).all())


def test_balancing_rescues_a_factor_that_float16_would_lose():
    A, B = torch.full((1, 4), 300.0), torch.full((4, 1), 1e-9)
    assert not bool(B.half().any())
    A2, B2 = (factor.half().float() for factor in balance(A, B))
    assert torch.allclose(B2 @ A2, B @ A, rtol=2e-3)


def test_balancing_leaves_zero_ranks_alone():
    A, B = torch.ones(2, 3), torch.tensor([[0.0, 1.0]] * 4)
    assert torch.equal(balance(A, B)[0], A)


@given(SIDES, SIDES, st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_compression_is_the_best_of_its_rank(m, n, r, rank, seed):
    A, B = draw(seed, r, n), draw(seed + 1, m, r)
    result = compress(A, B, rank)
    S = torch.linalg.svdvals(B @ A)
    error = float((result.lora_B @ result.lora_A - B @ A).norm())
    assert result.lora_A.shape[0] <= rank
    assert error == pytest.approx(float(S[rank:].norm()), abs=1e-12 * float(S.norm()))
    assert result.discarded == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-12)


@given(SIDES, SIDES, st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_compression_to_the_true_rank_loses_nothing(m, n, true_rank, copies, seed):
    A, B = draw(seed, true_rank, n), draw(seed + 1, m, true_rank)
    A2, B2 = stack([(A, B, 1.0)] * copies)
    result = compress(A2.float(), B2.float())
    assert result.lora_A.shape[0] <= true_rank
    assert result.discarded <= 1e-6
    assert close(result.lora_B @ result.lora_A, copies * B @ A, 1e-5)


def test_compression_has_fixed_signs_and_balanced_factors():
    A, B = draw(9, 3, 6), draw(10, 5, 3)
    first, second = compress(A, B), compress(-A[[2, 0, 1]], -B[:, [2, 0, 1]])
    assert torch.allclose(first.lora_A, second.lora_A, atol=1e-12)
    assert torch.allclose(first.lora_A.norm(dim=1), first.lora_B.norm(dim=0))


def test_compressing_a_zero_update_leaves_no_rank():
    result = compress(torch.ones(2, 5), torch.zeros(4, 2))
    assert (result.lora_A.shape, result.lora_B.shape, result.discarded) == ((0, 5), (4, 0), 0.0)


def test_compression_to_no_rank_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        compress(torch.ones(2, 5), torch.ones(4, 2), 0)


@given(SIDES, SIDES, st.integers(0, 8), st.integers(0, 10**6))
def test_product_norm_is_the_norm_of_the_dense_product(m, n, r, seed):
    A, B = draw(seed, r, n), draw(seed + 1, m, r)
    assert product_norm(A, B) == pytest.approx(float((B @ A).norm()), rel=1e-12)


@given(SIDES, SIDES, st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_relative_difference_equals_the_dense_one(m, n, r, k, seed):
    first, second = (draw(seed, r, n), draw(seed + 1, m, r)), (draw(seed + 2, k, n), draw(seed + 3, m, k))
    dense = first[1] @ first[0] - second[1] @ second[0]
    reference = float(dense.norm() / (second[1] @ second[0]).norm())
    assert relative_difference(first, second) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
def test_relative_difference_of_near_equal_updates_keeps_its_digits(size):
    A, B, E = draw(11, 8, 64), draw(12, 48, 8), draw(13, 48, 8)
    wanted = size * float((E @ A).norm() / (B @ A).norm())
    assert relative_difference((A, B + size * E), (A, B)) == pytest.approx(wanted, rel=max(1e-3, 1e-14 / size))
    turned = torch.linalg.qr(draw(14, 8, 8)).Q  # the same update in other coordinates
    assert relative_difference((turned.T @ A, B @ turned), (A, B)) < 1e-14


def test_relative_difference_of_zero_updates():
    zero, one = (torch.zeros(1, 3), torch.zeros(2, 1)), (torch.ones(1, 3), torch.ones(2, 1))
    assert relative_difference(zero, zero) == 0.0
    assert relative_difference(one, zero) == math.inf
    assert relative_difference((torch.zeros(0, 3), torch.zeros(2, 0)), one) == pytest.approx(1.0)
