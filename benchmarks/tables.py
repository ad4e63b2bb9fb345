"""Writes docs/performance.md from the results files: `python -m benchmarks.tables`."""

# ruff: noqa: E501  (a table's line is a line)

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"

HEAD = """# Speed and memory

Ratios inside one run, medians of interleaved repetitions on one thread; the machines are shared, so processor time is the
clock, and the spread stands beside each figure. Limits are those that the project set itself before measuring. This page is written by
`python -m benchmarks.tables` from the files in `benchmarks/results/`, which hold versions, load and every other figure.
"""


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def calibration() -> str:
    found = load("calibration")
    rows = [
        ("plain LoRA pass", "", ""),
        ("autograd, full gradients", "", ""),
        ("PEFT LoRA-GA preprocessing", "", ""),
        ("exact", "1.36", ""),
        ("sampled 1/4", "1.10", "0.32"),
        ("sampled 1/16", "", "0.12"),
        ("low", "", "0.25"),
    ]
    lines = [
        "## Calibration",
        "",
        "8 x 768 Llama, float32, all linear layers, 8 micro-batches of 2 x 128 tokens, beside a stock PEFT LoRA forward and backward "
        "pass over the same batches. Copies are float32 copies of the target weights above the peak of that pass.",
        "`python -m benchmarks.calibration`",
        "",
        "| | time ratio (lowest-highest) | limit | copies above the pass | limit |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, time_limit, memory_limit in rows:
        ratio = spread(found["time"][name]["cpu_ratio"])
        copies = found["memory"][name]["copies_above_pass"]
        lines.append(f"| {name} | {ratio} | {time_limit} | {copies:.2f} | {memory_limit} |")
    limits = found["limits"]
    floors = ", ".join(f"{name} {limits[f'{name}, time']['floor']:.2f}" for name in ("exact", "sampled 1/4"))
    passes = found["counts"]["low_passes"]
    quarter = found["sampling"]["1/4"]
    lines += [
        "",
        f"Floors (a frozen pass plus the multiplications that the statistics need, at the rate of plain products): {floors}. "
        f"`low` reads the batches {passes} times.",
        "",
        f"Sampling a quarter of the rows ({found['sampling']['draws']} draws): mean relative error of an importance "
        f"{quarter['mean_relative_importance_error']:.1%}, mean rank difference {quarter['mean_rank_difference']:.2f}, worst "
        f"{quarter['worst_rank_difference']}; the stated standard error is right within "
        f"{abs(quarter['error_in_standard_errors_rms'] - 1):.0%}.",
    ]
    return "\n".join(lines)


def training_step() -> str:
    found = load("training_step")
    lines = [
        "## A training step",
        "",
        f"{found['model']}; beside a stock PEFT LoRA step of the same ranks. `python -m benchmarks.training_step`",
        "",
        "| method | processor time ratio (quartiles) | ratio of sums | limit | pairs of steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in found["results"].items():
        clock = values["processor"]
        low, high = clock["quartiles"]
        lines.append(
            f"| {name} | {clock['ratio']:.3f} ({low:.2f}-{high:.2f}) | {clock['ratio_of_sums']:.3f} | {found['limit']} | {values['pairs']} |"
        )
    checks = ", ".join(f"{values['check_milliseconds']:.1f} ms" for values in found["results"].values())
    lines += ["", f"What rankwise adds to a step is one look at all gradients: {checks} of about a second."]
    return "\n".join(lines)


def plan_initialize() -> str:
    found = load("plan_initialize")
    core = found["core"]
    own, wide = core["ratio_to_product"], core["ratio_to_float32_product"]
    return "\n".join(
        [
            "## Plan and initialize",
            "",
            f"{found['layers']} layers of Llama-3.1-8B shapes, W and G in bfloat16, r = {found['r']}; importance, allocation and both factors "
            "of every layer, beside the product G A^T with the rows that a layer can get. `python benchmarks/plan_initialize.py`",
            "",
            "| floor | seconds of the floor | ours | ratio, median (quartiles) | limit |",
            "|---|---:|---:|---:|---:|",
            f"| one float32 product, G already float32 | {core['seconds']['float32']:.1f} | {core['seconds']['ours']:.1f} | "
            f"{wide['median']:.2f} ({wide['lower_quartile']:.2f}-{wide['upper_quartile']:.2f}) | 1.5 |",
            f"| the same product from bfloat16 G, widened in blocks | {core['seconds']['product']:.1f} | {core['seconds']['ours']:.1f} | "
            f"{own['median']:.2f} ({own['lower_quartile']:.2f}-{own['upper_quartile']:.2f}) | 1.5 |",
            "",
            f"The largest singular value decomposition on the path has a side of {found['largest_svd_side']} (the condition of a triangular "
            "factor); none is taken of a weight or gradient.",
        ]
    )


def start() -> str:
    found = load("start")
    return "\n".join(
        [
            "## Start",
            "",
            f"`rankwise --help` takes {found['help']['processor']['median']:.2f} s of processor time (median of {found['repetitions']}, limit "
            f"0.3 s; {found['help']['wall']['median']:.2f} s on the wall at a load of {found['load_average']:.1f}, where a bare interpreter "
            f"took {found['bare_interpreter']['wall']['median']:.2f} s); `import rankwise` takes "
            f"{found['import']['processor']['median']:.2f} s and imports no torch. `python -m benchmarks.start`",
        ]
    )


def main() -> None:
    PAGE.write_text("\n\n".join([HEAD.rstrip(), calibration(), training_step(), plan_initialize(), start()]) + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
