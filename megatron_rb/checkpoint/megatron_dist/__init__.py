"""Reads the weights of `torch_dist` checkpoints that other megatron-core stacks write for the same models."""
