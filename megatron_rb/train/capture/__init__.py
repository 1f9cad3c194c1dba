"""Takes the tensors inside a step down in files: which ones, of which rows, in which form."""
