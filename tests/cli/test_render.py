import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType
from tests.report import events, sample

from rankwise.cli import render
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape
from rankwise.report.files import Manifest, RankChange, Run, gathered

BERT = sample.uneven_plan(sample.bert_shapes())
LLAMA = sample.uneven_plan(sample.llama_shapes(), model="Llama-3.1-8B")
METHODS = [
    {"id": "gora", "title": "GoRA", "source": "arXiv", "slots": ["allocate", "initialize"], "state": "works"},
    {
        "id": "lora-rite",
        "title": "LoRA-RITE",
        "source": "arXiv",
        "slots": ["optimize"],
        "state": "works",
        "learning_rate": {"low": 5e-5, "default": 2e-4, "high": 5e-4},
        "optimizer": "lora-rite",
    },
    {"id": "sora", "title": "SoRA", "source": "arXiv", "state": "works"},
]
METHOD = METHODS[0] | {
    "learning_rate": {"low": 2e-5, "default": 1e-4, "high": 5e-4},
    "settings": [
        {"name": "gamma", "type": "float", "default": 0.05},
        {"name": "r_max", "type": "int | None", "default": None},
    ],
    "presets": {"paper": {"gamma": 0.05}},
}
DEMO = {
    "folder": "runs/demo",
    "report": "runs/demo/report.html",
    "accuracy": 0.7345,
    "majority_share": 0.1305,
    "rows": [
        ["GoRA, r 8", 0.7345, 331000, 92.1],
        {"name": "head only", "accuracy": 0.61, "parameters": None, "seconds": 20.0},
    ],
}
COST = {
    "trained_parameters": 2_000,
    "model_bytes": 10**9,
    "gradient_bytes": 8_000,
    "optimizer_bytes": 16_000,
    "activation_bytes": 5 * 10**8,
    "schedule_bytes": 0,
    "base_copy_bytes": 0,
    "steps": 100,
    "micro_batches": 2,
    "micro_batch_seconds": 0.6,
    "optimizer_seconds": 0.1,
    "event_seconds": 12.0,
    "plain_micro_batch_seconds": 0.4,
    "plain_optimizer_seconds": 0.02,
    "memory_bytes": 1_500_024_000,
    "seconds": 130.0,
    "overhead": 1.585,
}


def run_of(plan: RankPlan | None, lines: list[events.Line], status: str = "finished") -> Run:
    manifest = Manifest.model_validate({"format": "rankwise-run", "version": 1, "status": status})
    changes = gathered(RankChange.model_validate(line) for line in lines)
    return Run(manifest=manifest, plan=plan, metrics=(), events=changes, health=None)


VIEWS = {
    "course": render.course_view(run_of(BERT, events.ab_lora(BERT))),
    "course without events": render.course_view(run_of(LLAMA, [])),
    "cost": render.cost_view(COST),
    "plan": render.plan_view(BERT),
    "large plan": render.plan_view(LLAMA),
    "summary": render.plan_summary(BERT),
    "health": render.health_view(sample.health("failed")),
    "audit": render.audit_view(sample.audit(alike=True)),
    "export": render.export_view(sample.manifest(BERT)["export"]),  # type: ignore[arg-type]
    "demo": render.demo_view(DEMO),
    "result": render.result_view(Path("runs/demo"), {"test_accuracy": 0.7345}, Path("runs/demo/report.html")),
    "methods": render.methods_view(METHODS),
    "method": render.method_view(METHOD),
}


def printed(
    view: RenderableType, width: int = 80, *, terminal: bool = False, encoding: str = "utf-8", **options: bool
) -> str:
    """What a console of this width shows."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    system = "truecolor" if terminal else None
    console = Console(
        file=stream, width=width, force_terminal=terminal, color_system=system, highlight=False, **options
    )
    console.print(view)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def heat_lines(text: str) -> dict[str, list[str]]:
    """The figures of each line of a heat map, by kind."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split()) and len(words) > 2}


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("name", VIEWS)
def test_no_line_is_wider_than_the_console(name: str, width: int) -> None:
    assert max(cell_len(line) for line in printed(VIEWS[name], width).splitlines()) <= width


