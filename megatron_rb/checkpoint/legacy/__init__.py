"""Reads Megatron's legacy `torch` checkpoints of Qwen2.5-VL, one file per tensor- and pipeline-parallel rank."""
