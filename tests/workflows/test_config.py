"""The run file: every fault at once, each with its line; numbers as people write them; a hash of what matters."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import ConfigError, RecipeError
from rankwise.methods.recipe import LORA_OPTIONS, METHODS
from rankwise.methods.rora import RoRA
from rankwise.workflows.config import RunConfig, build_recipe, load_config
from rankwise.workflows.config_training import DEFAULTS, OWNED, training_schema

MINIMAL = "model: tiny\ndata: {train: rows.jsonl}\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return run_file


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [fault.removeprefix(str(path)) for fault in caught.value.faults]


def test_model_and_training_data_are_all_that_a_run_file_needs(write: Write) -> None:
    config = load_config(write(MINIMAL))
    assert (config.method, config.r, config.lora_alpha, config.task) == ("gora", 8, 16.0, "causal-lm")
    assert config.training == dict(DEFAULTS)
    assert str(config.folder) == "runs/tiny-gora"


def test_every_fault_of_a_file_is_reported_at_once_in_its_order_with_its_line(write: Write) -> None:
    path = write(
        "model: tiny\n"
        "data: {train: rows.jsonl, max_lenght: 8}\n"
        "lora_alhpa: 16\n"
        "r: eight\n"
        "lora_dropout: 1.5\n"
        "learning_rate: 0.1\n"
        "gora: {gama: 0.1}\n"
        "calibration: {memory: huge}\n"
        "training:\n"
        "  max_length: 8\n"
        "  warmup_ratio: 0.1\n"
        "  lr_scheduler_type: cosin\n"
    )
    found = faults(path, "training.max_step=3")
    assert found == [
        ":2: unknown key 'data.max_lenght' (did you mean 'max_length'?)",
        ":3: unknown key 'lora_alhpa' (did you mean 'lora_alpha'?)",
        ":4: r: expected a whole number, got 'eight'",
        ":5: lora_dropout: expected a number below 1, got 1.5",
        ":6: unknown key 'learning_rate' (it belongs under 'training:')",
        ":7: unknown key 'gora.gama' (did you mean 'gamma'?)",
        ":8: calibration.memory: expected one of auto, exact, sampled or low, got 'huge'",
        ":10: unknown key 'training.max_length' (it belongs under 'data:')",
        ":11: unknown key 'training.warmup_ratio' (write warmup_steps (a number below 1 is a share of the run))",
        found[9],
        "--set: unknown key 'training.max_step' (did you mean 'max_steps'?)",
    ]
    assert found[9].startswith(":12: training.lr_scheduler_type: expected one of linear, cosine")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("r: 0", "r: expected a number of at least 1, got 0"),
        ("r: true", "r: expected a whole number, got true"),
        ("r: 8.0", "r: expected a whole number, got 8.0"),
        ("lora_alpha: 0", "lora_alpha: expected a number above 0, got 0"),
        ("lora_alpha: .inf", "lora_alpha: expected a finite number, got inf"),
        ("trust_remote_code: yes", "trust_remote_code: expected true or false, got 'yes'"),
        ("target_modules: 3", "target_modules: expected text or a list, got 3"),
        ("modules_to_save: head", "modules_to_save: expected a list, got 'head'"),
        ("training: {learning_rate: 0}", "training.learning_rate: expected a number above 0, got 0"),
        ("training: {max_steps: many}", "training.max_steps: expected a whole number, got 'many'"),
        (
            "training: {max_steps: 0}",
            "training.max_steps: a run makes at least 1 step; -1 leaves it to num_train_epochs",
        ),
        ("training: 3", "training: expected keys of its own, got 3"),
        ("gora: {gamma: -1}", "gora.gamma: -1"),
        ("gora: {rank_mode: best}", "gora.rank_mode: expected one of exact, paper or official, got 'best'"),
        ("preset: best", "preset: gora has no preset 'best'; use paper or official, or leave it out"),
        ("preset: offical", "preset: gora has no preset 'offical' (did you mean 'official'?)"),
        ("preset: 3", "preset: expected text, got 3"),
        ("method: gorra", "method: 'gorra' is not known (did you mean gora?)"),
        ("lora-ga: {direction: ArB}", "lora-ga.direction: expected one of ArB2r, A2rBr"),
        ("dtype: float16", "dtype: expected one of auto, float32 or bfloat16, got 'float16'"),
    ],
)
def test_wrong_types_and_ranges_say_what_is_allowed_and_what_was_seen(write: Write, line: str, message: str) -> None:
    (found,) = faults(write(MINIMAL + line + "\n"))
    assert found.startswith(f":3: {message}")


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1"])
def test_a_validation_share_lies_between_none_and_all(write: Write, share: str) -> None:
    (found,) = faults(write(f"model: m\ndata: {{train: x, validation: {share}}}\n"))
    assert found.startswith(":2: data.validation: expected a path or a hub id or a share above 0 and below 1, got")


def test_missing_keys_are_named(write: Write) -> None:
    assert faults(write("r: 8\n")) == [": missing key 'model'", ": missing key 'data'"]
    assert faults(write("model: m\ndata: {}\n")) == [":2: missing key 'data.train'"]


def test_a_repeated_key_is_a_fault_that_names_both_lines(write: Write) -> None:
    path = write(MINIMAL + "r: 8\nr: 9\n")
    assert faults(path) == [f":4: key 'r' is repeated; it is already at {path}:3"]


def test_a_combination_that_is_refused_is_shown_where_the_methods_are_named(write: Write) -> None:
    path = write(MINIMAL + "method: [gora, rora]\n")
    with pytest.raises(RecipeError, match=r"run\.yaml:3: method: gora and rora both fill the scale slot"):
        load_config(path)


def test_a_preset_that_no_method_has_is_refused(write: Write) -> None:
    (found,) = faults(write(MINIMAL + "method: rora\npreset: official\n"))
    assert found == ":4: preset: rora has no preset 'official'; leave it out"


def test_keys_of_the_other_task_are_refused(write: Write) -> None:
    (found,) = faults(write("model: m\ntask: classification\ndata: {train: x, packing: true}\n"))
    assert found == ":3: data.packing belongs to task causal-lm"


@pytest.mark.parametrize("key", sorted(OWNED))
def test_arguments_that_rankwise_owns_are_refused_with_the_reason(write: Write, key: str) -> None:
    (found,) = faults(write(MINIMAL + f"training: {{{key}: true}}\n"))
    assert found == f":3: unknown key 'training.{key}' (rankwise sets it: {OWNED[key]})"


@pytest.mark.parametrize("key", sorted(LORA_OPTIONS))
def test_options_of_pefts_lora_that_no_method_allows_are_refused_with_the_reason(write: Write, key: str) -> None:
    for text, full in ((f"{key}: true", key), (f"rora: {{{key}: true}}", f"rora.{key}")):
        (found,) = faults(write(MINIMAL + text + "\n"))
        assert found == f":3: unknown key '{full}' ({LORA_OPTIONS[key]})"


@pytest.mark.parametrize("text", ["[1, 2", "a: b: c", "- model\n"])
def test_what_is_not_a_yaml_mapping_is_one_fault_with_a_line(write: Write, text: str) -> None:
    (found,) = faults(write(text))
    assert found.startswith(":1: ")


def test_a_missing_run_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@given(
    value=st.floats(min_value=1e-8, max_value=1e3, allow_nan=False), style=st.sampled_from(["{!r}", "{:e}", "{:.3E}"])
)
def test_a_learning_rate_may_be_written_in_any_usual_way(
    tmp_path_factory: pytest.TempPathFactory, value: float, style: str
) -> None:
    text = style.format(value)
    path = tmp_path_factory.mktemp("lr") / "run.yaml"
    path.write_text(MINIMAL + f"training: {{learning_rate: {text}}}\n")
    assert load_config(path).training["learning_rate"] == float(text)


def test_a_float_without_a_point_is_a_number(write: Write) -> None:
    config = load_config(write(MINIMAL + "training: {learning_rate: 2e-4}\ngora: {gamma: 5e-2}\n"))
    assert config.training["learning_rate"] == 2e-4
    assert build_recipe(config).methods[0].gamma == 0.05


def test_a_leading_zero_and_a_colon_do_not_make_octal_or_base_60_numbers(write: Write) -> None:
    assert load_config(write(MINIMAL + "r: 010\n")).r == 10
    assert load_config(write(MINIMAL + "output_dir: 1:30\n")).output_dir == "1:30"


def test_overrides_lie_over_the_file_and_parse_yaml(write: Write) -> None:
    path = write(MINIMAL + "r: 4\ntraining: {seed: 1}\n")
    config = load_config(path, ["r=16", "training.max_steps=10", "target_modules=[q_proj, v_proj]", "gora.gamma=1e-1"])
    assert (config.r, config.training["seed"], config.training["max_steps"]) == (16, 1, 10)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.settings == {"gora": {"gamma": 0.1}}


def test_an_override_that_cannot_be_read_or_laid_is_a_fault(write: Write) -> None:
    assert faults(write(MINIMAL), "r") == ["--set r: write it as key=value or key.sub=value"]
    assert faults(write(MINIMAL), "model.x=3") == ["--set model.x=3: 'model' holds a value, not keys of its own"]


def test_the_hash_ignores_the_output_folder_and_sees_everything_else(write: Write) -> None:
    path = write(MINIMAL)
    plain = load_config(path).hash()
    assert load_config(path, ["output_dir=elsewhere"]).hash() == plain
    assert load_config(path, ["r=8", "gora.gamma=5e-2"]).hash() == plain, "a default written out changes nothing"
    changes = ["r=9", "training.seed=1", "gora.gamma=0.1", "data.max_length=8", "method=rora", "preset=paper"]
    assert len({plain, *(load_config(path, [change]).hash() for change in changes)}) == len(changes) + 1


def test_the_resolved_run_file_is_a_run_file_and_resolves_to_itself(write: Write) -> None:
    config = load_config(write(MINIMAL + "gora: {r_min: 2}\n"))
    again = RunConfig.model_validate(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.hash() == config.hash()


def test_the_learning_rate_follows_the_method_unless_it_is_said(write: Write) -> None:
    path = write(MINIMAL)
    for method in ("gora", "rora", "lora"):
        config = load_config(path, [f"method={method}"])
        assert config.learning_rate == build_recipe(config).methods[0].learning_rates[1]
    for methods, leading in (("[gora, lora-rite]", 1), ("[rora, lora-ga]", 1), ("[lora-ga, rora, lora-rite]", 2)):
        config = load_config(path, [f"method={methods}"])
        assert config.learning_rate == build_recipe(config).methods[leading].learning_rates[1]
    assert load_config(path, ["training.learning_rate=1e-3"]).learning_rate == 1e-3


def test_clipping_is_off_by_default_where_the_method_clips_by_itself_and_the_resolved_run_file_says_so(
    write: Write,
) -> None:
    path = write(MINIMAL)
    assert load_config(path).training["max_grad_norm"] == 1.0
    for methods in ("lora-rite", "[gora, lora-rite]"):
        config = load_config(path, [f"method={methods}"])
        assert config.to_dict()["training"]["max_grad_norm"] == 0.0
        again = RunConfig.model_validate(config.to_dict())
        assert again.hash() == config.hash()
    said = load_config(path, ["method=lora-rite", "training.max_grad_norm=0.5"])
    assert said.to_dict()["training"]["max_grad_norm"] == 0.5


def test_a_setting_that_was_given_on_the_command_line_is_blamed_there_and_one_of_the_file_by_its_line(
    write: Write,
) -> None:
    path = write(MINIMAL)
    told = faults(path, "method=beamlora", "beamlora.reset_every=1")
    assert told == ["--set: beamlora.reset_every: 1 is out of range; use a whole number >= 2"]
    path = write(f"{MINIMAL}method: beamlora\nbeamlora:\n  tau: 0.05\n  reset_every: 1\n")
    (fault,) = faults(path)
    assert fault.startswith(f":{len(path.read_text().splitlines())}: beamlora.reset_every: 1 is out of range")


def test_a_preset_goes_to_the_methods_that_have_it(write: Write) -> None:
    config = load_config(write(MINIMAL), ["method=[rora, lora-ga]", "preset=official"])
    assert build_recipe(config).methods[1].offset == "base"
    assert config.to_dict()["lora-ga"]["offset"] == "base"


def test_settings_that_are_lists_in_a_file_are_tuples_in_a_method(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Decaying(RoRA):
        id: ClassVar[str] = "decaying"
        betas: tuple[float, float] = (0.9, 0.999)

    for place in ("registry", "recipe"):
        monkeypatch.setattr(f"rankwise.methods.{place}.METHODS", {**METHODS, "decaying": Decaying})
    path = write(MINIMAL + "method: decaying\ndecaying: {betas: [0.8, 0.9]}\n")
    config = load_config(path)
    assert build_recipe(config).methods == (Decaying(betas=(0.8, 0.9)),)
    assert config.to_dict()["decaying"] == {"betas": [0.8, 0.9]}
    assert RunConfig.model_validate(config.to_dict()).to_dict() == config.to_dict()
    (found,) = faults(write(MINIMAL + "decaying: {betas: [0.8, x]}\n"))
    assert found.startswith(":3: decaying.betas: expected a number")


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_every_default_is_an_argument_of_the_installed_library_and_fits_its_own_schema(task: str) -> None:
    assert training_schema(task).model_validate(dict(DEFAULTS)).model_dump(exclude_unset=True) == dict(DEFAULTS)


def test_importing_the_schema_imports_no_torch() -> None:
    code = (
        "import sys, rankwise.workflows.config; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
