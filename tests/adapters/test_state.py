import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rankwise.adapters.state import STATE_FILE, FactorPair, FoldState
from rankwise.errors import ArtifactError

names = st.text("abcAB01._", min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and not name.endswith(".")
)


def pair(rank=2):
    return FactorPair(torch.arange(3.0 * rank).reshape(rank, 3), torch.arange(4.0 * rank).reshape(4, rank))


def test_an_empty_state_is_false_and_survives_the_file(tmp_path):
    FoldState().save(tmp_path / STATE_FILE)
    loaded = FoldState.load(tmp_path / STATE_FILE)
    assert not loaded
    assert (loaded.gates, loaded.offsets, loaded.boosters) == ({}, {}, {})


def test_names_in_the_file_are_those_of_the_specification(tmp_path):
    state = FoldState(gates={"l.q": torch.ones(2)}, offsets={"l.q": pair()}, boosters={"l.k": pair(5)})
    state.save(tmp_path / STATE_FILE, method={"moments": torch.zeros(1)})
    assert set(load_file(tmp_path / STATE_FILE)) == {
        "gate.l.q",
        "offset.l.q.A",
        "offset.l.q.B",
        "booster.l.k.A",
        "booster.l.k.B",
        "method.moments",
    }
    assert state


@settings(max_examples=30, deadline=None)
@given(st.lists(names, unique=True, max_size=3), st.lists(names, unique=True, max_size=3))
def test_every_state_comes_back_bit_for_bit(tmp_path_factory, gated, paired):
    path = tmp_path_factory.mktemp("state") / STATE_FILE
    state = FoldState(
        gates={name: torch.randn(3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(gated)},
        offsets={name: pair() for name in paired},
        boosters={name: pair(1) for name in gated},
    )
    state.save(path, method={"anything": torch.ones(1)})
    loaded = FoldState.load(path)
    assert loaded.tensors().keys() == state.tensors().keys()
    assert all(torch.equal(loaded.tensors()[key], tensor) for key, tensor in state.tensors().items())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate.q": torch.ones(2, 2)}, r"'gate\.q' \(2, 2\) has no place in a state file"),
        ({"mask.q": torch.ones(2)}, "has no place"),
        ({"offset.A": torch.ones(2, 2)}, "has no place"),
        ({"offset.q.A": torch.ones(2, 2)}, r"offset\.q\.B is missing"),
        ({"booster.q.B": torch.ones(2, 2)}, r"booster\.q\.A is missing"),
        ({"offset.q.A": torch.ones(2, 3), "offset.q.B": torch.ones(3, 4)}, "are no pair"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(tensors, message, tmp_path):
    save_file(tensors, tmp_path / STATE_FILE)
    with pytest.raises(ArtifactError, match=message):
        FoldState.load(tmp_path / STATE_FILE)


def test_a_missing_state_file_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"rankwise_state\.safetensors is missing"):
        FoldState.load(tmp_path / STATE_FILE)
