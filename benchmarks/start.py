"""How long `rankwise --help` and `import rankwise` take, each in a fresh process: `python -m benchmarks.start`."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPETITIONS = 15


def seconds(code: str, *arguments: str) -> dict[str, dict[str, float]]:
    wall, processor = [], []
    for _ in range(REPETITIONS):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        wall.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall": summary(wall), "processor": summary(processor)}


def summary(spent: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(spent), 4), "low": round(min(spent), 4), "high": round(max(spent), 4)}


def main() -> None:
    found = {
        "benchmark": "start",
        "repetitions": REPETITIONS,
        "limit_help_seconds": 0.3,
        "load_average": os.getloadavg()[0],
        "help": seconds("from rankwise.cli.main import main; main()", "--help"),
        "import": seconds("import rankwise"),
        "bare_interpreter": seconds("pass"),
        "versions": {name: version(name) for name in ("rankwise", "typer")} | {"python": platform.python_version()},
    }
    path = Path(__file__).parent / "results" / "start.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
