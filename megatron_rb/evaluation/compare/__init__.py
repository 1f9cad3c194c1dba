"""Do two runs agree, and where do two platforms part? Curves of whole runs, and tensors inside one step."""
