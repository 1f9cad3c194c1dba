"""Pickles and torch files are read without running them, and every tensor is found at its place in the file."""

import argparse
import collections
import enum
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rb.checkpoint.storage.restricted import (
    Opaque,
    UnsafePickle,
    damaged_records,
    read_torch_file,
    restricted_loads,
)
from megatron_rb.checkpoint.storage.tensors import DamagedFile, StoredTensor, open_files


def values(stored: StoredTensor) -> torch.Tensor:
    stored.check_cover()
    with open_files() as files:
        return files.read(stored)


def round_trip(tmp_path: Path, value: object) -> object:
    torch.save(value, tmp_path / "file.pt")
    return read_torch_file(tmp_path / "file.pt").tree


@pytest.fixture
def vendor_enum(monkeypatch: pytest.MonkeyPatch) -> type[enum.Enum]:
    """An enum that lives in a module of megatron while it is pickled."""
    module = types.ModuleType("megatron.stand_in_enums")
    kind = enum.Enum("AttnBackend", {"flash": 1, "fused": 2}, module=module.__name__)
    module.AttnBackend = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return kind


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.uint16,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_is_found_at_its_place(tmp_path: Path, dtype: torch.dtype):
    tensor = (torch.arange(24).reshape(4, 6) % 2).to(dtype)
    stored = round_trip(tmp_path, {"a": torch.ones(3), "b": tensor})["b"]
    assert stored.dtype == dtype
    assert torch.equal(values(stored).view(torch.uint8), tensor.view(torch.uint8))


VIEWS = {
    "transposed": lambda base: base.transpose(0, 2),
    "last two transposed": lambda base: base.transpose(1, 2),
    "columns": lambda base: base[:, :, 1:3],
    "middle": lambda base: base[:, 1:],
    "rows with an offset": lambda base: base[2:],
    "every second": lambda base: base[::2, :, ::2],
    "expanded": lambda base: base[:1].expand(3, -1, -1),
    "scalar": lambda base: base[1, 2, 3],
    "empty": lambda base: base[:0],
    "permuted": lambda base: base.permute(2, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_one_storage_come_out_right(tmp_path: Path, view):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tree = round_trip(tmp_path, [base, view(base)])
    assert tree[1].shape == tuple(view(base).shape)
    assert torch.equal(values(tree[0]), base)
    assert torch.equal(values(tree[1]), view(base))


def test_contiguous_tensor_is_one_piece(tmp_path: Path):
    assert len(round_trip(tmp_path, torch.zeros(4, 5, 6)[1:]).chunks) == 1


def test_file_inside_a_file_has_absolute_places(tmp_path: Path):
    inner = io.BytesIO()
    tensor = torch.randn(5, 3)
    torch.save(tensor, inner)
    path = tmp_path / "outer.distcp"
    path.write_bytes(b"x" * 37 + inner.getvalue() + b"y" * 5000)
    stored = read_torch_file(path, 37, len(inner.getvalue())).tree
    assert torch.equal(values(stored), tensor)


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path: Path):
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    parameter.sequence_parallel = True
    main = torch.randn(4)
    main.tensor_model_parallel = True
    tree = round_trip(tmp_path, {"parameter": parameter, "main": main})
    assert torch.equal(values(tree["parameter"]), parameter.detach())
    assert torch.equal(values(tree["main"]), main)


def test_plain_values_survive(tmp_path: Path):
    value = {
        "set": {1, 2},
        "frozen": frozenset([3]),
        "complex": 1 + 2j,
        "bytes": b"a\xff",
        "none": b"",
        "big": 1 << 80,
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {"a": [1]}),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "scalar": np.float32(1.5),
        "bytearray": bytearray(b"\xfex"),
        "range": range(3),
    }
    tree = round_trip(tmp_path, value)
    assert np.array_equal(tree.pop("array"), value.pop("array"))
    assert tree == value
    assert round_trip(tmp_path, Path("a/b.txt")) == "a/b.txt"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_protocol_is_read(protocol: int):
    value = {"set": {1, 2}, "bytes": b"\xff", "text": np.str_("x"), "array": np.arange(3), "buffer": io.BytesIO(b"12")}
    tree = restricted_loads(pickle.dumps(value, protocol), "here")
    assert tree["buffer"].read() == b"12"
    assert np.array_equal(tree["array"], value["array"])
    assert {name: tree[name] for name in ("set", "bytes", "text")} == {"set": {1, 2}, "bytes": b"\xff", "text": "x"}


