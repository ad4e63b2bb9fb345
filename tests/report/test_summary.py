from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape
from rankwise.report.grid import arrange
from rankwise.report.summary import Share, kind_shares, places, rank_sentence


def plan_of(ranks: dict[str, int]) -> RankPlan:
    return RankPlan.from_shapes([LayerShape(name, 8, 16) for name in ranks], list(ranks.values()), r=8, lora_alpha=8)


def test_shares_are_counted_by_kind_and_sum_to_the_plan() -> None:
    plan = plan_of({"h.0.q": 2, "h.0.v": 6, "h.1.q": 4, "pooler.dense": 1})
    assert kind_shares(plan, plan.ranks) == [
        Share("q", 2, 2, 3.0, 4, 144),
        Share("v", 1, 6, 6.0, 6, 144),
        Share("pooler.dense", 1, 1, 1.0, 1, 24),
    ]
    assert sum(share.parameters for share in kind_shares(plan, plan.ranks)) == plan.parameters


def test_kinds_of_two_stacks_are_told_apart() -> None:
    plan = plan_of({"encoder.0.q": 1, "decoder.0.q": 2})
    assert [share.kind for share in kind_shares(plan, plan.ranks)] == ["encoder · q", "decoder · q"]


def test_final_ranks_may_differ_from_the_plan() -> None:
    plan = plan_of({"h.0.q": 2, "h.1.q": 4})
    assert kind_shares(plan, {"h.0.q": 0, "h.1.q": 5}) == [Share("q", 2, 0, 2.5, 5, 120)]


def test_the_sentence_names_both_ends() -> None:
    plan = plan_of({"h.0.q": 2, "h.0.v": 7})
    assert rank_sentence(plan, plan.ranks) == (
        "2 adapted layers with ranks from 2 to 7, 4.5 on average. Most: h.0.v (7). Least: h.0.q (2)."
    )
    assert rank_sentence(plan_of({"h.0.q": 3}), {"h.0.q": 3}) == "1 adapted layer, all of rank 3."


def test_a_place_says_kind_and_block() -> None:
    assert places(arrange(["h.3.attn.q", "head"])) == {"h.3.attn.q": "q, block 3", "head": "head"}
    assert places(arrange(["encoder.0.q", "decoder.1.q"])) == {
        "encoder.0.q": "q, encoder 0",
        "decoder.1.q": "q, decoder 1",
    }
