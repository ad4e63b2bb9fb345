"""Every layout of every architecture, loaded by the software that serves it, computes what was trained."""

import re

import pytest
import torch
from peft import PeftModel

from rankwise.adapters.checkpoint import save_native
from rankwise.export.audit import check_folder
from rankwise.export.consumers import RULES, Facts
from rankwise.export.files import read_adapter
from rankwise.export.fold import fold
from rankwise.export.live import computed_logits
from rankwise.export.verify import logit_difference
from rankwise.export.write import export_adapter
from rankwise.ranks.shapes import ScalingRule
from tests.export.trained import ARCHITECTURES, trained

LAYOUTS = ("native", "uniform", "compact", "per_rank")
RANKS = (3, 0, 1, 4, 2, 5, 9, 6)


class Case:
    """One trained architecture with its exports and its logits."""

    def __init__(self, name, root):
        self.name, self.root, self.architecture = name, root, ARCHITECTURES[name]
        self.model, self.plan = trained(name, ranks=RANKS)
        self.batch = self.architecture.batch()
        self.logits = computed_logits(self.model, self.batch)
        self.folded = fold(self.model)
        save_native(self.model, root / "native")
        for layout in (*LAYOUTS[1:], "merged"):
            export_adapter(self.model, root / layout, layout=layout, plan=self.plan)

    def error(self, model):
        return logit_difference(computed_logits(model.eval(), self.batch), self.logits)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_the_adapter_moves_the_logits(case):
    assert case.error(case.architecture.build()) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_load_by_peft_computes_the_trained_logits(case, layout):
    assert case.error(PeftModel.from_pretrained(case.architecture.build(), str(case.root / layout))) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_load_by_transformers_computes_the_trained_logits(case, layout):
    model = case.architecture.build()
    model.load_adapter(str(case.root / layout))
    assert case.error(model) < 1e-5


def test_merged_weights_loaded_by_transformers_compute_the_trained_logits(case):
    base = case.architecture.build()
    merged = type(base).from_pretrained(case.root / "merged")
    assert case.error(merged) < 1e-5
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize(
    ("layout", "right", "wrong"),
    [("native", "a", "bcd"), ("uniform", "abcd", ""), ("compact", "abc", "d"), ("per_rank", "ad", "bc")],
)
def test_the_emulated_rules_find_the_trained_updates_where_they_should(case, layout, right, wrong):
    files = read_adapter(case.root / layout)
    facts = Facts.of(files.config, files.tensors)
    for rule in right + wrong:
        scalings, worst = RULES[rule](facts), 0.0
        for name, layer in case.folded.layers.items():
            pair = facts.pairs[name]
            served = scalings[name] * pair.lora_B.double() @ pair.lora_A.double()
            truth = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            worst = max(worst, float((served - truth).norm() / truth.norm()))
        assert (worst < 1e-6) if rule in right else (worst > 0.1), (rule, worst)
        assert check_folder(case.root / layout).rule_errors[rule] == pytest.approx(worst, abs=1e-6)


def test_uniform_gives_every_planned_layer_one_rank_and_native_does_not(case):
    files = read_adapter(case.root / "uniform")
    facts = Facts.of(files.config, files.tensors)
    assert set(facts.pairs) == set(case.plan.ranks)
    assert {pair.rank for pair in facts.pairs.values()} == {files.config["r"]} == {9}
    native = read_adapter(case.root / "native")
    assert len({pair.rank for pair in Facts.of(native.config, native.tensors).pairs.values()}) > 1


def test_uniform_names_its_targets_by_leaf_where_nothing_was_left_out(case):
    targets = read_adapter(case.root / "uniform").config["target_modules"]
    if case.name == "bert":  # `dense` would be right: PEFT leaves modules_to_save out of its targets
        assert targets == ["dense", "key", "query", "value"]
    assert all("." not in target for target in targets)


@pytest.mark.parametrize("rule", list(ScalingRule))
def test_every_scaling_rule_and_float_alpha_survives_every_layout(rule, tmp_path):
    model, plan = trained("llama", ranks=(2, 7, 1), rule=rule, lora_alpha=7.25)
    batch = ARCHITECTURES["llama"].batch()
    for layout in ("uniform", "compact", "per_rank"):
        report = export_adapter(model, tmp_path / layout, layout=layout, plan=plan, batch=batch)
        assert report.verification.update_error < 1e-6
        assert report.logit_error < 1e-5


def test_excluded_layers_stay_untouched_in_every_layout(tmp_path):
    model, plan = trained("llama", ranks=(2, 3), exclude=["down_proj", "model.layers.1.self_attn.q_proj"])
    batch = ARCHITECTURES["llama"].batch()
    for layout in ("uniform", "compact", "per_rank", "merged"):
        report = export_adapter(model, tmp_path / layout, layout=layout, plan=plan, batch=batch)
        if layout == "merged":
            continue
        assert report.logit_error < 1e-5
        names = Facts.of(*_files(tmp_path / layout)).pairs
        assert not any(re.search(r"down_proj|layers\.1\.self_attn\.q_proj", name) for name in names)
        fresh = ARCHITECTURES["llama"].build()
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path / layout))
        built = {name for name, _ in loaded.named_modules() if name.endswith("lora_A")}
        assert len(built) == len(names)


def test_an_adapter_with_exactly_one_layer_at_the_largest_rank_is_padded_to_it(tmp_path):
    model, plan = trained("llama", ranks=(1, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1))
    report = export_adapter(model, tmp_path / "a", plan=plan)
    assert (report.r, report.ranks[0], report.ranks[2]) == (9, 1, 9)
    assert any("times the mean" in note for note in report.notes)


def test_16_bit_files_serve_within_their_bounds(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    batch = ARCHITECTURES["llama"].batch()
    for dtype in ("bfloat16", "float16"):
        report = export_adapter(model, tmp_path / dtype, dtype=dtype, plan=plan, batch=batch)
        assert 1e-5 < report.verification.update_error < 1e-2
        assert report.logit_error < 5e-2
        assert report.dtype == dtype
        stored = read_adapter(tmp_path / dtype).tensors
        assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def _files(folder):
    files = read_adapter(folder)
    return files.config, files.tensors
