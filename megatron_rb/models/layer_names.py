"""Which implementation of the layers is taken, by name; imports none of them."""

from __future__ import annotations

LAYERS = ("auto", "local", "transformer_engine")


def layers_taken(choice: str, dtype: str, has_transformer_engine: bool) -> str:
    """`local` or `transformer_engine`, for a value of `model.layers`.

    Raises:
        ValueError: Transformer Engine is asked for where it is not installed, or for fp32, which its attention over
            packed sequences does not compute.
    """
    if choice not in LAYERS:
        raise ValueError(f"model.layers is '{choice}'; use auto, local or transformer_engine")
    if choice == "transformer_engine":
        if not has_transformer_engine:
            raise ValueError(
                "model.layers=transformer_engine, but Transformer Engine is not installed; install it or use auto"
            )
        if dtype == "fp32":
            raise ValueError(
                "model.layers=transformer_engine with model.dtype=fp32: Transformer Engine has no attention over "
                "packed sequences in fp32; use model.dtype=bf16 or model.layers=local"
            )
    return "local" if choice == "local" or not has_transformer_engine or dtype == "fp32" else "transformer_engine"
