"""Places of parameters in saved optimizer buffers."""

from megatron_rb.checkpoint.legacy.buffers import Slot, buffer_layouts


def layouts(sizes: list[int], bucket_sizes: list[int | None], shared: int | None = None):
    slots = [Slot(size, number == shared) for number, size in enumerate(sizes)]
    return list(buffer_layouts(slots, bucket_sizes))


def test_parameters_lie_in_reverse_order_and_start_at_multiples_of_64():
    assert layouts([10, 70, 64], [None])[0] == ((192, 64, 0), 202)


def test_a_full_bucket_loses_its_padding():
    assert layouts([10, 70, 64], [100])[0] == ((134, 64, 0), 144)


def test_a_shared_embedding_has_its_own_bucket():
    # The padding in front of the embedding is that of a parameter, so it stays.
    assert layouts([30, 10, 20], [None], shared=0)[0] == ((128, 64, 0), 158)
    assert layouts([30, 10, 20], [None], shared=1)[0] == ((74, 64, 0), 104)


def test_equal_layouts_are_tried_once():
    assert len(layouts([64, 128], [None, 1 << 30])) == 1