@pytest.mark.parametrize("name", VIEWS)
def test_without_a_terminal_there_is_no_escape_sequence(name: str) -> None:
    assert "\x1b" not in printed(VIEWS[name])


@pytest.mark.parametrize("name", VIEWS)
def test_color_adds_nothing_but_color(name: str) -> None:
    colored = re.sub(r"\x1b\[[0-9;]*m", "", printed(VIEWS[name], terminal=True))
    assert colored == printed(VIEWS[name])


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(VIEWS["plan"], terminal=True)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|38|48)[;m]", text)


def test_a_heat_map_shows_every_rank_in_its_place() -> None:
    lines = heat_lines(printed(render.plan_summary(BERT)))
    for kind, ending in (("query", "attention.self.query"), ("output.dense", "output.dense")):
        ranks = [str(BERT[f"encoder.layer.{i}.{ending}"].rank) for i in range(6)]
        assert lines[kind][:6] == ranks
    assert lines["block"] == ["0", "1", "2", "3", "4", "5", "mean"]
    assert lines["value"][6] == f"{sum(BERT[f'encoder.layer.{i}.attention.self.value'].rank for i in range(6)) / 6:.1f}"


def test_a_heat_map_averages_blocks_where_the_width_is_short() -> None:
    wide, narrow = printed(render.plan_summary(LLAMA), 140), printed(render.plan_summary(LLAMA), 80)
    assert "each cell is the mean" not in wide
    assert len(heat_lines(wide)["v_proj"]) == 32 + 1
    assert "each cell is the mean of up to 2 blocks" in narrow
    means = [
        (LLAMA[f"model.layers.{i}.self_attn.v_proj"].rank + LLAMA[f"model.layers.{i + 1}.self_attn.v_proj"].rank) / 2
        for i in range(0, 32, 2)
    ]
    assert heat_lines(narrow)["v_proj"][:16] == [str(round(mean)) for mean in means]


def test_stacks_and_layers_outside_them_have_their_own_panels() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q", "lm_head"]
    plan = RankPlan.from_shapes([LayerShape(name, 16, 16) for name in names], [4, 0, 2], r=8, lora_alpha=8)
    text = printed(render.plan_summary(plan))
    assert [line for line in text.splitlines() if line in ("encoder.block", "decoder.block", "outside the blocks")] == [
        "encoder.block",
        "decoder.block",
        "outside the blocks",
    ]


def test_the_budget_line_says_used_and_allowed() -> None:
    text = printed(render.plan_summary(BERT))
    assert f"{BERT.parameters / BERT.budget:.1%}  {BERT.parameters:,} of {BERT.budget:,} parameters" in text
    assert "(r 8, scaling alpha/sqrt(rank), alpha 16)" in text


def test_a_console_without_unicode_draws_the_bar_in_ascii() -> None:
    plan = RankPlan.from_shapes([LayerShape("h.0.q", 8, 8)], [4], r=8, lora_alpha=8)
    assert "budget ########--------  50.0%" in printed(render.plan_summary(plan), 80, encoding="ascii").replace(
        "- 50", "-  50"
    )


def test_a_large_plan_has_one_line_a_kind() -> None:
    text = printed(render.plan_view(LLAMA))
    assert "model.layers.7.self_attn.q_proj" not in text
    assert re.search(r"v_proj +32 +5-19 +11\.6 +1,904,640 +9\.1%", text)
    assert "224 layers by kind" in text


@pytest.mark.parametrize("width", [80, 140])
def test_a_small_plan_lists_each_layer_with_its_whole_name(width: int) -> None:
    text = printed(render.plan_view(BERT), width)
    assert all(layer.name in text for layer in BERT.layers)
    assert ("384 x 1536" in text) == (width == 140)
    assert "reason of every rank: share of the budget by importance" in text