def test_namespace_is_inert_and_readable(tmp_path: Path):
    args = round_trip(tmp_path, {"args": argparse.Namespace(num_layers=4, params_dtype=torch.bfloat16)})["args"]
    assert isinstance(args, Opaque)
    assert args.type_name == "argparse.Namespace"
    assert (args.num_layers, args.params_dtype) == (4, torch.bfloat16)
    assert getattr(args, "unheard_of", None) is None


def test_foreign_enum_is_a_stand_in(vendor_enum: type[enum.Enum]):
    member = restricted_loads(pickle.dumps(vendor_enum.fused), "here")
    assert (member.type_name, member.args) == ("megatron.stand_in_enums.AttnBackend", (2,))


def test_enum_written_with_getattr_is_a_stand_in():
    member = restricted_loads(
        b"\x80\x02c__builtin__\ngetattr\ncmegatron.core.enums\nModelType\nX\x03\x00\x00\x00abc\x86R.", ""
    )
    assert (member.type_name, member.args) == ("megatron.core.enums.ModelType", ("abc",))


def test_device_objects_and_storage_tags_are_reported(tmp_path: Path):
    torch.save({"device": torch.device("cuda", 2), "tensor": torch.zeros(1)}, tmp_path / "file.pt")
    file = read_torch_file(tmp_path / "file.pt")
    assert file.device_tags == {"cuda:2", "cpu"}
    assert file.tree["device"].args == ("cuda", 2)


class Hostile:
    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "os.system": lambda marker: Hostile(os.system, (f"touch {marker}",)),
    "builtins.eval": lambda marker: Hostile(eval, (f"open({marker!r}, 'w')",)),
    "builtins.exec": lambda marker: Hostile(exec, (f"open({marker!r}, 'w')",)),
    "builtins.open": lambda marker: Hostile(open, (marker, "w")),
    "getattr of a module": lambda _: Hostile(getattr, (Hostile(__import__, ("os",)), "system")),
    "getattr of an allowed class": lambda _: Hostile(getattr, (collections.OrderedDict, "__init__")),
    "endless bytes": lambda _: Hostile(bytearray, (1 << 60,)),
    "endless list": lambda _: Hostile(list, (range(1 << 60),)),
    "a size of text": lambda _: Hostile(torch.Size, ("abc",)),
    "endless array": lambda _: Hostile(np.ndarray, ((1 << 60,),)),
    "array of objects": lambda _: Hostile(np.dtype, ("O8",)),
    "storage that is a function": lambda _: Hostile(
        torch._utils._rebuild_tensor_v2, (torch.Size, 0, (1,), (1,), False, None)
    ),
    "a class of the standard library": lambda _: Hostile(argparse.ArgumentParser, ()),
    "torch.load": lambda marker: Hostile(torch.load, (marker,)),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, make):
    marker = tmp_path / "marker"
    hostile = make(str(marker))
    with pytest.raises(UnsafePickle, match="evil.pkl"):
        restricted_loads(pickle.dumps(hostile, 4), "evil.pkl")
    torch.save({"model": hostile}, tmp_path / "evil.pt")
    with pytest.raises(UnsafePickle, match="evil.pt"):
        read_torch_file(tmp_path / "evil.pt")
    assert not marker.exists()


RAW = {
    "global with a dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1eOrderedDict.__init__.__globals__\x93.",
    "protocol 0 system": b"cos\nsystem\n(S'true'\ntR.",
    "call of a tag": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "new attribute of a constructor": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
    "new attribute of a stand-in class": b"\x80\x02cmegatron.a\nB\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",
    "instance of an allowed class": b"\x80\x02cnumpy\nndarray\n)\x81.",
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
def test_forged_bytes_are_refused(data: bytes):
    with pytest.raises((UnsafePickle, DamagedFile), match="evil"):
        restricted_loads(data, "evil.pkl")


def test_pickle_cannot_point_a_tensor_at_another_file(tmp_path: Path):
    storage = torch.zeros(2)._typed_storage()
    rebuilt = Hostile(torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (1,), False, None), {"chunks": ()})
    torch.save({"a": rebuilt}, tmp_path / "evil.pt")
    with pytest.raises(UnsafePickle, match="place of a tensor"):
        read_torch_file(tmp_path / "evil.pt")


