"""Which implementation of the layers a model is built from."""

from __future__ import annotations

from megatron_rb.models.layers import LayerProvider, LocalLayers


def select_layers(choice: str, dtype: str, has_transformer_engine: bool) -> LayerProvider:
    """The provider for `model.layers`: `local`, `transformer_engine` or `auto`.

    Raises:
        ValueError: Transformer Engine is asked for where it is not installed, or for fp32, which its attention over
            packed sequences does not compute.
    """
    if choice not in ("auto", "local", "transformer_engine"):
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
    if choice == "local" or not has_transformer_engine or dtype == "fp32":
        return LocalLayers()
    # Imported here because the package is optional.
    from megatron_rb.models.transformer_engine import TransformerEngineLayers

    return TransformerEngineLayers()
