import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.linalg.gram import gram_norm, gram_row_squares, updated_row_squares

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 11))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_a_hand_worked_case() -> None:
    # left @ right = [[1, 2], [0, 4]]: rows 5 and 16, norm sqrt(21).
    left, right = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 2.0], [0.0, 2.0]])
    torch.testing.assert_close(gram_row_squares(left, right), torch.tensor([5.0, 16.0]))
    torch.testing.assert_close(gram_norm(left, right), torch.tensor(21.0).sqrt())
    # W + 0.5 B A = [[1, 1]] + 0.5 [[2]] [[3, -1]] = [[4, 0]].
    found = updated_row_squares(
        torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0]]), 0.5
    )
    torch.testing.assert_close(found, torch.tensor([16.0]))


@given(SIZES, st.integers(0, 10**6), st.floats(0.01, 8), st.integers(0, 3))
def test_the_gram_forms_are_the_dense_norms(
    size: tuple[int, int, int], seed: int, scaling: float, stacked: int
) -> None:
    m, k, n = size
    lead = (stacked,) if stacked else ()
    W, A, B = random(*lead, m, n, seed=seed), random(*lead, k, n, seed=seed + 1), random(*lead, m, k, seed=seed + 2)
    dense = W + scaling * B @ A
    found = updated_row_squares(W.square().sum(-1), W @ A.mT, A, B, scaling)
    torch.testing.assert_close(found, dense.square().sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gram_row_squares(B, A), (B @ A).square().sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram_norm(B, A), torch.linalg.matrix_norm(B @ A), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scaling", [0.25, 2.0])
def test_float32_agrees_to_1e_6_at_a_layers_size(scaling: float) -> None:
    W, A, B = random(96, 768, seed=1), random(8, 768, seed=2) * 0.03, random(96, 8, seed=3) * 0.05
    small = [value.float() for value in (W, A, B)]
    dense = W.float().double() + scaling * B.float().double() @ A.float().double()
    squares = small[0].double().square().sum(-1).float()
    found = updated_row_squares(squares, small[0] @ small[1].T, small[1], small[2], scaling)
    assert ((found.double() / dense.square().sum(-1)) - 1).abs().max() < 1e-6
    assert float(gram_norm(small[2], small[1]).double() / torch.linalg.matrix_norm(B @ A) - 1) < 1e-6


def test_a_pair_that_is_subtracted_enters_as_more_columns() -> None:
    W, A, A0 = random(5, 9, seed=1), random(2, 9, seed=2), random(3, 9, seed=3)
    B, B0 = random(5, 2, seed=4), random(5, 3, seed=5)
    rows, columns = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
    found = updated_row_squares(W.square().sum(-1), W @ rows.T, rows, columns, 2.0)
    torch.testing.assert_close(found, (W + 2 * (B @ A - B0 @ A0)).square().sum(-1))


def test_rounding_leaves_no_norm_below_zero_and_nan_stays_visible() -> None:
    W = random(4, 300, seed=0, dtype=torch.float32)
    A = W[:2] / 3  # rows of W itself, so that W + s B A can vanish in two rows
    B = torch.zeros(4, 2)
    B[0, 0] = B[1, 1] = -3.0
    found = updated_row_squares(W.square().sum(-1), W @ A.T, A, B, 1.0)
    assert (found >= 0).all()
    assert float(found[:2].max()) < 1e-3 * float(W[0].square().sum())
    B[3, 0] = float("nan")
    assert updated_row_squares(W.square().sum(-1), W @ A.T, A, B, 1.0)[3].isnan()
    assert gram_row_squares(B, A)[3].isnan()
    assert gram_norm(B, A).isnan()