def test_reasons_that_differ_get_a_column() -> None:
    shapes = [LayerShape("h.0.q", 8, 8), LayerShape("h.0.v", 8, 8)]
    plan = RankPlan.from_shapes(shapes, [4, 4], r=8, lora_alpha=8, reasons=["at its floor", "by importance"])
    assert "at its floor" in printed(render.plan_view(plan), 140)


def test_names_and_messages_are_not_read_as_markup() -> None:
    evil = "[bold red]x[/] [link=y]"
    plan = RankPlan.from_shapes([LayerShape(f"h.0.{evil}", 8, 8)], [4], r=8, lora_alpha=8, reasons=[evil], notes=[evil])
    assert printed(render.plan_view(plan), 140).count(evil) >= 4
    check = dict.fromkeys(("id", "stage", "measured", "limit", "message", "advice"), evil) | {"status": "failed"}
    assert printed(render.health_view({"status": evil, "checks": [check]}), 300).count(evil) == 7
    verdict = {"consumer": evil, "version": evil, "status": evil, "error": evil, "reason": evil}
    audit = sample.audit() | {"folder": evil, "verdicts": [verdict], "faults": [evil], "advice": evil, "command": evil}
    assert printed(render.audit_view(audit), 300).count(evil) == 9
    assert (
        printed(
            render.method_view({"id": evil, "settings": [{"name": evil, "type": evil, "default": evil}]}), 200
        ).count(evil)
        == 4
    )


def test_a_failed_check_says_what_to_do_and_a_passed_one_does_not() -> None:
    body = sample.health("failed")
    text = " ".join(printed(render.health_view(body), 140).split())
    assert "health checks: failed" in text
    assert "finite-gradients during failed 412 0 Gradients that were not finite. Lower the learning rate." in text
    passed = {
        "status": "passed",
        "checks": [{"id": "a", "status": "passed", "message": "fine", "advice": "never shown"}],
    }
    assert "never shown" not in printed(render.health_view(passed))


def test_an_audit_names_who_is_wrong_and_the_command_that_mends_it() -> None:
    text = printed(render.audit_view(sample.audit()), 80)
    assert text.startswith("not served alike")
    assert re.search(r"llama\.cpp +2026-10 +running +wrong +0\.75", text)
    assert re.search(r"ollama +2026-10 +source +wrong +inf", text)
    assert "\n  rankwise export runs/demo/checkpoint-250 -o runs/demo/checkpoint-250-uniform\n" in text
    assert "fault: base_model.model.encoder.layer.0.output.dense.lora_A.weight holds NaN" in text


def test_a_command_can_be_copied_however_narrow_the_console() -> None:
    audit = sample.audit()
    for width in (55, 80):
        lines = printed(render.audit_view(audit), width).splitlines()
        start = next(place for place, line in enumerate(lines) if line.startswith("  rankwise"))
        copied = "\n".join(line.rstrip() for line in lines[start:]).replace("\\\n", "")
        assert shlex.split(copied) == shlex.split(str(audit["command"]))
        assert len(lines) - start == (2 if width == 55 else 1)


def test_an_export_shows_the_proof() -> None:
    text = " ".join(printed(VIEWS["export"], 140).split())
    assert "update error 1.2e-07 update bound 1e-05" in text
    assert "logit error 3.4e-07" in text
    assert "vllm max lora rank 16" in text


def test_merged_weights_have_no_verdicts() -> None:
    report = {
        "folder": "out",
        "layout": "merged",
        "verification": None,
        "verdicts": [],
        "ranks": [8, 8.0, 8],
        "notes": ["bit equal"],
    }
    text = printed(render.export_view(report | {"notes": ["bit equal"]}))
    assert "consumer" not in text
    assert "ranks   8\n" in re.sub(r" +\n", "\n", text)
    assert "note: bit equal" in text


