"""The benchmark models of all documents: random float32 Llamas built from configs, and their batches."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["causal_batches", "llama_4x256", "llama_8x768"]


def llama_8x768(seed: int = 0) -> LlamaForCausalLM:
    """Eight layers of hidden 768, MLP 2,048, 12 heads / 4 kv, vocabulary 4,096."""
    return _llama(seed, layers=8, hidden=768, mlp=2048, heads=12, kv_heads=4, vocabulary=4096)


def llama_4x256(seed: int = 0) -> LlamaForCausalLM:
    """Four layers of hidden 256, MLP 688, 4 heads / 2 kv, vocabulary 1,024."""
    return _llama(seed, layers=4, hidden=256, mlp=688, heads=4, kv_heads=2, vocabulary=1024)


def causal_batches(
    model: LlamaForCausalLM, count: int, *, rows: int = 2, length: int = 128, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, every token a label."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(3, model.config.vocab_size, (rows, length), generator=rng)
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return batches


def _llama(
    seed: int, *, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocabulary: int
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
