"""Small symmetric solves against dense float64 references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.linalg.random import generator
from rankwise.linalg.solve import psd_inverse, psd_roots, solve_sylvester


def draw(seed, *shape):
    return torch.randn(*shape, generator=generator(seed, "test", *shape), dtype=torch.float64)


def gram(seed, size, rank=None):
    factor = draw(seed, size, rank or size + 2)
    return factor @ factor.T


def test_inverse_and_roots_worked_by_hand():
    matrix = torch.tensor([[4.0, 0.0], [0.0, 9.0]])
    root, inverse_root = psd_roots(matrix)
    assert torch.allclose(root, torch.diag(torch.tensor([2.0, 3.0])))
    assert torch.allclose(inverse_root, torch.diag(torch.tensor([1 / 2, 1 / 3])))
    assert torch.allclose(psd_inverse(matrix), torch.diag(torch.tensor([1 / 4, 1 / 9])))
    assert torch.allclose(psd_inverse(matrix, damping=1.0), torch.diag(torch.tensor([1 / 5, 1 / 10])))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_inverse_is_the_pseudo_inverse_at_any_rank(size, rank, seed):
    matrix = gram(seed, size, min(rank, size))
    reference = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
    assert torch.allclose(psd_inverse(matrix, cutoff=1e-12), reference, rtol=1e-6, atol=1e-9 * float(reference.norm()))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_roots_multiply_to_the_matrix_and_to_the_projector(size, rank, seed):
    matrix = gram(seed, size, min(rank, size))
    root, inverse_root = psd_roots(matrix, cutoff=1e-12)
    assert torch.allclose(root @ root, matrix, atol=1e-10 * float(matrix.norm()))
    projector = root @ inverse_root
    assert torch.allclose(projector @ projector, projector, atol=1e-6)
    assert float(projector.trace()) == pytest.approx(min(rank, size), abs=1e-6)


def test_negative_rounding_eigenvalues_give_zero_and_not_nan():
    matrix = torch.diag(torch.tensor([1.0, -1e-9]))
    for result in (*psd_roots(matrix), psd_inverse(matrix)):
        assert torch.allclose(result, torch.diag(torch.tensor([1.0, 0.0])))


def test_a_zero_matrix_gives_zeros():
    zero = torch.zeros(3, 3)
    for result in (*psd_roots(zero), psd_inverse(zero, damping=1e-8), solve_sylvester(zero, zero, torch.ones(3, 3))):
        assert torch.equal(result, zero)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_sylvester_equals_the_dense_kronecker_solve(m, n, seed):
    left, right, value = gram(seed, m), gram(seed + 1, n), draw(seed + 2, m, n)
    X = solve_sylvester(left, right, value)
    eye_m, eye_n = (torch.eye(size, dtype=torch.float64) for size in (m, n))
    dense = torch.linalg.solve(torch.kron(left, eye_n) + torch.kron(eye_m, right), value.reshape(-1)).reshape(m, n)
    assert torch.allclose(X, dense, rtol=1e-7, atol=1e-9 * float(dense.norm()))
    assert float((left @ X + X @ right - value).norm()) <= 1e-9 * float(value.norm()) * float(torch.linalg.cond(left))


def test_a_singular_sylvester_equation_gets_its_solution_of_least_norm():
    left, right = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0]))
    X = solve_sylvester(left, right, torch.tensor([[6.0, 4.0], [3.0, 0.0]]))
    assert torch.allclose(X, torch.tensor([[2.0, 2.0], [3.0, 0.0]]))


def test_damping_enters_every_denominator():
    left = right = torch.eye(2)
    assert torch.allclose(solve_sylvester(left, right, torch.ones(2, 2), damping=2.0), torch.full((2, 2), 0.25))


def test_leading_dimensions_are_a_batch():
    left = torch.stack([gram(i, 3) for i in range(4)])
    right = torch.stack([gram(i + 9, 2) for i in range(4)])
    value = draw(5, 4, 3, 2)
    assert torch.allclose(solve_sylvester(left, right, value)[2], solve_sylvester(left[2], right[2], value[2]))
    assert torch.allclose(psd_inverse(left)[1], psd_inverse(left[1]))


@pytest.mark.parametrize(
    ("given_dtype", "returned"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_results_are_float32_or_as_wide_as_the_input(given_dtype, returned):
    matrix = torch.eye(2, dtype=getattr(torch, given_dtype))
    results = (psd_inverse(matrix), *psd_roots(matrix), solve_sylvester(matrix, matrix, matrix))
    assert {result.dtype for result in results} == {getattr(torch, returned)}