def test_the_demo_compares_under_one_budget() -> None:
    text = printed(render.demo_view(DEMO))
    assert re.search(r"accuracy +73\.45%", text)
    assert re.search(r"GoRA, r 8 +73\.45% +331,000 +1 min 32 s", text)
    assert re.search(r"head only +61\.00% +– +20 s", text)


def test_the_list_of_methods_shows_their_rates_and_the_optimizer_that_they_are_for() -> None:
    listed = " ".join(printed(render.methods_view([METHOD, METHODS[1], METHODS[2]]), 200).split())
    assert "2e-5, 1e-4, 5e-4 (AdamW)" in listed
    assert "5e-5, 2e-4, 5e-4 (lora-rite)" in listed
    assert "sora works SoRA" in listed


def test_the_cost_says_how_a_step_compares_with_plain_lora_where_it_differs() -> None:
    told = " ".join(printed(render.cost_view(COST), 200).split())
    assert (
        "Against plain LoRA 1.58 x a step under AdamW (micro-batch 0.6 s against 0.4 s, optimizer 0.1 s against 0.02 s)"
        in told
    )
    assert "Against" not in printed(render.cost_view({**COST, "overhead": 1.0}), 200)
    assert "schedule 0" not in told
    assert "Between steps 12 s of it for the rounds of the schedule" in told
    more = " ".join(printed(render.cost_view({**COST, "schedule_bytes": 140, "base_copy_bytes": 9_000}), 200).split())
    assert "activation 500 MB, schedule 140 B, copy of the base on the CPU 9 kB)" in more


def test_a_method_without_settings_says_so() -> None:
    assert "It has no settings of its own." in printed(
        render.method_view({"id": "rora", "settings": [], "presets": {}})
    )


def test_a_result_says_where_everything_is() -> None:
    text = printed(render.result_view(Path("runs/x"), {"eval_loss": 0.5}, None))
    assert re.search(r"adapter +runs/x", text)
    assert re.search(r"report +not written", text)


name = st.from_regex(r"\A(a|b\.layers)\.[0-9]{1,2}\.[qv]{1,3}\Z|\A[a-c]{1,40}\Z")


@given(st.lists(name, min_size=1, max_size=40, unique=True), st.integers(20, 200))
def test_any_plan_fits_any_width(names: list[str], width: int) -> None:
    shapes = [LayerShape(each, 300, 300) for each in names]
    plan = RankPlan.from_shapes(shapes, [place % 250 for place in range(len(names))], r=250, lora_alpha=8)
    lines = printed(render.plan_view(plan), width).splitlines()
    assert max(cell_len(line) for line in lines) <= width


def test_a_plan_over_its_budget_says_so_beside_the_bar():
    over = replace(BERT, budget=BERT.parameters * 4 // 5, overspend_allowed=True)
    assert re.search(r"125\.0%.*over budget by 25\.0%", printed(render.plan_summary(over), 160))
    assert "over budget" not in printed(render.plan_summary(BERT), 160)


@pytest.mark.parametrize("width", [80, 140])
def test_a_course_says_how_many_events_there_were_and_both_ends(width: int) -> None:
    lines = events.sora(BERT, events=3)
    text = printed(render.course_view(run_of(BERT, lines, "interrupted")), width)
    live = sum(BERT.ranks.values())
    assert "3 events from step 40 to step 56: 3 prune" in " ".join(text.split())
    assert re.search(
        rf"start +so far\s+live ranks +{live} +{live - 36}\s+parameters +{BERT.parameters:,} +[\d,]+", text
    )
    assert "end" in printed(VIEWS["course"], width)


def test_a_course_without_events_or_a_plan_says_so() -> None:
    assert "No event: the ranks are those of the plan throughout." in printed(VIEWS["course without events"])
    assert "There is no plan yet." in printed(render.course_view(run_of(None, [])))
