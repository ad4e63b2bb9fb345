"""Singular triples from products: exact where the rank allows it, and as good as the range they are taken from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.sketch import factored_svd, orthonormal_range, two_sided_svd


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(triples: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    U, S, Vh = triples
    return (U * S) @ Vh


def test_a_product_of_rank_one_worked_out_by_hand():
    U, S, Vh = factored_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    assert torch.allclose(U, torch.tensor([[0.6], [0.8]]))
    assert torch.allclose(S, torch.tensor([10.0]))
    assert torch.allclose(Vh, torch.tensor([[0.0, 1.0, 0.0]]))


sizes = st.tuples(st.integers(1, 6), st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**16))


@given(sizes)
def test_a_product_s_triples_are_those_of_the_dense_matrix(drawn_sizes):
    q, more_rows, more_columns, seed = drawn_sizes
    left, right = drawn(q + more_rows, q, seed=seed), drawn(q, q + more_columns, seed=seed + 1)
    U, S, Vh = factored_svd(left, right)
    assert torch.allclose(S, torch.linalg.svdvals(left @ right)[:q], rtol=1e-9, atol=1e-12)
    assert torch.allclose((U * S) @ Vh, left @ right, rtol=1e-9, atol=1e-11)
    identity = torch.eye(q, dtype=torch.float64)
    assert torch.allclose(U.mT @ U, identity, atol=1e-12)
    assert torch.allclose(Vh @ Vh.mT, identity, atol=1e-12)


@given(sizes)
def test_a_range_is_orthonormal_and_holds_every_column(drawn_sizes):
    q, more_rows, _, seed = drawn_sizes
    matrix = drawn(q + more_rows, q, seed=seed)
    basis = orthonormal_range(matrix)
    assert torch.allclose(basis.mT @ basis, torch.eye(q, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis @ (basis.mT @ matrix), matrix, atol=1e-11)


@given(sizes)
def test_two_sides_give_a_matrix_of_low_rank_back(drawn_sizes):
    rank, more_rows, more_columns, seed = drawn_sizes
    q = rank + 2
    m, n = 2 * q + 1 + more_rows, q + more_columns
    G = drawn(m, rank, seed=seed) @ drawn(rank, n, seed=seed + 1)
    P, Psi = drawn(q, n, seed=seed + 2), drawn(2 * q + 1, m, seed=seed + 3)
    found = rebuilt(two_sided_svd(G @ P.mT, Psi @ G, Psi))
    assert (found - G).norm() <= 1e-8 * G.norm()


def test_a_zero_matrix_has_zero_values_and_orthonormal_vectors():
    Psi = drawn(7, 9, seed=1)
    U, S, Vh = two_sided_svd(torch.zeros(9, 3), torch.zeros(7, 5), Psi.float())
    assert not S.any()
    assert torch.allclose(U.mT @ U, torch.eye(3), atol=1e-6)
    assert torch.allclose(Vh @ Vh.mT, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_is_float32_at_least(dtype):
    left, right = drawn(6, 2, seed=0).to(dtype), drawn(2, 5, seed=1).to(dtype)
    assert all(part.dtype == torch.float32 for part in factored_svd(left, right))


def test_one_pass_on_both_sides_is_near_the_best_that_its_range_allows():
    """On a falling spectrum; with as many products from the left as from the right it would not be."""
    m, n, q = 80, 60, 12
    U, V = torch.linalg.qr(drawn(m, n, seed=1)).Q, torch.linalg.qr(drawn(n, n, seed=2)).Q
    G = (U * 0.8 ** torch.arange(n)) @ V.mT
    P = drawn(q, n, seed=3)
    basis = orthonormal_range(G @ P.mT)
    range_error = (G - basis @ (basis.mT @ G)).norm()
    Psi = drawn(2 * q + 1, m, seed=4)
    one_pass = (G - rebuilt(two_sided_svd(G @ P.mT, Psi @ G, Psi))).norm()
    square = (G - rebuilt(two_sided_svd(G @ P.mT, Psi[:q] @ G, Psi[:q]))).norm()
    assert one_pass <= 2 * range_error
    assert square > 2 * range_error
