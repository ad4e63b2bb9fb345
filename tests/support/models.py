"""Tiny random models built from configs: seeded, offline, float32, in evaluation mode, built in milliseconds."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

__all__ = [
    "VOCABULARY",
    "causal_batch",
    "classification_batch",
    "tiny_bert_classifier",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_t5",
]

VOCABULARY = 64


def _seeded(build: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    return model.eval()


def tiny_llama(
    seed: int = 0, *, hidden: int = 32, layers: int = 2, tied: bool = False, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama with grouped-query attention: q_proj [32, 32], k_proj and v_proj [16, 32], up_proj [48, 32]."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(LlamaForCausalLM, config, seed).to(dtype)


def tiny_bert_classifier(seed: int = 0, *, labels: int = 3, layers: int = 2) -> BertForSequenceClassification:
    """A BERT with a pooler and a `classifier` head; linear leaf names query, key, value, dense, classifier."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _seeded(BertForSequenceClassification, config, seed)


def tiny_gpt2(seed: int = 0, *, layers: int = 2) -> GPT2LMHeadModel:
    """A GPT-2 with Conv1D layers (c_attn [96, 32], c_proj, c_fc) and a tied output head."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=48,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(GPT2LMHeadModel, config, seed)


def tiny_t5(seed: int = 0, *, layers: int = 2) -> T5ForConditionalGeneration:
    """A T5 encoder and decoder; linear leaf names q, k, v, o, wi, wo, lm_head."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _seeded(T5ForConditionalGeneration, config, seed)


def causal_batch(seed: int = 0, *, rows: int = 2, length: int = 12, masked: int = 0) -> dict[str, torch.Tensor]:
    """Token ids, an all-ones attention mask and labels whose first `masked` positions of each row are -100."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=rng)
    labels = tokens.clone()
    labels[:, :masked] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def classification_batch(seed: int = 0, *, rows: int = 4, length: int = 12, labels: int = 3) -> dict[str, torch.Tensor]:
    """Token ids, an all-ones attention mask and one label a row."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=rng)
    classes = torch.randint(0, labels, (rows,), generator=rng)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": classes}
