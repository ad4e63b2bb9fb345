"""Tiny random models with their tokenizers on disk, and small learnable data: seconds a run, nothing from a hub."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rankwise.workflows.config import RunConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(44)), "red", "blue"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"

MakeConfig = Callable[..., RunConfig]


def make_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", WORDS.index("[CLS]"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", cls_token="[CLS]"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def make_model(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    model: PreTrainedModel
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**size, **heads, max_position_embeddings=64)).bert
    else:
        model = LlamaForCausalLM(LlamaConfig(**size, **heads, num_key_value_heads=2, max_position_embeddings=256))
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    make_model("bert", folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model("llama", folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def colored(rows: int, start: int = 0) -> list[dict[str, str]]:
    """Rows whose label is the color word that they hold."""
    return [
        {"text": f"w{n % 7} {color} w{n % 11} w{n % 5}", "label": color}
        for n in range(start, start + rows)
        for color in [("red", "blue")[n * 7 % 3 % 2]]
    ]


@pytest.fixture
def classification(tmp_path: Path, bert: Path) -> MakeConfig:
    """A run file over the tiny BERT; keywords replace top-level keys, `data` and `training` are merged."""
    train = write_rows(tmp_path / "train.jsonl", colored(48))
    test = write_rows(tmp_path / "test.jsonl", colored(12, start=100))

    def make(**changes: Any) -> RunConfig:
        data = {"train": train, "test": test, "max_length": 16} | changes.pop("data", {})
        training = {"learning_rate": 5e-3, "max_steps": 6, "save_steps": 2, "logging_steps": 1}
        values = {
            "model": str(bert),
            "task": "classification",
            "r": 2,
            "gora": {"r_min": 1, "r_max": 4},
            "calibration": {"batches": 2},
            "output_dir": str(tmp_path / "run"),
            "data": data,
            "training": training | changes.pop("training", {}),
        }
        return RunConfig.model_validate(values | changes)

    return make


@pytest.fixture
def causal(tmp_path: Path, llama: Path) -> MakeConfig:
    """The same over the tiny Llama."""
    train = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in colored(48)])

    def make(**changes: Any) -> RunConfig:
        data = {"train": train, "validation": 0.25, "max_length": 16} | changes.pop("data", {})
        training = {"learning_rate": 5e-3, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
        values = {
            "model": str(llama),
            "r": 2,
            "gora": {"r_min": 1, "r_max": 4},
            "calibration": {"batches": 2},
            "output_dir": str(tmp_path / "run"),
            "data": data,
            "training": training | changes.pop("training", {}),
        }
        return RunConfig.model_validate(values | changes)

    return make
