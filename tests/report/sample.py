"""Run folders as workflows write them, from made-up figures."""

import json
import math
from pathlib import Path

from rankwise.ranks.plan import ModelIdentity, RankPlan
from rankwise.ranks.shapes import LayerShape, ScalingRule

BERT_KINDS = (
    ("attention.self.query", 384, 384),
    ("attention.self.key", 384, 384),
    ("attention.self.value", 384, 384),
    ("attention.output.dense", 384, 384),
    ("intermediate.dense", 1536, 384),
    ("output.dense", 384, 1536),
)
LLAMA_KINDS = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 1024, 4096),
    ("self_attn.v_proj", 1024, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 14336, 4096),
    ("mlp.up_proj", 14336, 4096),
    ("mlp.down_proj", 4096, 14336),
)


def bert_shapes(layers: int = 6) -> list[LayerShape]:
    return [
        LayerShape(f"encoder.layer.{i}.{kind}", rows, columns)
        for i in range(layers)
        for kind, rows, columns in BERT_KINDS
    ]


def llama_shapes(layers: int = 32) -> list[LayerShape]:
    return [
        LayerShape(f"model.layers.{i}.{kind}", rows, columns)
        for i in range(layers)
        for kind, rows, columns in LLAMA_KINDS
    ]


def uneven_plan(shapes: list[LayerShape], r: int = 8, model: str = "all-MiniLM-L6-v2") -> RankPlan:
    """Ranks from 2 to 4 r that rise with depth and favor values; never above the budget."""
    importance = [
        (1.0 + 0.35 * math.sin(1.7 * i) + 2.0 * i / len(shapes))
        * (2.2 if "v" in shape.name.rpartition(".")[2][:1] else 1.0)
        for i, shape in enumerate(shapes)
    ]
    share = r * len(shapes) / sum(importance)
    ranks = [max(2, min(4 * r, math.floor(0.8 * share * value))) for value in importance]
    return RankPlan.from_shapes(
        shapes,
        ranks,
        r=r,
        lora_alpha=16,
        scaling_rule=ScalingRule.ALPHA_OVER_SQRT_RANK,
        methods=("gora",),
        model=ModelIdentity(name=model, fingerprint="a1b2c3d4"),
        importance=[value * 1e-6 for value in importance],
        reasons=["share of the budget by importance"] * len(shapes),
    )


def manifest(plan: RankPlan, status: str = "finished") -> dict[str, object]:
    return {
        "format": "rankwise-run",
        "version": 1,
        "status": status,
        "config": {
            "model": plan.model.name,
            "task": "classification",
            "method": list(plan.methods),
            "r": plan.r,
            "lora_alpha": plan.lora_alpha,
            "target_modules": "all-linear",
            "gora": {"gamma": 0.05},
            "training": {"learning_rate": 1.0e-3, "max_steps": 250, "per_device_train_batch_size": 32},
        },
        "config_hash": "5f0c2c9f7d1f",
        "versions": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "rankwise": "0.1.0",
        },
        "threads": 2,
        "seed": 0,
        "data": {
            "train": {"source": "wordnet/train.jsonl.gz", "rows": 8000, "sha256": "9b1c" * 16},
            "validation": {"source": "wordnet/test.jsonl.gz", "rows": 2000, "sha256": "77aa" * 16},
        },
        "budget": {"parameters": plan.budget, "used": plan.parameters, "share": plan.parameters / plan.budget},
        "timings": {"load": 2.1, "calibration": 6.8, "training": 71.5, "evaluation": 5.2, "export": 1.4},
        "result": {
            "steps": 250,
            "train_loss": 1.2208,
            "eval_loss": 0.9312,
            "test_accuracy": 0.7345,
            "test_majority_share": 0.1305,
        },
        "export": {
            "folder": "runs/demo",
            "layout": "uniform",
            "dtype": "float32",
            "layers": len(plan.layers),
            "vllm_max_lora_rank": 16,
            "verification": {
                "update_error": 1.2e-7,
                "update_bound": 1e-5,
                "worst_layer": plan.layers[0].name,
                "logit_error": 3.4e-7,
                "verdicts": verdicts(),
            },
            "logit_error": None,
            "notes": [],
            "verdicts": verdicts(),
        },
        "calibration": {
            "batches": 64,
            "skipped": 0,
            "tokens": 2048.0,
            "loss": 3.8012,
            "memory": "exact",
            "collector": "outer",
            "row_share": 1.0,
            "seconds": 6.8,
            "from_cache": False,
        },
    }


