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


def perturbation() -> str:
    found = load("perturbation")
    floors = {
        "mgpo": found["floors"]["mgpo"]["ratio_at_the_rate_of_thin_products"],
        "ggpo": found["floors"]["ggpo"]["ratio"],
    }
    lines = [
        "## A perturbed training step",
        "",
        f"{found['model']}; beside a plain LoRA step, processor time, {found['rounds']} rounds at a load of {found['load_average'][0]:g}. "
        "`OMP_NUM_THREADS=1 python -m benchmarks.perturbation`",
        "",
        "| | ratio, median (quartiles) | limit | floor |",
        "|---|---:|---:|---:|",
    ]
    for name, title in (
        ("mgpo", "MGPO"),
        ("ggpo", "GGPO"),
        ("ggpo, second product", "GGPO over packed layers (a second product)"),
    ):
        ratio, limit, floor = found["ratio"][name], found["limits"].get(name, ""), floors.get(name, "")
        lines.append(
            f"| {title} | {ratio['median']:.2f} ({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f}) | {limit} | {floor} |"
        )
    gigabytes, values = found["floors"]["ggpo"]["gigabytes_of_sums"], found["floors"]["ggpo"]["values_drawn"] / 1e6
    lines += [
        "",
        f"The floor of GGPO is two draws of every weight's noise ({values:.0f} million values) and two sums W + E ({gigabytes} GB); MGPO's is two thin "
        f"products a layer, forward and backward ({found['floors']['mgpo']['gigaflops']} GFLOP). One draw alone is "
        f"{found['ratio']['draws']['median']:.2f} of a plain step, torch's `normal_` {found['ratio']['torch normal_']['median']:.2f}.",
    ]
    return "\n".join(lines)


def schedules() -> str:
    found = load("schedules")
    limits = found["limits"]
    lines = [
        "## Ranks that move",
        "",
        "Processor time on one thread. `OMP_NUM_THREADS=1 python -m benchmarks.schedules`",
    ]
    if "scoring" in found:
        lines += _scoring(found, limits)
    if "steps" in found:
        lines += [
            "",
            f"A training step beside a stock PEFT LoRA step of the same slots (XGBLoRA: of the rank that it exports), {found['stepped_model']}:",
            "",
            "| method | ratio, median (quartiles) | limit | pairs of steps |",
            "|---|---:|---:|---:|",
        ]
        for name, one in found["steps"].items():
            low, high = one["quartiles"]
            limit = limits["xgblora step"] if name == "xgblora" else limits["step"]
            lines.append(f"| {name} | {one['ratio']:.3f} ({low:.2f}-{high:.2f}) | {limit} | {one['pairs']} |")
    if "recompression" in found:
        one = found["recompression"]
        before, after = (
            f"{low}" if low == high else f"{low} to {high}" for low, high in (one["ranks_before"], one["ranks_after"])
        )
        lines += [
            "",
            f"Cutting {before} ranks a layer to {after} under the budget of r = 8 takes {one['share_of_a_run']:.2%} of a run of {one['run_steps']} "
            f"steps (limit {limits['recompression']:.0%}).",
        ]
    if "compilations" in found:
        told = ", ".join(
            f"{name} {one['compiled_later']} in {one['events']} events" for name, one in found["compilations"].items()
        )
        lines += ["", f"Compilations by torch.compile after the first step of 60: {told}."]
    return "\n".join(lines)


