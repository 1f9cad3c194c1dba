"""`model.layers` by name: what is taken is known before any implementation is imported."""

import pytest

from megatron_rb.models.layer_names import LAYERS, layers_taken


@pytest.mark.parametrize("choice", LAYERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("installed", [True, False])
def test_transformer_engine_is_taken_only_where_it_is_there_and_can_compute(choice, dtype, installed):
    possible = installed and dtype == "bf16"
    if choice == "transformer_engine" and not possible:
        with pytest.raises(ValueError, match="model.layers=transformer_engine"):
            layers_taken(choice, dtype, installed)
    else:
        assert layers_taken(choice, dtype, installed) == (
            "transformer_engine" if possible and choice != "local" else "local"
        )
