"""Optimizers over pairs of lora_A and lora_B: discovery, stacking, state, and one engine that runs a step rule."""
