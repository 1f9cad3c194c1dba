"""How tensors are shared out among files."""

import torch

from megatron_rb.checkpoint.conversion.stream import Target, TensorRows, plan_files
from megatron_rb.checkpoint.storage.tensors import StoredTensor


def targets(*sizes: int) -> list[Target]:
    made = []
    for number, size in enumerate(sizes):
        stored = StoredTensor(f"t{number}", torch.uint8, (size,), ())
        made.append(Target(stored.name, torch.uint8, (size,), (TensorRows.whole(stored),)))
    return made


def sizes_of(files: list[list[Target]]) -> list[int]:
    return [sum(target.num_bytes for target in file) for file in files]


def test_files_are_as_few_as_the_limit_allows_and_of_about_one_size():
    assert sizes_of(plan_files(targets(*[10] * 15), max_bytes=100)) == [80, 70]


def test_no_file_is_above_the_limit_unless_one_tensor_is():
    plan = plan_files(targets(5, 60, 60, 5, 200, 5), max_bytes=100)
    assert [t.name for file in plan for t in file] == [f"t{n}" for n in range(6)]
    assert all(size <= 100 or len(file) == 1 for size, file in zip(sizes_of(plan), plan, strict=True))


def test_all_tensors_fit_one_file_below_the_limit():
    assert sizes_of(plan_files(targets(3, 4, 5), max_bytes=100)) == [12]
