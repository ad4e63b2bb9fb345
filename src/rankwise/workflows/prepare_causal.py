"""Causal language modeling: TRL formats, tokenizes, masks and packs; rankwise counts what came through."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError, RankwiseError
from rankwise.workflows.arguments import sft_arguments
from rankwise.workflows.config import RunConfig
from rankwise.workflows.data import RunData
from rankwise.workflows.prepare import Collator, Prepared, RowCounts, count_notes, length_limit, refuse_unlabeled

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["prepare_causal"]

_Parts = Mapping[str, "Dataset"]


def prepare_causal(
    config: RunConfig, data: RunData, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Prepared:
    """Tokens and labels by TRL's own preparation, so that SFTTrainer trains on exactly these rows.

    The rows are prepared twice: whole, to count what `max_length` will cut and mask, and then as they are trained on.

    Raises:
        DataError: rows that TRL cannot format, or whose labels are all masked.
    """
    if config.data.chat_template_path is not None:
        tokenizer.chat_template = _template(config.data.chat_template_path)
    _require_template(data, tokenizer, config)
    limit, notes = length_limit(config, model)
    rows = {
        part: rows
        for part, rows in (("train", data.train), ("validation", data.validation), ("test", data.test))
        if rows is not None
    }
    whole, _ = _by_trl(config, model, tokenizer, rows, max_length=None, packing=False, eval_packing=False)
    _refuse_masked(config, whole, rows, limit)
    made, collator = _by_trl(config, model, tokenizer, whole, max_length=limit)
    used = {part: _with_labels(tokens) for part, tokens in made.items()}
    counts = {part: _counts(config, rows[part], whole[part], used[part], limit) for part in rows}
    refuse_unlabeled(counts, config)
    return Prepared(
        train=used["train"],
        validation=used.get("validation"),
        test=used.get("test"),
        collator=collator,
        counts=counts,
        notes=(*notes, *count_notes(counts, limit)),
    )


def _by_trl(
    config: RunConfig, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: _Parts, **keys: Any
) -> "tuple[dict[str, Dataset], Collator]":
    """What an SFTTrainer on the bare model makes of the rows; the model keeps none of the trainer's changes."""
    from trl.trainer.sft_trainer import SFTTrainer

    held = {part: part_rows for part, part_rows in rows.items() if part != "train"}
    forward = model.__dict__.get("forward")
    try:
        trainer = SFTTrainer(
            model=model,
            # A trainer makes its output folder; the run's is not to be touched before everything is checked.
            args=sft_arguments(config, evaluates=False, output_dir=tempfile.gettempdir(), **keys),
            train_dataset=rows["train"],
            eval_dataset=held or None,
            processing_class=tokenizer,
        )
    except RankwiseError:
        raise
    except Exception as error:
        raise DataError(f"data: TRL cannot prepare the rows: {' '.join(str(error).split())}") from error
    finally:
        # SFTTrainer lays a forward of its own over the model's; the last trainer of the run lays it again.
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
    evaluated: Any = trainer.eval_dataset if held else {}
    prepared: dict[str, Dataset] = {"train": trainer.train_dataset, **evaluated}
    return prepared, trainer.data_collator


def _template(path: str) -> str:
    """A chat template from a Jinja file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template_path: cannot read {path} ({error}); give a Jinja file") from error


def _require_template(data: RunData, tokenizer: "PreTrainedTokenizerBase", config: RunConfig) -> None:
    """Conversations need a chat template; without one transformers would fail inside."""
    conversational = data.form == "messages" or (
        data.form == "prompt-completion" and isinstance(data.train[0]["prompt"], list)
    )
    if conversational and not tokenizer.chat_template:
        raise DataError(
            f"data.train: the rows are conversations, and the tokenizer of {config.model} has no chat template; set "
            "data.chat_template_path to a Jinja file, use an instruction-tuned model, or give 'text' or 'prompt' and "
            "'completion' as plain text"
        )


def _refuse_masked(config: RunConfig, whole: _Parts, rows: _Parts, limit: int) -> None:
    """Refuses a part whose labels are all masked within `limit`, before TRL would fail on an empty set."""
    counts = {
        part: RowCounts(rows=len(rows[part]), truncated=0, dropped=0, labels=_label_count(tokens, limit))
        for part, tokens in whole.items()
    }
    refuse_unlabeled(counts, config)


def _counts(config: RunConfig, rows: "Dataset", whole: "Dataset", used: "Dataset", limit: int) -> RowCounts:
    packed = len(used) != len(whole) and "seq_lengths" in used.column_names
    return RowCounts(
        rows=len(rows),
        truncated=_longer(whole, limit) if config.data.packing_strategy != "bfd_split" or not packed else 0,
        dropped=0 if packed else len(whole) - len(used),
        labels=_label_count(used, None),
    )


def _longer(tokens: "Dataset", limit: int) -> int:
    """Rows with more than `limit` tokens."""
    import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]

    lengths = pc.list_value_length(_column(tokens, "input_ids"))
    return int(pc.sum(pc.greater(lengths, limit)).as_py() or 0)


def _with_labels(tokens: "Dataset") -> "Dataset":
    """The rows in which at least one label counts; TRL leaves out only those whose every label is masked."""
    counted = _labels_by_row(tokens, None)
    return tokens if counted.all() else tokens.select(counted.nonzero()[0])


def _label_count(tokens: "Dataset", limit: int | None) -> int:
    """Labels that the loss sees within the first `limit` tokens of each row."""
    return int(_labels_by_row(tokens, limit).sum())


def _labels_by_row(tokens: "Dataset", limit: int | None) -> "NDArray[np.int64]":
    """Labels that the loss sees, by row: a token is predicted from those before it, so no document's first counts."""
    import numpy as np
    import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]

    labels = _column(tokens, "labels")
    if limit is not None:
        labels = pc.list_slice(labels, 0, limit)
    rows = pc.list_value_length(labels).to_numpy()
    packed = "seq_lengths" in tokens.column_names
    documents = pc.list_flatten(_column(tokens, "seq_lengths")).to_numpy() if packed else rows
    seen = pc.list_flatten(labels).to_numpy() != -100
    starts = np.cumsum(documents) - documents
    seen[starts[documents > 0]] = False
    before = np.concatenate(([0], np.cumsum(seen)))
    ends = np.cumsum(rows)
    by_row: NDArray[np.int64] = before[ends] - before[ends - rows]
    return by_row


def _column(tokens: "Dataset", name: str) -> Any:
    return tokens.with_format("arrow")[:][name]