def _scoring(found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    part = found["scoring"]
    lines = [
        "",
        f"AB-LoRA's scores of all ranks, {found['scored_model']}, against the 2R + 1 passes of the definition:",
        "",
        "| | exact (lowest-highest) | limit | screened (lowest-highest) | limit | same ranks up to ties | sequences of exact's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("40 steps", "150 steps"):
        one = part[name]
        shares = [seed["screened_sequences"] / seed["exact_sequences"] for seed in one["seeds"]]
        lines.append(
            f"| after {name} | {spread(one['exact_speedup'])} x | {limits['exact']} | {spread(one['screened_speedup'])} x | "
            f"{limits[f'screened, {name}']} | {one['same_up_to_ties']} of {one['of']} | {sum(shares) / len(shares):.0%} |"
        )
    own = part["exact_against_plain"]
    largest = own["largest_difference_of_a_term"]
    apart = (
        f"differ from the definition's by at most {largest:.1e}" if largest else "equal the definition's bit for bit"
    )
    lines += [
        "",
        f"Exact scores {apart}, measured on all ranks of one model, and "
        f"prune the same ranks up to ties: {'yes' if own['same_up_to_ties'] else 'no'}. A scoring pass takes about {own['pass_megabytes']:g} MB of "
        f"activations; `scoring_bytes` ({own['scoring_bytes'] / 2**30:g} GiB) bounds it.",
    ]
    if "large" in found:
        one = found["large"]
        lines.append(
            f"One round of the 8 x 768 Llama ({one['ranks']} ranks): exact {one['exact_speedup']:.2f} x, screened {one['screened_speedup']:.2f} x, "
            f"{one['differing']} of {one['pruned']} ranks differ."
        )
    return lines


def optimizers() -> str:
    found = load("optimizers")
    lines = [
        "## Optimizers over pairs",
        "",
        "One optimizer step on one thread, beside torch's fused AdamW on the same parameters; state in bytes a parameter, a float32 master of "
        "16-bit parameters apart. `bare products` are the same matrix products and nothing else, in their fastest form on the machine: the floor. "
        "`OMP_NUM_THREADS=1 python -m benchmarks.optimizers`",
    ]
    for name, case in found["cases"].items():
        counts, load_average = case["counts"], case["load_average"][0]
        limits = {
            key.partition(",")[0]: v["limit"] for key, v in case["verdicts"].items() if key.endswith("times AdamW")
        }
        lines += [
            "",
            f"### {name}: {case['pairs']} pairs, r = {case['r']}, {case['dtype']}, {case['parameters']:,} parameters",
            "",
            f"Load {load_average:g}, {case['rounds']} rounds.",
            "",
            "| | time ratio (lowest-highest) | limit | state, bytes | GFLOP | GB moved |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for key, arm in case["arms"].items():
            own = arm.get("bytes_per_parameter", {})
            count = counts.get(key.removeprefix("products-"), {})
            work = [f"{count[unit]:.2f}" if unit in count else "" for unit in ("gflop", "gigabytes")]
            work = ["", ""] if key.startswith("products-") else work
            state = f"{own['state']:.2f}" if own else ""
            limit = limits.get(key, "")
            lines.append(f"| {arm['title']} | {spread(arm['cpu_ratio'])} | {limit} | {state} | {work[0]} | {work[1]} |")
        others = [
            f"{key} {v['figure']:.2f} (limit {v['limit']:g})"
            for key, v in case["verdicts"].items()
            if not key.endswith(("times AdamW", "bytes a parameter"))
        ]
        if others:
            lines += ["", f"Beside other public optimizers, same run: {'; '.join(others)}."]
    return "\n".join(lines)


def lora_ga() -> str:
    found = load("lora_ga")
    limits, settings = found["limits"], found["settings"]
    lines = [
        "## LoRA-GA's start",
        "",
        f"Statistics and factors on the 8 x 768 Llama, r = {settings['r']}, {settings['batches']} micro-batches of {settings['rows']} x "
        f"{settings['length']} tokens, beside PEFT 0.21's `preprocess_loraga` and its initialization on the same batches. Copies are float32 copies of "
        "the targets above the peak of a plain LoRA pass. `python -m benchmarks.lora_ga`",
        "",
        "| | time, of PEFT's (lowest-highest) | limit | copies above the pass | limit | first step's relative error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    time_limits = {
        "exact": limits["exact, time to PEFT's"],
        "sketch, one pass": limits["sketch, one pass, time to PEFT's"],
    }
    for name, memory in found["memory"].items():
        ratio = spread(found["time"][name]["cpu_to_peft"])
        limit = time_limits.get(name, {}).get("limit", "")
        copies = limits["sketch, one pass, copies above the pass"]["limit"] if name == "sketch, one pass" else ""
        quality = found["quality"]["model"].get(name, {})
        error = f"{quality['against_G']:.2f}" if quality else ""
        lines.append(f"| {name} | {ratio} | {limit} | {memory['copies_above_pass']:.2f} | {copies} | {error} |")
    floors = ", ".join(f"{name} {limit['floor']:.2f}" for name, limit in time_limits.items())
    best = found["quality"]["model"]["best of rank 2r, against G"]
    lines += [
        "",
        f"Floors of the time (a frozen pass and the products that the statistics need): {floors}. No start of rank 2r misses less than {best:.2f} of "
        "this gradient, whose spectrum is flat. On 768 x 2,048 matrices, missed beside the best of rank 2r, and estimated by the sketch itself:",
        "",
        "| spectrum | readings | missed, against the best | missed, against G | its own estimate |",
        "|---|---|---:|---:|---:|",
    ]
    for spectrum, values in found["quality"]["spectra"].items():
        for name, value in values.items():
            if isinstance(value, dict):
                own = f"{value['own_estimate_against_G']:.2f}" if "own_estimate_against_G" in value else ""
                lines.append(
                    f"| {spectrum} | {name} | {value['against_best']:.3f} | {value['against_G']:.2f} | {own} |"
                )
    return "\n".join(lines)


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
    sections = (calibration, lora_ga, training_step, perturbation, optimizers, schedules, plan_initialize, start)
    PAGE.write_text("\n\n".join([HEAD.rstrip(), *(section() for section in sections)]) + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
