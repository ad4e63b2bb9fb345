"""The rows of a run: read, split, and told apart by their columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import DataError
from rankwise.linalg.random import derived_seed
from rankwise.workflows.config import RunConfig
from rankwise.workflows.data_files import DataSource, Part, quiet_datasets, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Form", "RunData", "load_data"]

Form = Literal["text", "prompt-completion", "messages", "text-label"]
_WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
_STRINGS = ("string", "large_string")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunData:
    """The rows of one run.

    Args:
        train: the rows that are learned.
        validation: rows for evaluation during the run, or None.
        test: rows for one evaluation at the end, or None.
        form: which columns carry the content.
        label_names: the labels in the order of their numbers (classification).
        sources: part -> where it came from.
        notes: what the user should know.
    """

    train: "Dataset"
    validation: "Dataset | None"
    test: "Dataset | None"
    form: Form
    label_names: tuple[str, ...]
    sources: Mapping[Part, DataSource]
    notes: tuple[str, ...] = ()


def load_data(config: RunConfig) -> RunData:
    """Reads everything that `data:` names.

    Args:
        config: the run file; its seed decides which rows a validation share takes.

    Returns:
        The rows with the needed columns only; for classification `text` and an integer `label`.

    Raises:
        DataError: data that is missing, empty, damaged, or without the columns or labels it needs.
    """
    data = config.data
    parts: dict[Part, Dataset] = {}
    sources: dict[Part, DataSource] = {}
    named: dict[Part, str] = {"train": data.train}
    if isinstance(data.validation, str):
        named["validation"] = data.validation
    if data.test is not None:
        named["test"] = data.test
    for part, source in named.items():
        parts[part], sources[part] = read_rows(source, part, data.subset)
    form = _form(config, parts["train"])
    with quiet_datasets():
        for part in parts:
            parts[part] = _content(config, form, part, parts[part])
        label_names: tuple[str, ...] = ()
        if form == "text-label":
            parts, label_names = _numbered(config, parts)
        if isinstance(data.validation, float):
            parts |= _set_aside(parts["train"], data.validation, config.seed)
            train = sources["train"]
            rows = len(parts["validation"])
            sources["validation"] = DataSource(
                source=f"{data.validation:g} of {train.source}", rows=rows, sha256=train.sha256, columns=train.columns
            )
    return RunData(
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts.get("test"),
        form=form,
        label_names=label_names,
        sources=sources,
    )


def _form(config: RunConfig, rows: "Dataset") -> Form:
    """Which columns carry the content, by the training rows."""
    columns = set(rows.column_names)
    text, label = config.data.dataset_text_field, config.data.label_field
    seen = ", ".join(rows.column_names)
    if config.task == "classification":
        missing = [name for name in (text, label) if name not in columns]
        if missing:
            raise DataError(
                f"data.train: no column {' and no column '.join(repr(name) for name in missing)} in "
                f"{config.data.train}; it has {seen}. Classification needs '{text}' and '{label}'; "
                f"data.dataset_text_field and data.label_field name other columns"
            )
        return "text-label"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion"
    if "messages" in columns:
        return "messages"
    if text in columns:
        return "text"
    raise DataError(
        f"data.train: {config.data.train} has the columns {seen}; causal-lm needs '{text}', or 'prompt' and "
        f"'completion', or 'messages'. data.dataset_text_field names another text column"
    )


def _content(config: RunConfig, form: Form, part: str, rows: "Dataset") -> "Dataset":
    """The needed columns only, each checked for missing and wrong values."""
    text, label = config.data.dataset_text_field, config.data.label_field
    needed = {
        "text": [text],
        "prompt-completion": ["prompt", "completion"],
        "messages": ["messages"],
        "text-label": [text, label],
    }[form]
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise DataError(
            f"data.{part}: no column {', '.join(repr(name) for name in missing)}; it has "
            f"{', '.join(rows.column_names)}, and the training rows are read as {' + '.join(needed)}"
        )
    for name in needed:
        _check_column(rows, part, name, form, label)
    optional = [
        name for name in ("tools", "chat_template_kwargs") if name in rows.column_names and form != "text-label"
    ]
    return rows.select_columns([*needed, *optional])


def _check_column(rows: "Dataset", part: str, name: str, form: Form, label: str) -> None:
    """Refuses a column with empty cells or of a kind that it cannot have."""
    column = rows.data.column(name)
    if column.null_count:
        first = next(row for row, value in enumerate(rows[name], start=1) if value is None)
        raise DataError(f"data.{part}: {column.null_count} rows have no '{name}', the first is row {first}")
    kind = getattr(rows.features[name], "dtype", type(rows.features[name]).__name__)
    if form == "text-label" and name == label:
        allowed: tuple[str, ...] = (*_WHOLE, *_STRINGS)
    elif form == "messages" or (form == "prompt-completion" and kind not in _STRINGS):
        first_value = rows[0][name]
        if isinstance(first_value, list) and all(isinstance(turn, dict) and "role" in turn for turn in first_value):
            return
        allowed = ("a list of {role, content}",) if form == "messages" else ("string", "a list of {role, content}")
        raise DataError(f"data.{part}: column '{name}' holds {kind}; expected {' or '.join(allowed)}")
    else:
        allowed = _STRINGS
    if kind not in allowed:
        expected = "text or whole numbers" if name == label else "text"
        raise DataError(f"data.{part}: column '{name}' holds {kind}; expected {expected}")


def _numbered(config: RunConfig, parts: "dict[Part, Dataset]") -> "tuple[dict[Part, Dataset], tuple[str, ...]]":
    """`text` and an integer `label`, numbered in the order of the training rows' sorted labels."""
    text, label = config.data.dataset_text_field, config.data.label_field
    feature = parts["train"].features[label]
    given: list[str] | None = getattr(feature, "names", None)
    values: list[Any] = list(range(len(given))) if given else sorted(set(parts["train"].unique(label)))
    names = tuple(given) if given else tuple(str(value) for value in values)
    if len(values) < 2:
        raise DataError(f"data.train: every row has the label {names[0]!r}; classification needs at least two labels")
    numbers = {value: number for number, value in enumerate(values)}
    numbered: dict[Part, Dataset] = {}
    for part, rows in parts.items():
        unknown = sorted(set(rows.unique(label)) - set(numbers), key=str)
        if unknown:
            shown = ", ".join(repr(value) for value in unknown[:5])
            raise DataError(f"data.{part}: labels that no training row has: {shown} ({len(unknown)} in all)")
        content = {"text": list(rows[text]), "label": [numbers[value] for value in rows[label]]}
        numbered[part] = type(rows).from_dict(content)
    return numbered, names


def _set_aside(rows: "Dataset", share: float, seed: int) -> "dict[Part, Dataset]":
    """A seeded share of the training rows for validation, the rest for training."""
    held = round(share * len(rows))
    if held == 0 or held == len(rows):
        raise DataError(f"data.validation: {share:g} of {len(rows)} rows is {held} rows; give another share or a file")
    split = rows.train_test_split(test_size=held, seed=derived_seed(seed, "validation-share") % 2**32)
    return {"train": split["train"], "validation": split["test"]}