def verdicts() -> list[dict[str, object]]:
    keys = ("consumer", "version", "status", "error", "reason", "evidence")
    rows = (
        ("peft", "0.21", "ok", 0.0, "", "run"),
        ("vllm", ">= 0.32", "ok", 0.0, "", "run"),
        ("llama.cpp", "2026-10", "wrong", 0.75, "encoder.layer.0.output.dense: multiplier 4, right is 8", "run"),
        ("sglang", "0.5.23", "refuses", None, "ranks differ between layers", "run"),
        ("ollama", "2026-10", "wrong", "inf", "encoder.layer.0.output.dense: multiplier 4, right is 0", "read"),
    )
    return [dict(zip(keys, row, strict=True)) for row in rows]


def audit(alike: bool = False) -> dict[str, object]:
    """What `Audit.to_dict()` returns."""
    return {
        "folder": "runs/demo/checkpoint-250",
        "base_model": "all-MiniLM-L6-v2",
        "layers": 36,
        "ranks": [2, 5.9, 15],
        "r": 8,
        "lora_alpha": 16.0,
        "use_rslora": True,
        "parameters": 236160,
        "dtype": "float32",
        "verdicts": verdicts(),
        "rule_errors": {"a": 0.0, "b": 0.65},
        "vllm_max_lora_rank": 16,
        "faults": [] if alike else ["base_model.model.encoder.layer.0.output.dense.lora_A.weight holds NaN or Inf"],
        "advice": "" if alike else "One rank and a folded scaling are read alike everywhere.",
        "command": None if alike else "rankwise export runs/demo/checkpoint-250 -o runs/demo/checkpoint-250-uniform",
        "served_alike": alike,
    }


def metrics(steps: int = 250, every: int = 5) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(every, steps + 1, every):
        wave = 0.06 * math.sin(step * 1.3)
        rate = 1e-3 * min(1.0, step / 15) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = 0.85 + 2.95 * math.exp(-step / 55) + wave
        lines.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": 1.1 + wave * 4,
                "seconds": step * 0.28,
            }
        )
        if step % 50 == 0:
            lines.append(
                {
                    "step": step,
                    "epoch": step / steps,
                    "eval_loss": loss + 0.07,
                    "eval_accuracy": 0.75 - 0.6 * math.exp(-step / 55),
                    "seconds": step * 0.28,
                }
            )
    return lines


def health(status: str = "passed") -> dict[str, object]:
    checks = [
        (
            "targets",
            "before",
            "passed",
            36,
            36,
            "Every target pattern matched and every layer is reached by the loss.",
            "",
        ),
        ("labels", "before", "passed", 8000, 1, "Rows with a label that counts.", ""),
        ("factors-move", "during", "passed", 36, 36, "Layers whose factors moved.", ""),
        ("finite-gradients", "during", "passed", 0, 0, "Gradients that were not finite.", ""),
        ("updates", "after", "passed", 3.1e-3, 0.0, "The smallest relative update of a layer that had a gradient.", ""),
        (
            "export",
            "after",
            "passed",
            1.2e-7,
            1e-5,
            "The adapter read back from the file against the trained model.",
            "",
        ),
    ]
    if status == "failed":
        checks[3] = (
            "finite-gradients",
            "during",
            "failed",
            412,
            0,
            "Gradients that were not finite.",
            "Lower the learning rate.",
        )
        checks[4:] = [(*check[:2], "pending", None, None, *check[5:]) for check in checks[4:]]
    keys = ("id", "stage", "status", "measured", "limit", "message", "advice")
    return {
        "format": "rankwise-health",
        "version": 1,
        "status": status,
        "checks": [dict(zip(keys, check, strict=True)) for check in checks],
    }


def write_run(folder: Path, plan: RankPlan | None = None, status: str = "finished") -> Path:
    """A whole run folder."""
    plan = plan or uneven_plan(bert_shapes())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "rankwise.json", manifest(plan, status))
    write_json(folder / "health.json", health("failed" if status == "failed" else "passed"))
    plan.save(folder / "plan.json")
    write_lines(folder / "metrics.jsonl", metrics())
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
