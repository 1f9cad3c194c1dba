"""Whether the bytes of a source are those that were written, by the checksums that its container holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_rb.checkpoint.conversion.stream import Job
from megatron_rb.checkpoint.conversion.workspace import in_parallel
from megatron_rb.checkpoint.storage.restricted import TorchFile, damaged_records
from megatron_rb.checkpoint.storage.tensors import DamagedFile

CHECKING = "checking source"


def check_containers(files: Iterable[TorchFile], job: Job) -> None:
    """Compare the content of torch files with their CRC32; those written without one are passed over.

    Raises:
        DamagedFile: the bytes of a tensor have changed since they were written.
    """
    sizes = {id(file): sum(record.size for record in file.records if record.crc32) for file in files}
    checked = [file for file in files if sizes[id(file)]]
    job.progress.total(CHECKING, sum(sizes.values()))

    def check(file: TorchFile) -> None:
        damaged = list(damaged_records(file))
        if damaged:
            raise DamagedFile(
                f"{file.path}: {damaged[0]} of the torch file at byte {min(r.position for r in file.records)} does not "
                "have the checksum that was written with it; the file is damaged, fetch it again"
            )
        job.advance(CHECKING, sizes[id(file)])

    actions: list[Callable[[], None]] = [lambda file=file: check(file) for file in checked]  # type: ignore[misc]
    for _ in in_parallel(actions, job):
        pass
