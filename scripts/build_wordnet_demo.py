"""Builds the demo's data from Debian's `wordnet-base` 3.0: glosses and the supersense they belong to.

    apt-get install wordnet-base
    python scripts/build_wordnet_demo.py            # writes src/rankwise/workflows/demo_data/
    python scripts/build_wordnet_demo.py --check    # compares a rebuild with what is shipped

A row is the gloss up to its first example and the name of its lexicographer file (45 of them). All 117,659 glosses are
shuffled with a fixed seed; the first 2,000 are the test rows, the next 8,000 that do not repeat a test gloss word for
word are the training rows. The output is the same bytes at every rebuild: the hashes of the rows stand below.
"""

import argparse
import hashlib
import json
import lzma
import random
import sys
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
OUTPUT = Path(__file__).resolve().parent.parent / "src" / "rankwise" / "workflows" / "demo_data"
SEED = 0
TEST_ROWS = 2_000
TRAIN_ROWS = 8_000
SYNSETS = 117_659

# fmt: off
# The 45 lexicographer files in the order of their numbers, from WordNet's manual page lexnames(5WN).
SUPERSENSES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)
# fmt: on

SHA256 = {
    "train.jsonl": "225de9875a717faa9acd85053ced5b01c3743157967cb43b0c122c093dbd2e4b",
    "test.jsonl": "a265500559506dc10f9cd47c3996249f90502d0288786475815c2cb265220629",
}
"""Of the rows before compression, so that another version of the compressor does not matter."""


def glosses(folder: Path) -> list[tuple[str, str]]:
    """All (gloss, supersense) pairs, nouns first, in the order of the files."""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license notice at the head of each file
                continue
            synset, gloss = line.split(" | ", 1)
            number = int(synset.split(" ", 2)[1])
            rows.append((gloss.split('; "', 1)[0].strip(), SUPERSENSES[number]))
    if len(rows) != SYNSETS:
        raise SystemExit(f"{folder}: found {len(rows)} synsets, WordNet 3.0 has {SYNSETS}; install wordnet-base 1:3.0")
    return rows


def split(rows: list[tuple[str, str]]) -> dict[str, bytes]:
    """File name -> its rows as JSON lines."""
    rows = [row for row in rows if row[0]]
    random.Random(SEED).shuffle(rows)
    test = rows[:TEST_ROWS]
    seen = {gloss for gloss, _ in test}
    train = [row for row in rows[TEST_ROWS:] if row[0] not in seen][:TRAIN_ROWS]
    missing = set(SUPERSENSES) - {label for _, label in train}
    if missing:
        raise SystemExit(f"no training row for {sorted(missing)}: take more rows")
    return {"train.jsonl": _lines(train), "test.jsonl": _lines(test)}


def _lines(rows: list[tuple[str, str]]) -> bytes:
    return "".join(
        json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows
    ).encode()


def main() -> None:
    """Builds, compares with the hashes, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wordnet", type=Path, default=WORDNET, help="the folder that holds data.noun and its siblings"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write")
    parser.add_argument("--check", action="store_true", help="compare with the files in --output, write nothing")
    arguments = parser.parse_args()
    for name, content in split(glosses(arguments.wordnet)).items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != SHA256[name]:
            raise SystemExit(f"{name}: SHA-256 of the rows is {digest}, expected {SHA256[name]}")
        target = arguments.output / f"{name}.xz"
        if arguments.check:
            if lzma.decompress(target.read_bytes()) != content:
                raise SystemExit(f"{target}: differs from a rebuild")
        else:
            arguments.output.mkdir(parents=True, exist_ok=True)
            target.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        print(f"{target.name}: {content.count(10)} rows, SHA-256 of the rows {digest}", file=sys.stderr)


if __name__ == "__main__":
    main()
