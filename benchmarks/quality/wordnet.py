"""WordNet glosses with their 45 supersenses, from Debian's `wordnet-base`; nothing of it is kept in the repository."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLASSES", "Rows", "Split", "load", "split"]

FOLDER = Path("/usr/share/wordnet")
CLASSES = 45
ROWS = 117_659
_PARTS = ("noun", "verb", "adj", "adv")

Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Split:
    """Disjoint rows; the first 2,000 test rows and the validation rows are those of the first figures."""

    train: Rows
    validation: Rows
    test: Rows
    sha256: str


def load(folder: Path = FOLDER) -> Rows:
    """All glosses (up to the first example) with the number of their lexicographer file, shuffled by a fixed seed."""
    rows: Rows = []
    for part in _PARTS:
        file = folder / f"data.{part}"
        if not file.is_file():
            raise SystemExit(f"{file} is missing: install WordNet 3.0 first (apt-get install wordnet-base)")
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the license notice
                fields, _, gloss = line.partition("|")
                rows.append((gloss.strip().split('; "')[0].strip(), int(fields.split()[1])))
    if len(rows) != ROWS:
        raise SystemExit(f"{folder} holds {len(rows)} glosses, WordNet 3.0 has {ROWS}: another version is installed")
    random.Random(0).shuffle(rows)
    return rows


def split(rows: Rows) -> Split:
    """30,000 rows to train on, 1,000 to choose the learning rate, 10,000 to report."""
    digest = hashlib.sha256("\n".join(f"{label} {text}" for text, label in rows).encode()).hexdigest()
    return Split(
        train=rows[3_000:33_000], validation=rows[2_000:3_000], test=rows[:2_000] + rows[33_000:41_000], sha256=digest
    )
