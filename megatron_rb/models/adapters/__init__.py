"""Low-rank adapters (LoRA) beside the frozen linears of a model."""
