"""The randomized SVD against the exact one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.linalg.random import derived_seed, generator
from rankwise.linalg.spectrum import fixed_signs, truncated_svd


def draw(seed, *shape):
    return torch.randn(*shape, generator=generator(seed, "test", *shape), dtype=torch.float64)


def with_spectrum(seed, rows, columns, values):
    U = torch.linalg.qr(draw(seed, rows, len(values))).Q
    V = torch.linalg.qr(draw(seed + 1, columns, len(values))).Q
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_small_matrices_are_decomposed_exactly(m, n, k, seed):
    matrix, rank = draw(seed, m, n), min(k, m, n)
    U, S, Vh = truncated_svd(matrix, rank, generator=generator(seed, "svd"))
    exact = torch.linalg.svdvals(matrix)
    assert torch.allclose(S, exact[:rank])
    assert float((matrix - U * S @ Vh).norm()) == pytest.approx(float(exact[rank:].norm()), abs=1e-10)


def test_a_decaying_spectrum_is_found_by_the_randomized_path():
    values = [2.0**-i for i in range(60)]
    matrix = with_spectrum(1, 200, 150, values)
    U, S, Vh = truncated_svd(matrix, 10, generator=generator(0, "svd"))
    assert torch.allclose(S, torch.tensor(values[:10], dtype=torch.float64), rtol=1e-9)
    best = sum(v * v for v in values[10:]) ** 0.5
    assert float((matrix - U * S @ Vh).norm()) == pytest.approx(best, rel=1e-6)
    assert torch.allclose(U.T @ U, torch.eye(10, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(Vh @ Vh.T, torch.eye(10, dtype=torch.float64), atol=1e-12)


def test_a_flat_spectrum_is_within_the_usual_bound():
    matrix = draw(2, 300, 200).float()
    _, S, _ = truncated_svd(matrix, 8, generator=generator(0, "svd"), power_iterations=8)
    exact = torch.linalg.svdvals(matrix)[:8]
    assert bool((exact * 1.0001 >= S).all())
    assert bool((0.9 * exact <= S).all())


def test_the_same_seed_gives_the_same_bits_and_the_global_state_is_left_alone():
    matrix = draw(3, 120, 130).float()
    before = torch.random.get_rng_state()
    first, second = (truncated_svd(matrix, 4, generator=generator(7, "svd")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_signs_do_not_depend_on_the_random_start():
    matrix = with_spectrum(4, 100, 90, [3.0**-i for i in range(20)])
    first = truncated_svd(matrix, 3, generator=generator(1, "svd"))
    second = truncated_svd(matrix, 3, generator=generator(2, "svd"))
    exact = torch.linalg.svd(matrix, full_matrices=False)
    U, Vh = fixed_signs(exact.U[:, :3], exact.Vh[:3])
    for a, b, c in zip(first, second, (U, exact.S[:3], Vh), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
        assert torch.allclose(a, c, atol=1e-9)


def test_fixed_signs_worked_by_hand():
    U, Vh = fixed_signs(torch.tensor([[1.0, 0.5], [-2.0, 0.25]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(U, torch.tensor([[-1.0, 0.5], [2.0, 0.25]]))
    assert torch.equal(Vh, torch.tensor([[-1.0, -2.0], [3.0, 4.0]]))


def test_leading_dimensions_are_a_batch():
    matrix = torch.stack([with_spectrum(i, 80, 90, [2.0**-j for j in range(30)]) for i in range(2)])
    U, S, Vh = truncated_svd(matrix, 3, generator=generator(0, "svd"))
    assert torch.allclose(S[1], torch.linalg.svdvals(matrix[1])[:3], rtol=1e-7)
    assert (U.shape, Vh.shape) == ((2, 80, 3), (2, 3, 90))


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_outside_the_matrix_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}: a 5 x 9 matrix has 1 to 5"):
        truncated_svd(torch.ones(5, 9), rank, generator=generator(0, "svd"))


def test_derived_seeds_are_stable_and_told_apart_by_every_argument():
    assert derived_seed(0, "lora_A", "layer.0") == derived_seed(0, "lora_A", "layer.0") == 4111013471693485039
    others = [derived_seed(1, "lora_A", "layer.0"), derived_seed(0, "lora_B", "layer.0"), derived_seed(0, "lora_A")]
    assert len({derived_seed(0, "lora_A", "layer.0"), *others}) == 4
    assert 0 <= others[0] < 2**63
