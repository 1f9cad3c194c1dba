"""Between checkpoint formats: from file to file in blocks, on the CPU, without torch.distributed or megatron-core."""
