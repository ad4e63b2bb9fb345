"""Does the place of a LoRA budget matter? MiniLM, WordNet supersenses, a frozen random head; see docs/benchmark.md."""
