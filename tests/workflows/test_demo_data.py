"""The shipped glosses: 8,000 and 2,000 rows, 45 labels, the notice beside them, the same bytes at every rebuild."""

import hashlib
import importlib.util
import json
import lzma
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

DATA = resources.files("rankwise.workflows") / "demo_data"
SCRIPT = Path(__file__).parents[2] / "scripts" / "build_wordnet_demo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wordnet_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> bytes:
    return lzma.decompress((DATA / f"{name}.xz").read_bytes())


def test_the_shipped_rows_have_the_hashes_that_the_script_states(script: ModuleType) -> None:
    for name, digest in script.SHA256.items():
        assert hashlib.sha256(rows(name)).hexdigest() == digest


def test_rows_labels_and_the_split_are_as_documented(script: ModuleType) -> None:
    train, test = ([json.loads(line) for line in rows(name).splitlines()] for name in ("train.jsonl", "test.jsonl"))
    assert (len(train), len(test)) == (8_000, 2_000)
    assert {row["label"] for row in train} == set(script.SUPERSENSES)
    assert len(script.SUPERSENSES) == 45
    assert {row["label"] for row in test} <= set(script.SUPERSENSES)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert all(row["text"] and '; "' not in row["text"] for row in train + test)


def test_the_wordnet_notice_stands_beside_the_data_and_in_notice() -> None:
    notice = "WordNet 3.0 Copyright 2006 by Princeton University"
    for text in ((DATA / "LICENSE.WordNet.txt").read_text(), (SCRIPT.parents[1] / "NOTICE").read_text()):
        assert notice in text
        assert "THIS SOFTWARE AND DATABASE IS PROVIDED" in text


def test_a_synset_line_becomes_its_gloss_without_examples_and_its_supersense(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "  1 This software and database is being provided to you\n"
    lines = {
        "noun": head + '00001740 03 n 01 entity 0 001 ~ 0 n 0000 | that which exists; "an entity"; "another"  \n',
        "verb": head + '00001740 29 v 01 breathe 0 000 00 | draw air into, and expel out of, the lungs; "I can"\n',
        "adj": head + "00001740 00 a 01 able 0 000 | having the means; having the skill  \n",
        "adv": head + "00001740 02 r 01 a_cappella 0 000 | without accompaniment  \n",
    }
    for name, text in lines.items():
        (tmp_path / f"data.{name}").write_text(text)
    monkeypatch.setattr(script, "SYNSETS", 4)
    assert script.glosses(tmp_path) == [
        ("that which exists", "noun.Tops"),
        ("draw air into, and expel out of, the lungs", "verb.body"),
        ("having the means; having the skill", "adj.all"),
        ("without accompaniment", "adv.all"),
    ]


def test_a_rebuild_from_wordnet_gives_the_same_bytes(script: ModuleType) -> None:
    if not (script.WORDNET / "data.noun").is_file():
        pytest.skip("needs Debian's wordnet-base")
    for name, content in script.split(script.glosses(script.WORDNET)).items():
        assert content == rows(name)
