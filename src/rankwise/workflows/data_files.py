"""From a path or a hub id to rows: which files are meant, what they hold, and where exactly a file is damaged."""

import contextlib
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rankwise.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DataSource", "Part", "quiet_datasets", "read_rows"]

Part = Literal["train", "validation", "test"]

_BUILDERS: Mapping[str, str] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_ALLOWED = ", ".join(_BUILDERS) + f" (also with {', '.join(_COMPRESSED)})"
_PART_WORDS: Mapping[Part, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "eval"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where rows came from, as the manifest keeps it.

    Args:
        source: the path or hub id, as the run file says it.
        rows: how many rows it gave.
        sha256: of the files' bytes, or of the hub's checksums.
        columns: the columns it has.
    """

    source: str
    rows: int
    sha256: str
    columns: tuple[str, ...]


def read_rows(source: str, part: Part, subset: str | None = None) -> "tuple[Dataset, DataSource]":
    """The rows behind one key of `data:`.

    Args:
        source: a file, a folder or a hub id.
        part: which key it stands under; picks among the files of a folder and the splits of a hub data set.
        subset: the configuration of a hub data set.

    Raises:
        DataError: nothing is there, it is empty, of an unknown kind or damaged (then with file and line).
    """
    path = Path(source)
    with quiet_datasets():
        if path.is_file():
            return _read_files(source, [path], part)
        if path.is_dir():
            return _read_files(source, _files_of(path, part), part)
        if _HUB_ID.match(source) and _suffix(path) not in _BUILDERS:
            return _read_hub(source, part, subset)
    raise DataError(f"data.{part}: {source} does not exist; give a file, a folder or a hub id")


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keeps `datasets` from drawing bars and printing what is raised anyway; its settings are put back afterwards."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _suffix(path: Path) -> str:
    """The suffix that tells the kind, below a compression's."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _files_of(folder: Path, part: Part) -> list[Path]:
    """The data files of a folder that belong to one part, told by their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _suffix(path) in _BUILDERS)
    if not files:
        raise DataError(f"data.{part}: the folder {folder} holds no data file; allowed are {_ALLOWED}")
    named = {
        name: [path for path in files if any(word in path.name.lower() for word in words)]
        for name, words in _PART_WORDS.items()
    }
    chosen = named[part]
    if not chosen and part == "train":
        chosen = [path for path in files if path not in named["validation"] and path not in named["test"]]
    if not chosen:
        seen = ", ".join(path.name for path in files)
        words = " or ".join(f"'{word}'" for word in _PART_WORDS[part])
        raise DataError(f"data.{part}: no file of {folder} has {words} in its name; it holds {seen}")
    kinds = {_BUILDERS[_suffix(path)] for path in chosen}
    if len(kinds) > 1:
        raise DataError(f"data.{part}: {folder} mixes {' and '.join(sorted(kinds))} files; name one file")
    return chosen


def _read_files(source: str, files: list[Path], part: Part) -> "tuple[Dataset, DataSource]":
    """The rows of local files of one kind."""
    import datasets

    kind = _BUILDERS.get(_suffix(files[0]))
    if kind is None:
        raise DataError(f"data.{part}: cannot read {files[0]}; allowed are {_ALLOWED}")
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"data.{part}: {path} is empty (0 bytes)")
    options: dict[str, Any] = {"sep": "\t"} if _suffix(files[0]) == ".tsv" else {}
    try:
        rows = datasets.load_dataset(kind, data_files=[str(path) for path in files], split="train", **options)
    except Exception as error:
        raise _damage(files, kind, part, error) from error
    if len(rows) == 0:
        raise DataError(f"data.{part}: {source} holds no row")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    sha256 = digest.hexdigest() if len(files) > 1 else _file_hash(files[0])
    return rows, DataSource(source=source, rows=len(rows), sha256=sha256, columns=tuple(rows.column_names))


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damage(files: list[Path], kind: str, part: Part, error: Exception) -> DataError:
    """The fault of a file that could not be read: for JSON lines the first bad line, otherwise the reader's words."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    for path in files:
        if kind == "json" and _suffix(path) != ".json":
            with contextlib.suppress(OSError, EOFError, lzma.LZMAError):
                found = _first_bad_line(path)
                if found:
                    return DataError(f"data.{part}: {path}:{found}")
    reason = " ".join(str(cause).split())
    if "corresponds to no data" in reason:  # a CSV file of one header line
        return DataError(f"data.{part}: {', '.join(map(str, files))} holds no row")
    names = ", ".join(str(path) for path in files)
    return DataError(f"data.{part}: cannot read {names}: {reason}")


def _first_bad_line(path: Path) -> str:
    """`line: fault` of the first line that is no JSON object, or nothing."""
    opener: Callable[..., IO[bytes]] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, Path.open)  # type: ignore
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            fault = _line_fault(line.rstrip())
            if fault:
                return f"{number}: {fault}"
    return ""


def _line_fault(line: bytes) -> str:
    """What is wrong with one line of JSON, or nothing."""
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not valid JSON at column {error.colno}: {error.msg}"
    return "" if isinstance(value, dict) else f"a row must be an object with named columns, got {type(value).__name__}"


def _read_hub(source: str, part: Part, subset: str | None) -> "tuple[Dataset, DataSource]":
    """The rows of a hub data set."""
    import datasets

    try:
        splits = datasets.load_dataset(source, subset)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.{part}: {source} is no file or folder here, and the hub gave no data set of that name: {reason}"
        ) from error
    name = next((word for word in _PART_WORDS[part] if word in splits), None)
    if name is None:
        raise DataError(f"data.{part}: {source} has no {part} split; it has {', '.join(splits)}")
    rows = splits[name]
    if len(rows) == 0:
        raise DataError(f"data.{part}: {source} holds no row in {name}")
    checksums = json.dumps(rows.info.download_checksums or rows.info.splits, sort_keys=True, default=str)
    sha256 = hashlib.sha256(checksums.encode()).hexdigest()
    return rows, DataSource(source=source, rows=len(rows), sha256=sha256, columns=tuple(rows.column_names))
