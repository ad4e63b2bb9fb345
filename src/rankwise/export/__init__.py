"""From a trained adapter to one plain, verified LoRA folder."""
