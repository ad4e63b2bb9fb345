"""The row that export compares logits on."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from rankwise.training.sample import TOKENS, Sample
from tests.support.models import tiny_llama


def test_padding_is_left_out_and_the_hook_goes_after_one_pass():
    model = tiny_llama()
    sample = Sample(model)
    sample.listen()
    tokens, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    # Trainer passes the scalar that the loss is divided by.
    model(input_ids=tokens, attention_mask=mask, labels=tokens, num_items_in_batch=torch.tensor(6.0))
    assert sample.batch is not None
    assert sample.batch.keys() == {"input_ids"}
    assert sample.batch["input_ids"].tolist() == [[5, 6]]
    assert not model._forward_hooks
    sample.listen()
    assert not model._forward_hooks


def test_a_long_row_is_cut():
    sample = Sample(model := tiny_llama())
    sample.listen()
    model(input_ids=torch.ones(1, TOKENS + 9, dtype=torch.long))
    assert sample.batch is not None
    assert sample.batch["input_ids"].shape == (1, TOKENS)


def test_an_encoder_decoder_keeps_what_its_decoder_needs():
    config = T5Config(vocab_size=32, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    sample = Sample(model := T5ForConditionalGeneration(config))
    sample.listen()
    model(input_ids=torch.ones(3, 5, dtype=torch.long), labels=torch.ones(3, 4, dtype=torch.long))
    assert sample.batch is not None
    assert {name: tuple(value.shape) for name, value in sample.batch.items()} == {"input_ids": (1, 5), "labels": (1, 4)}


def test_a_call_without_names_keeps_nothing():
    sample = Sample(model := tiny_llama())
    sample.listen()
    model(torch.ones(1, 4, dtype=torch.long))
    assert sample.batch is None
