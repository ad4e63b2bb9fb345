"""From rows to batches: tokens, labels and the collator that calibration and training share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.errors import ConfigError, DataError
from rankwise.workflows.config import RunConfig
from rankwise.workflows.data import RunData

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Collator",
    "Prepared",
    "RowCounts",
    "calibration_batches",
    "count_notes",
    "length_limit",
    "prepare_classification",
    "refuse_unlabeled",
    "scoring_batches",
]

SCORED_AT_ONCE = 32
"""Rows in a batch that a schedule scores on: as many as are padded to one length."""

Collator = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """What became of the rows of one part.

    Args:
        rows: read.
        truncated: cut at `max_length`.
        dropped: left out because no label of theirs counts.
        labels: labels that the loss sees (tokens, or rows for classification).
    """

    rows: int
    truncated: int
    dropped: int
    labels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """Everything that a trainer is fed.

    Args:
        train: tokenized rows.
        validation: the same for evaluation during the run, or None.
        test: the same for the end, or None.
        collator: makes a batch of rows.
        counts: what became of the rows, by part.
        notes: what the user should know.
    """

    train: "Dataset"
    validation: "Dataset | None"
    test: "Dataset | None"
    collator: Collator
    counts: Mapping[str, RowCounts]
    notes: tuple[str, ...] = ()

    def sample(self, rows: int = 4) -> dict[str, "Tensor"]:
        """A small batch without labels, for comparing logits."""
        import torch

        chosen = [self.train[row] for row in range(min(rows, len(self.train)))]
        keys = ("input_ids", "labels", "attention_mask", "token_type_ids")
        batch = self.collator([{key: row[key] for key in keys if key in row} for row in chosen])
        return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key != "labels"}


def prepare_classification(
    config: RunConfig, data: RunData, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Prepared:
    """Tokens and integer labels, padded a batch at a time.

    Raises:
        ConfigError: a `max_length` above what the model can read.
    """
    from transformers import DataCollatorWithPadding

    model.config.pad_token_id = tokenizer.pad_token_id
    limit, notes = length_limit(config, model)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    counts: dict[str, RowCounts] = {}
    tokens: dict[str, Dataset | None] = {}
    for part, rows in parts.items():
        tokens[part] = None
        if rows is not None:
            tokens[part], counts[part] = _tokenized(rows, tokenizer, limit)
    train = tokens["train"]
    assert train is not None
    return Prepared(
        train=train,
        validation=tokens["validation"],
        test=tokens["test"],
        collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=config.data.pad_to_multiple_of),
        counts=counts,
        notes=(*notes, *count_notes(counts, limit)),
    )


def _tokenized(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", limit: int) -> "tuple[Dataset, RowCounts]":
    """Rows as tokens, and how many were cut."""

    def encode(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        # Cutting after the fact would lose the closing special token, so long rows are tokenized again.
        full = tokenizer(list(batch["text"]))
        longer = [len(ids) > limit for ids in full["input_ids"]]
        if any(longer):
            full = tokenizer(list(batch["text"]), truncation=True, max_length=limit)
        return {**full, "labels": list(batch["label"]), "truncated": longer}

    tokens = rows.map(encode, batched=True, remove_columns=rows.column_names)
    counts = RowCounts(rows=len(rows), truncated=sum(tokens["truncated"]), dropped=0, labels=len(rows))
    return tokens.remove_columns("truncated"), counts


def length_limit(config: RunConfig, model: "PreTrainedModel") -> tuple[int, tuple[str, ...]]:
    """`max_length`, held to the positions of the model where they are a table of fixed size.

    Raises:
        ConfigError: a `max_length` that was asked for and is above them.
    """
    asked = config.data.max_length
    embedded = [
        module.num_embeddings - (module.padding_idx + 1 if module.padding_idx is not None else 0)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions")
        and hasattr(module, "num_embeddings")
    ]
    limit = min(embedded, default=asked)
    if limit >= asked:
        return asked, ()
    if "max_length" in config.data.model_fields_set:
        raise ConfigError(f"data.max_length: {asked} is more than the {limit} positions of {config.model}")
    return limit, (f"rows are read up to the model's {limit} positions",)


def count_notes(counts: Mapping[str, RowCounts], limit: int) -> list[str]:
    """Words about rows that did not come through whole."""
    notes = []
    for part, count in counts.items():
        if count.truncated:
            share = count.truncated / count.rows
            notes.append(f"{part}: {count.truncated:,} of {count.rows:,} rows ({share:.1%}) cut at {limit} tokens")
        if count.dropped:
            notes.append(f"{part}: {count.dropped:,} of {count.rows:,} rows left out, none of their labels counts")
    return notes


def calibration_batches(prepared: Prepared, batch_size: int, seed: int) -> Any:
    """A loader over global batches in the order in which training will see them, the same in every process.

    Args:
        prepared: the rows.
        batch_size: rows a batch, as a device trains on.
        seed: the run's seed.
    """
    import torch
    from accelerate.data_loader import SeedableRandomSampler  # type: ignore[import-untyped, unused-ignore]
    from torch.utils.data import DataLoader

    # Trainer's loader is given this sampler by accelerate; made here, because its own is split over processes.
    sampler = SeedableRandomSampler(prepared.train, generator=torch.Generator(), data_seed=seed)
    return DataLoader(prepared.train, batch_size=batch_size, sampler=sampler, collate_fn=prepared.collator)


def scoring_batches(rows: "Dataset", collator: Collator, count: int, seed: int) -> list[dict[str, Any]]:
    """Batches of validation rows for a schedule that scores, drawn by the seed, the same in every process.

    Args:
        rows: tokenized validation rows.
        collator: makes a batch of rows.
        count: how many rows; all where there are fewer.
        seed: the run's seed.
    """
    import torch

    from rankwise.linalg.random import generator

    drawn = torch.randperm(len(rows), generator=generator(seed, "scored validation rows"))[:count].tolist()
    chosen = [rows[index] for index in drawn]
    return [collator(chosen[start : start + SCORED_AT_ONCE]) for start in range(0, len(chosen), SCORED_AT_ONCE)]


def refuse_unlabeled(counts: Mapping[str, RowCounts], config: RunConfig) -> None:
    """Refuses a part in which no label counts.

    Raises:
        DataError: every label is masked.
    """
    for part, count in counts.items():
        if count.labels == 0:
            raise DataError(
                f"data.{part}: every label of the {count.rows} rows is masked, so there is nothing to learn: "
                f"completions are empty or prompts alone fill data.max_length ({config.data.max_length} tokens)"
            )