def test_error_names_file_global_and_way_out():
    with pytest.raises(UnsafePickle, match=r"evil.pkl is not read: .* posix.system, .* save it again"):
        restricted_loads(pickle.dumps(Hostile(os.system, ("true",))), "evil.pkl")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_truncated_file_is_damaged(tmp_path: Path, kept: float):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.randn(500), "b": list(range(100))}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DamagedFile, match="file.pt"):
        read_torch_file(path)


def test_truncated_pickle_is_damaged():
    data = pickle.dumps({"a": [1, 2, 3]})
    for length in range(len(data)):
        with pytest.raises(DamagedFile, match="here"):
            restricted_loads(data[:length], "here")


def test_file_beyond_the_end_is_damaged(tmp_path: Path):
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(DamagedFile, match="ends at byte 3"):
        read_torch_file(tmp_path / "short", 1, 10)


def test_format_before_zip_is_refused(tmp_path: Path):
    torch.save(torch.zeros(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DamagedFile, match=r"old.pt .* before 1.6"):
        read_torch_file(tmp_path / "old.pt")


def rewritten(source: Path, target: Path, change, **options) -> Path:
    """A copy of a zip file whose records pass through `change(name, data)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return target


def test_other_byte_order_is_refused(tmp_path: Path):
    torch.save(torch.zeros(2), tmp_path / "a.pt")
    swapped = rewritten(
        tmp_path / "a.pt", tmp_path / "b.pt", lambda name, data: b"big" if "byteorder" in name else data
    )
    with pytest.raises(DamagedFile, match="byte order 'big'"):
        read_torch_file(swapped)


def test_compressed_records_are_refused(tmp_path: Path):
    torch.save(torch.zeros(2), tmp_path / "a.pt")
    packed = rewritten(tmp_path / "a.pt", tmp_path / "b.pt", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedFile, match="compressed"):
        read_torch_file(packed)


def test_storage_shorter_than_its_tensor_is_damaged(tmp_path: Path):
    torch.save(torch.zeros(8), tmp_path / "a.pt")
    short = rewritten(tmp_path / "a.pt", tmp_path / "b.pt", lambda name, data: data[:4] if "data/0" in name else data)
    with pytest.raises(DamagedFile, match=r"has 4 bytes.* needs 32"):
        read_torch_file(short)


def test_flipped_byte_in_a_tensor_is_found(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(8), "b": torch.ones(8)}, path)
    file = read_torch_file(path)
    assert list(damaged_records(file)) == []
    record = next(record for record in file.records if record.name.endswith("data/1"))
    data = bytearray(path.read_bytes())
    data[record.position] ^= 1
    path.write_bytes(data)
    assert list(damaged_records(read_torch_file(path))) == [record.name]


def test_flipped_byte_in_the_pickle_is_damaged(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"name": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes().replace(b"name", b"nbme", 1))
    with pytest.raises(DamagedFile, match=r"a\.pt"):
        read_torch_file(path)


def test_distributed_checkpoint_metadata_is_read(tmp_path: Path):
    """`.metadata`, the tensors of a `.distcp` file, and its byte objects."""
    import torch.distributed.checkpoint as dcp

    tensor = torch.randn(6, 4)
    dcp.save({"weight": tensor, "extra": {"seed": 7}}, checkpoint_id=tmp_path / "ck", no_dist=True)
    metadata = restricted_loads((tmp_path / "ck" / ".metadata").read_bytes(), "ck/.metadata")
    size = metadata.state_dict_metadata["weight"].size
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    read = {
        name: read_torch_file(tmp_path / "ck" / info.relative_path, info.offset, info.length).tree
        for name, info in places.items()
    }
    assert metadata.type_name == "torch.distributed.checkpoint.metadata.Metadata"
    assert size == tensor.shape
    assert torch.equal(values(read["weight"]), tensor)
    assert read["extra.seed" if "extra.seed" in read else "extra"] in (7, {"seed": 7})


def test_record_names_may_be_padded(tmp_path: Path):
    """torch aligns its storages with extra fields whose length varies from record to record."""
    torch.save([torch.full((n,), float(n)) for n in range(1, 40)], tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    assert len({struct.unpack("<H", data[at + 28 : at + 30]) for at in _headers(data)}) > 1
    for n, stored in enumerate(read_torch_file(tmp_path / "a.pt").tree, start=1):
        assert torch.equal(values(stored), torch.full((n,), float(n)))


def _headers(data: bytes) -> list[int]:
    found, at = [], data.find(b"PK\x03\x04")
    while at >= 0:
        found.append(at)
        at = data.find(b"PK\x03\x04", at + 4)
    return found
