import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.report.grid import OUTSIDE, Position, arrange, headings, split_name

part = st.text(alphabet="abqv_<&\"'é", min_size=1, max_size=6)
number = st.integers(0, 120).map(str)
dotted = st.lists(st.one_of(part, number), min_size=1, max_size=7).map(".".join)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.3.self_attn.q_proj", Position("model.layers", 3, "self_attn.q_proj")),
        ("encoder.layer.2.attention.output.dense", Position("encoder.layer", 2, "attention.output.dense")),
        ("decoder.block.10.layer.1.EncDecAttention.q", Position("decoder.block", 10, "layer.1.EncDecAttention.q")),
        ("transformer.h.0.attn.c_attn", Position("transformer.h", 0, "attn.c_attn")),
        ("lm_head", Position(OUTSIDE, None, "lm_head")),
        ("net.0", Position("net", 0, "")),
        ("layers.².q", Position(OUTSIDE, None, "layers.².q")),
    ],
)
def test_the_first_number_of_a_name_is_the_block(name: str, position: Position) -> None:
    assert split_name(name) == position


def test_llama_columns_are_the_projections() -> None:
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    names = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in kinds]
    (panel,) = arrange(names)
    assert panel.rows == (0, 1)
    assert panel.kinds == ("q_proj", "v_proj", "up_proj")
    assert panel.cells[1, "v_proj"] == "model.layers.1.self_attn.v_proj"


def test_an_ambiguous_ending_keeps_what_tells_it_apart() -> None:
    kinds = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    (panel,) = arrange(f"encoder.layer.2.{kind}" for kind in kinds)
    assert panel.kinds == ("query", "attention.output.dense", "intermediate.dense", "output.dense")
    assert panel.cells[2, "attention.output.dense"] == "encoder.layer.2.attention.output.dense"
    assert panel.cells[2, "output.dense"] == "encoder.layer.2.output.dense"


def test_encoder_and_decoder_are_two_panels_and_a_head_comes_last() -> None:
    panels = arrange(
        [
            "lm_head",
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.q",
        ]
    )
    assert [panel.stack for panel in panels] == ["encoder.block", "decoder.block", OUTSIDE]
    assert panels[0].kinds == ("q",)
    assert panels[1].kinds == ("SelfAttention.q", "EncDecAttention.q")
    assert panels[2].rows == (None,)


def test_the_only_stack_needs_no_heading_but_two_and_outsiders_do() -> None:
    assert headings(arrange(["h.0.q", "h.1.q"])) == ("",)
    assert headings(arrange(["h.0.q", "pooler.dense"])) == ("", OUTSIDE)
    assert headings(arrange(["encoder.0.q", "decoder.0.q", "head"])) == ("encoder", "decoder", OUTSIDE)


def test_outside_the_blocks_whole_names_are_kept() -> None:
    assert arrange(["pooler.dense", "h.0.q"])[1].kinds == ("pooler.dense",)


def test_rows_are_sorted_and_gaps_stay_absent() -> None:
    (panel,) = arrange(["h.10.q", "h.2.q", "h.2.v"])
    assert panel.rows == (2, 10)
    assert (10, "v") not in panel.cells


@given(st.lists(dotted, min_size=1, max_size=20, unique=True))
def test_every_layer_has_exactly_one_cell(names: list[str]) -> None:
    panels = arrange(names)
    placed = [name for panel in panels for name in panel.cells.values()]
    assert sorted(placed) == sorted(names)
    for panel in panels:
        assert len(set(panel.kinds)) == len(panel.kinds)
        assert {row for row, _ in panel.cells} == set(panel.rows)
        assert {kind for _, kind in panel.cells} == set(panel.kinds)
