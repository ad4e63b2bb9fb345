import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankwise.linalg.normal import NormalStream

CPU = torch.device("cpu")


def drawn(seed: int, *sizes: int) -> torch.Tensor:
    stream = NormalStream(seed, CPU)
    parts = [torch.empty(size) for size in sizes]
    for part in parts:
        stream.fill(part)
    return torch.cat(parts)


def test_a_word_of_two_halves_is_one_pair_by_box_and_muller(monkeypatch: pytest.MonkeyPatch) -> None:
    # u = (k + 0.5) / 2^32 with k = 2^31 is 1/2, and v = 2^30 / 2^32 is a quarter turn: R = sqrt(2 ln 2), (0, R).
    word = np.array([2**31], dtype=np.uint32), np.array([2**30], dtype=np.int32)
    stream = NormalStream(0, CPU)

    class Words:
        def random_raw(self, count: int) -> object:
            assert count == 1
            return np.concatenate([word[0].view(np.int32), word[1]]).view(np.uint64)

    monkeypatch.setattr(stream, "_words", Words())
    out = torch.empty(2)
    stream.fill(out)
    torch.testing.assert_close(out, torch.tensor([0.0, math.sqrt(2 * math.log(2))]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_the_extreme_words_are_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = NormalStream(0, CPU)

    class Words:
        def random_raw(self, count: int) -> object:
            return np.full(count, word, dtype=np.uint64)

    monkeypatch.setattr(stream, "_words", Words())
    out = torch.empty(7)
    stream.fill(out)
    assert out.isfinite().all()
    assert out.abs().max() < 6.8


def test_the_values_are_standard_normal() -> None:
    found = drawn(3, 400_000).double()
    assert stats.kstest(found.numpy(), "norm").pvalue > 1e-3
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(stats.norm.moment(2 * power) - moment**2) / math.sqrt(len(found))
        assert abs(float((found**power).mean()) - moment) < 4 * spread
    halves = found.view(2, -1)  # R cos and R sin of the same pairs
    assert abs(float((halves[0] * halves[1]).mean())) < 4 / math.sqrt(len(found) / 2)
    assert abs(float((halves[0].square() * halves[1].square()).mean()) - 1) < 4 * 3 / math.sqrt(len(found) / 2)


def test_different_seeds_and_neighbouring_calls_are_uncorrelated() -> None:
    first, second = drawn(0, 50_000).double(), drawn(1, 50_000).double()
    whole = drawn(2, 50_000, 50_000).double().view(2, -1)
    for a, b in ((first, second), (whole[0], whole[1])):
        assert abs(float((a * b).mean())) < 4 / math.sqrt(50_000)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 70), min_size=1, max_size=4))
def test_the_same_seed_and_sizes_give_the_same_bits_and_no_global_state_moves(seed: int, sizes: list[int]) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(drawn(seed, *sizes), drawn(seed, *sizes))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_every_value_is_written_whatever_the_size() -> None:
    for size in (0, 1, 2, 3, 17, 4096, 65537):
        out = torch.full((size,), float("nan"))
        NormalStream(size, CPU).fill(out)
        assert out.isfinite().all()
        assert len(set(out.tolist())) == size or size > 1000


def test_a_matrix_is_filled_in_place() -> None:
    whole = torch.zeros(6, 5)
    NormalStream(1, CPU).fill(whole[2:4])
    assert not whole[:2].any()
    assert not whole[4:].any()
    assert torch.equal(whole[2:4].flatten(), drawn(1, 10))


def test_another_device_uses_a_generator_of_its_own() -> None:
    # There is no accelerator here: the branch is taken by a stream that was told so, on a CPU generator.
    stream = NormalStream(5, CPU)
    stream._words, stream._device = None, torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    out = torch.empty(1000)
    stream.fill(out)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, torch.empty(1000).normal_(generator=torch.Generator().manual_seed(5)))
