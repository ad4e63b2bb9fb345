"""Plans: consistent when made, exact in a file, and clear about every fault of a hand edit."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import PlanError
from rankwise.ranks.plan import LayerPlan, ModelIdentity, RankPlan
from rankwise.ranks.shapes import LayerShape, ScalingRule

SHAPES = [
    LayerShape("encoder.0.query", 16, 16),
    LayerShape("encoder.0.value", 16, 16),
    LayerShape("encoder.1.up", 32, 16),
]


def make(ranks=(2, 0, 3), **changes):
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "scaling_rule": ScalingRule.ALPHA_OVER_SQRT_RANK,
        "methods": ("gora",),
        "seed": 7,
        "model": ModelIdentity(name="tiny", fingerprint="abc"),
        "importance": (0.5, 0.0, 1.5),
        "reasons": ("share 1.9", "floor", "share 3.2"),
        "notes": ("one note",),
    }
    return RankPlan.from_shapes(SHAPES, ranks, **(settings | changes))


def edited(plan, change):
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def faults_of(text):
    with pytest.raises(PlanError) as caught:
        RankPlan.from_json(text, source="plan.json")
    return caught.value.faults


@st.composite
def plans(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6))
    layers = tuple(
        LayerPlan(
            name=f"{draw(st.text(min_size=1, max_size=8))}.{i}",
            out_features=out,
            in_features=inner,
            rank=draw(st.integers(0, min(out, inner))),
            importance=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
            reason=draw(st.text(max_size=12)),
        )
        for i, (out, inner) in enumerate(sizes)
    )
    return RankPlan(
        layers=layers,
        r=draw(st.integers(1, 64)),
        lora_alpha=draw(st.floats(1e-3, 1e3)),
        scaling_rule=draw(st.sampled_from(ScalingRule)),
        methods=("gora", "rora"),
        budget=sum(layer.parameters for layer in layers) + draw(st.integers(0, 99)),
        seed=draw(st.integers(-5, 2**40)),
    )


@given(plans())
def test_a_plan_survives_its_json_exactly(plan):
    again = RankPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.hash() == plan.hash()


def test_a_plan_survives_its_file(tmp_path):
    make().save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == make()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_json_holds_what_the_contract_says():
    data = json.loads(make().to_json())
    keys = [
        "format",
        "version",
        "model",
        "methods",
        "r",
        "lora_alpha",
        "scaling_rule",
        "budget",
        "seed",
        "notes",
        "layers",
    ]
    assert list(data) == keys
    assert data["model"] == {"name": "tiny", "fingerprint": "abc"}
    assert data["layers"][0] == {
        "name": "encoder.0.query",
        "out_features": 16,
        "in_features": 16,
        "rank": 2,
        "importance": 0.5,
        "reason": "share 1.9",
    }


def test_parameters_ranks_and_budget_count_what_is_live():
    plan = make()
    assert plan.ranks == {"encoder.0.query": 2, "encoder.0.value": 0, "encoder.1.up": 3}
    assert plan.parameters == 2 * 32 + 0 + 3 * 48
    assert plan.budget == 4 * (32 + 32 + 48)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("alpha/rank", 16 / 2), ("alpha/sqrt(rank)", 16 / 2**0.5), ("alpha/r", 16 / 4), ("alpha/sqrt(r)", 16 / 2)],
)
def test_scaling_follows_the_rule_and_the_rank(rule, expected):
    plan = make(scaling_rule=ScalingRule(rule))
    assert plan.scaling("encoder.0.query") == pytest.approx(expected, rel=1e-15)
    assert plan.scaling("encoder.0.value") == 0.0


def test_a_rank_edited_by_hand_changes_its_scaling_too():
    text = make().to_json().replace('"rank": 2', '"rank": 4')
    assert RankPlan.from_json(text).scaling("encoder.0.query") == 16 / 4**0.5


def test_a_plan_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        make().r = 5


def test_with_ranks_changes_only_the_named_layers():
    plan = make().with_ranks({"encoder.0.value": 1})
    assert plan.ranks == {"encoder.0.query": 2, "encoder.0.value": 1, "encoder.1.up": 3}
    assert plan["encoder.0.value"].reason == "set by hand"
    assert plan["encoder.0.query"] == make()["encoder.0.query"]


def test_with_ranks_refuses_unknown_layers_and_ranks_above_the_size():
    with pytest.raises(PlanError, match=r"no layer 'encoder.0.quary'; did you mean 'encoder.0.query'"):
        make().with_ranks({"encoder.0.quary": 1})
    with pytest.raises(PlanError, match=r"'encoder.0.query': rank 17 is outside 0 to 16"):
        make(budget=10**6).with_ranks({"encoder.0.query": 17})


def test_asking_for_an_unknown_layer_names_the_nearest():
    with pytest.raises(PlanError, match=r"did you mean 'encoder\.1\.up'"):
        make().scaling("encoder.1.ups")


def test_hash_sees_ranks_and_settings_but_not_remarks():
    plan = make()
    assert plan.hash() == replace(plan, notes=(), budget=plan.budget + 1).hash()
    changed = [
        plan.with_ranks({"encoder.0.query": 3}),
        make(seed=8),
        make(lora_alpha=17),
        make(scaling_rule=ScalingRule.ALPHA_OVER_RANK),
    ]
    assert len({plan.hash(), *(other.hash() for other in changed)}) == 5


def test_every_fault_of_a_hand_edit_comes_at_once():
    def change(data):
        data["lora_alphas"] = data.pop("lora_alpha")
        data["scaling_rule"] = "alpha/2"
        data["r"] = True
        data["notes"] = "one"
        data["model"] = "tiny"
        data["layers"][0]["rank"] = 2.5
        data["layers"][1]["rank"] = 99
        data["layers"][2]["importence"] = 1
        data["layers"].append(dict(data["layers"][1]))

    faults = faults_of(edited(make(), change))
    wanted = [
        "unknown key 'lora_alphas'; did you mean 'lora_alpha'?",
        "the key 'lora_alpha' is missing",
        '"scaling_rule" must be one of "alpha/rank", ',
        '"r" must be a whole number >= 1, not true',
        '"notes" must be a list of texts, not "one"',
        '"model" must be an object with "name" and "fingerprint", not "tiny"',
        'layers[0] (encoder.0.query): "rank" must be a whole number >= 0 (0: no adapter), not 2.5',
        "layers[2] (encoder.1.up): unknown key 'importence'; did you mean 'importance'?",
        "layer 'encoder.0.value': rank 99 is outside 0 to 16, the size of a [16, 16] layer",
        "layer 'encoder.0.value' appears 2 times",
    ]
    for text in wanted:
        assert any(text in fault for fault in faults), text
    assert all(fault.startswith("plan.json: ") for fault in faults)


def test_a_budget_exceeded_by_hand_says_by_how_much():
    text = make(ranks=(4, 4, 4)).to_json().replace('"rank": 4', '"rank": 5', 1)
    (fault,) = faults_of(text)
    assert 'cost 480 parameters, 32 above "budget": 448' in fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"),
        ("{", "cut off"),
        ('{"format": "rankwise-plan", "version": 1, "r" 3}', "not JSON"),
        ("[1]", "not a rankwise plan"),
        ('{"format": "other"}', "not a rankwise plan"),
        ('{"format": "rankwise-plan", "version": 2}', "plan version 2 cannot be read"),
        ('{"format": "rankwise-plan", "version": true}', "plan version True cannot be read"),
        ('{"format": "rankwise-plan", "version": 1, "r": 3, "r": 4}', "'r' is said twice"),
        ('{"format": "rankwise-plan", "version": 1, "r": NaN}', "NaN is not a number"),
        ('{"format": "rankwise-plan", "version": 1, "layers": 3}', '"layers" must be a list'),
        ('{"format": "rankwise-plan", "version": 1, "layers": [3]}', "layers[0] must be an object"),
    ],
)
def test_damaged_or_foreign_files_are_refused(text, message):
    assert any(message in fault for fault in faults_of(text))


@given(st.integers(0, 10**6))
def test_a_plan_cut_off_anywhere_is_refused_and_never_half_read(cut):
    text = make().to_json().rstrip()
    faults = faults_of(text[: cut % len(text)])
    assert "cut off" in faults[0] or "is not JSON" in faults[0]


def test_the_position_of_a_syntax_error_is_named():
    lines = make().to_json().splitlines()
    lines[5] = lines[5].replace(":", "")
    (fault,) = faults_of("\n".join(lines))
    assert fault.startswith("plan.json:6:")


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"cannot be read \(No such file"):
        RankPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not UTF-8"):
        RankPlan.load(tmp_path / "plan.json")


def test_validate_for_passes_on_the_same_layers_in_any_order():
    make().validate_for(SHAPES[::-1])


def test_validate_for_names_every_difference():
    shapes = [SHAPES[0], LayerShape("encoder.1.up", 64, 16), LayerShape("encoder.2.up", 32, 16)]
    with pytest.raises(PlanError) as caught:
        make().validate_for(shapes)
    assert len(caught.value.faults) == 3
    text = str(caught.value)
    assert "'encoder.0.value' of the plan is not among the model's target layers" in text
    assert "'encoder.1.up' is [32, 16] in the plan and [64, 16] in the model" in text
    assert "target layer 'encoder.2.up' is missing from the plan" in text


def test_a_plan_for_another_model_is_one_fault():
    with pytest.raises(PlanError, match=r"made for another model \(tiny\)") as caught:
        make().validate_for([LayerShape(f"h.{i}", 4, 4) for i in range(90)])
    assert len(caught.value.faults) == 1


def test_very_many_faults_are_cut_short():
    shapes = [LayerShape(f"encoder.{i}", 4, 4) for i in range(90)]
    plan = RankPlan.from_shapes(shapes, [1] * 90, r=1, lora_alpha=2)
    with pytest.raises(PlanError, match="and 70 more") as caught:
        plan.validate_for([LayerShape(x.name, 5, 5) for x in shapes[:-1]])
    assert len(caught.value.faults) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (-1, 0, 0)}, "rank -1 is outside"),
        ({"ranks": (17, 0, 0)}, "rank 17 is outside 0 to 16"),
        ({"budget": 10}, '198 above "budget": 10'),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
)
def test_an_inconsistent_plan_cannot_be_made(changes, message):
    with pytest.raises(PlanError, match=message):
        make(**changes)


def test_printed_it_shows_every_layer_and_the_budget():
    lines = str(make()).splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "rank", "scaling", "parameters", "importance", "reason"]
    assert lines[1].split() == ["encoder.0.query", "16", "x", "16", "2", "11.31", "64", "0.5", "share", "1.9"]
    assert "208 of 448 parameters (46.4%)" in lines[4]
    assert lines[5] == "note: one note"


def test_a_plan_that_cannot_be_written_is_an_error_of_the_plan(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "absent" / "plan.json", tmp_path / "folder.json"):
        with pytest.raises(PlanError, match=r"\.json: the plan cannot be written \(.+\): check the path"):
            make().save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]
