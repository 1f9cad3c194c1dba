"""Which layers of a slice are recomputed."""

from megatron_rb.models.robobrain.stage import Recompute


def test_every_slice_does_the_same_unless_it_has_a_number_of_its_own():
    assert Recompute(2, 3).of_slice(5) == Recompute(2, 3)
    assert Recompute(2, 3, vision_per_slice=(4, 0)).of_slice(0) == Recompute(4, 3)
    assert Recompute(2, 3, (4, 0), (1, -1)).of_slice(1) == Recompute(0, -1)
