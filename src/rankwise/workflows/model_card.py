"""README.md of an adapter: what it is, how it was made, how to load it, in plain words."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from rankwise.methods.recipe import Recipe
from rankwise.ranks.plan import RankPlan
from rankwise.workflows.config import RunConfig
from rankwise.workflows.data_files import DataSource, Part

__all__ = ["model_card"]


def model_card(
    config: RunConfig,
    plan: RankPlan,
    recipe: Recipe,
    ranks: Mapping[str, int],
    *,
    label_names: Sequence[str],
    sources: Mapping[Part, DataSource],
    figures: Mapping[str, object],
    left_out: float = 0.0,
) -> str:
    """The model card.

    Args:
        config: the run file.
        plan: ranks and scalings at the start.
        recipe: the methods.
        ranks: by layer, the ranks that the adapter holds.
        label_names: of a classification, in the order of their numbers.
        sources: where the rows came from.
        figures: what was measured.
        left_out: the share of the update's norm that the adapter leaves out of what was trained and measured.
    """
    parts = [
        _front_matter(config),
        f"# LoRA adapter for {config.model}\n",
        _made(config, plan, recipe, ranks, sources),
        _measured(figures, left_out),
        _loading(config, label_names),
        _labels(label_names),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(config: RunConfig) -> str:
    tags = ["rankwise", "lora", *config.methods]
    pipeline = "text-classification" if config.task == "classification" else "text-generation"
    lines = [
        "---",
        f"base_model: {json.dumps(config.model)}",
        "library_name: peft",
        f"pipeline_tag: {pipeline}",
        f"tags: {json.dumps(list(dict.fromkeys(tags)))}",
        "---\n",
    ]
    return "\n".join(lines)


def _made(
    config: RunConfig, plan: RankPlan, recipe: Recipe, ranks: Mapping[str, int], sources: Mapping[Part, DataSource]
) -> str:
    held = [rank for rank in ranks.values() if rank] or [0]
    parameters = sum(ranks.get(layer.name, 0) * layer.shape.cost for layer in plan.layers)
    titles = "; ".join(f"{method.title} ({method.source})" for method in recipe.methods)
    train = sources["train"]
    rows = [
        ("method", titles),
        (
            "planned ranks" if ranks == plan.ranks else "ranks",
            f"{min(held)} to {max(held)} in {len(held)} of {len(plan.layers)} layers",
        ),
        ("budget", f"{parameters:,} of {plan.budget:,} parameters (a uniform rank of {plan.r})"),
        ("training data", f"{train.source}, {train.rows:,} rows, SHA-256 {train.sha256[:16]}"),
        ("learning rate", f"{config.learning_rate:g}"),
        ("seed", str(config.seed)),
        (
            "made with",
            f"rankwise {version('rankwise')}, PEFT {version('peft')}, transformers {version('transformers')}",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## How it was made\n\n| | |\n|---|---|\n{table}\n"


def _measured(figures: Mapping[str, object], left_out: float) -> str:
    rows = [(name, value) for name, value in figures.items() if isinstance(value, int | float)]
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {value:.6g} |" for name, value in rows)
    cut = (
        "\nThese are of the model as it was trained. To keep to the budget the adapter leaves out "
        f"{left_out:.3g} of the norm of its update.\n"
        if left_out
        else ""
    )
    return f"## Measured\n\n| figure | value |\n|---|---|\n{table}\n{cut}"


def _loading(config: RunConfig, label_names: Sequence[str]) -> str:
    if config.task == "classification":
        kind, options = "AutoModelForSequenceClassification", f", num_labels={len(label_names)}"
    else:
        kind, options = "AutoModelForCausalLM", ""
    return (
        "## Loading\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {kind}, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        f"base = {kind}.from_pretrained({json.dumps(config.model)}{options})\n"
        "model = PeftModel.from_pretrained(base, folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "```\n"
    )


def _labels(label_names: Sequence[str]) -> str:
    if not label_names:
        return ""
    table = "\n".join(f"| {number} | {name} |" for number, name in enumerate(label_names))
    return f"## Labels\n\n| number | name |\n|---|---|\n{table}\n"
