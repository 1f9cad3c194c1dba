"""`rb bench train`: what a training step costs, on a stated mix of samples, and how two results compare."""
