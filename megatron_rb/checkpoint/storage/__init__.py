"""Where tensors lie in files, and how their bytes are read and written without loading the rest; no megatron-core."""
