"""Which implementation of the layers a model is built from."""

from __future__ import annotations

from megatron_rb.models.layer_names import layers_taken
from megatron_rb.models.layers import LayerProvider, LocalLayers


def select_layers(choice: str, dtype: str, has_transformer_engine: bool) -> LayerProvider:
    """The provider for `model.layers`: `local`, `transformer_engine` or `auto`.

    Raises:
        ValueError: as `layers_taken`.
    """
    if layers_taken(choice, dtype, has_transformer_engine) == "local":
        return LocalLayers()
    # Imported here because the package is optional.
    from megatron_rb.models.transformer_engine import TransformerEngineLayers

    return TransformerEngineLayers()
