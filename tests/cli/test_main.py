"""The command line as a process: exit codes, where text goes, and what help may import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.report import events, sample

VERBS = ("demo", "plan", "train", "export", "check", "report", "methods")


def rankwise(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = "from rankwise.cli.main import main; main()" if code is None else code
    command = [sys.executable, "-W", "error", "-c", start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS)], ids=lambda words: " ".join(words) or "top")
def test_help_answers_without_importing_torch_or_rich(words: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from rankwise.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as leave:\n"
        "    heavy = {'torch', 'peft', 'transformers', 'datasets', 'rich', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
        "    raise\n"
    )
    done = rankwise(*words, "--help", code=code)
    assert done.returncode == 0, done.stderr
    assert "Usage: rankwise" in done.stdout
    assert done.stderr == ""


def test_import_of_the_library_imports_no_torch() -> None:
    done = rankwise(code="import sys, rankwise; assert 'torch' not in sys.modules; assert rankwise.__version__")
    assert done.returncode == 0, done.stderr


def test_an_unknown_verb_is_exit_2_and_names_the_nearest() -> None:
    done = rankwise("trian")
    assert done.returncode == 2
    assert "train" in done.stderr
    assert done.stdout == ""


def test_a_missing_run_file_is_exit_2_on_stderr_alone(tmp_path: Path) -> None:
    done = rankwise("train", str(tmp_path / "absent.yaml"))
    assert done.returncode == 2
    assert "absent.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_json_reports_a_fault_as_json(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: nowhere\nlora_alhpa: 3\ndata: {train: x.jsonl}\n")
    done = rankwise("plan", str(run), "--json")
    assert done.returncode == 2
    fault = json.loads(done.stdout)["error"]
    assert fault["exit_code"] == 2
    assert any("lora_alhpa" in line and "lora_alpha" in line for line in fault["faults"])


def test_version_is_on_stdout() -> None:
    done = rankwise("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("rankwise ")


def test_check_of_a_folder_that_is_no_adapter_is_exit_2(tmp_path: Path) -> None:
    done = rankwise("check", str(tmp_path))
    assert done.returncode == 2
    assert "adapter_config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_methods_lists_gora_and_refuses_an_unknown_name() -> None:
    listed = rankwise("methods", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {"lora", "gora", "rora"} <= {row["id"] for row in json.loads(listed.stdout)}
    refused = rankwise("methods", "gorra")
    assert refused.returncode == 2
    assert "gora" in refused.stderr


def test_resume_may_stand_alone_before_the_run_file(tmp_path: Path) -> None:
    for words in (("--resume", "absent.yaml"), ("absent.yaml", "--resume"), ("absent.yaml", "--resume", "--quiet")):
        done = rankwise("train", *words)
        assert done.returncode == 2
        assert "absent.yaml" in done.stderr


def test_a_plan_that_cannot_be_written_is_exit_2_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = rankwise("plan", str(tmp_path / "absent.yaml"), "-o", str(tmp_path / "file" / "plan.json"))
    assert done.returncode == 2
    assert "error: --output: " in done.stderr
    assert "file is a file; name a folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_report_prints_its_place_alone_on_stdout_and_the_course_of_the_ranks_on_stderr(tmp_path: Path) -> None:
    plan = sample.uneven_plan(sample.bert_shapes())
    sample.write_run(tmp_path, plan)
    sample.write_lines(tmp_path / "ranks.jsonl", events.sora(plan, events=2))
    live = sum(plan.ranks.values())
    done = rankwise("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    assert "2 events from step 40 to step 48" in done.stderr
    told = json.loads(rankwise("report", str(tmp_path), "--json").stdout)
    assert (told["report"], told["events"]) == (str(tmp_path / "report.html"), 2)
    assert told["live_ranks"] == {"start": live, "end": live - 24}
    assert told["parameters"]["start"] == plan.parameters > told["parameters"]["end"]
