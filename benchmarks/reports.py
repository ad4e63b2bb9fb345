"""What the speed benchmarks have in common: one thread, the circumstances beside each figure, one JSON file."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["circumstances", "measure_parts", "on_one_thread", "spread", "write_report"]


def on_one_thread(parser: argparse.ArgumentParser) -> None:
    """Ends the program with its usage where more threads than one would compute."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: the figures are for one thread")
    torch.set_num_threads(1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
    }


def circumstances(*packages: str) -> dict[str, Any]:
    """Machine, load, versions and date."""
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: version(name) for name in ("rankwise", "torch", "transformers", "peft", *packages)},
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure_parts(
    report: dict[str, Any], parts: Mapping[str, Callable[[], Any]], chosen: Sequence[str], rounds: int
) -> None:
    """Measures the chosen parts into the report, each with its own circumstances: parts are repeated one by one."""
    for part, measure in parts.items():
        if part in chosen:
            report[part] = measure()
            report[f"{part}_measured"] = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "load_average": [round(load, 1) for load in os.getloadavg()],
                "rounds": rounds if part == "time" else 1,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "platform": platform.platform(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft", "rankwise")},
            }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
