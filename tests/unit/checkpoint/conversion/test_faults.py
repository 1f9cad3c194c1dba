"""Whatever goes wrong, nothing half-written is published, the source stays as it is, the message says what to do."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rb.bench.convert import cut_depth, write_random_model
from megatron_rb.checkpoint.conversion.export_hf import export_checkpoint
from megatron_rb.checkpoint.conversion.import_hf import import_folder
from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.storage.checksum import checksum
from megatron_rb.shapes.published import CONFIGS
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untied model in several shards."""
    root = tmp_path_factory.mktemp("model")
    import_folder(write_model(root / "hf", "qwen3_vl", 0), root / "ckpt")
    export_checkpoint(root / "ckpt", root / "sharded", max_shard_size="400KB")
    return root


@pytest.fixture
def sharded(model, tmp_path):
    """A copy of the folder that a test may spoil; without the manifest, as folders from elsewhere are."""
    folder = shutil.copytree(model / "sharded", tmp_path / "sharded")
    (folder / "manifest.json").unlink()
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: checksum(path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()}


def refused(words: str, source: Path, out: Path, **options) -> None:
    before = fingerprint(source)
    with pytest.raises(ValueError, match=words):
        import_folder(source, out, **options)
    assert not out.exists()
    assert fingerprint(source) == before


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_truncated_shard(sharded, tmp_path):
    victim = shards(sharded)[1]
    victim.write_bytes(victim.read_bytes()[:-1000])
    refused(f"{victim.name} is cut off: it has .* bytes, its header speaks of", sharded, tmp_path / "out")


def test_shard_whose_header_is_gone(sharded, tmp_path):
    victim = shards(sharded)[0]
    victim.write_bytes(struct.pack("<Q", 1 << 60) + victim.read_bytes()[8:])
    refused(f"{victim.name} is no safetensors file", sharded, tmp_path / "out")


def test_missing_shard(sharded, tmp_path):
    victim = shards(sharded)[2]
    victim.unlink()
    refused(f"lacks {victim.name}", sharded, tmp_path / "out")


def test_shard_of_another_model(sharded, tmp_path):
    other = tmp_path / "other"
    import_folder(write_model(tmp_path / "hf2", "qwen3_vl", 2), tmp_path / "ckpt2")
    export_checkpoint(tmp_path / "ckpt2", other, max_shard_size="400KB")
    shutil.copy(shards(other)[1], shards(sharded)[1])
    refused("lies in .* and in|do not lie where|has the shape", sharded, tmp_path / "out")


def test_tensor_in_two_shards(sharded, tmp_path):
    first, second = shards(sharded)[:2]
    name, value = next(iter(load_file(first).items()))
    rewrite(second, lambda tensors: tensors.update({name: value}))
    refused(f"{name} lies in {first.name} and in {second.name}", sharded, tmp_path / "out")


def test_flipped_byte_is_found_by_the_manifest_of_the_source(model, tmp_path):
    folder = shutil.copytree(model / "sharded", tmp_path / "sharded")
    victim = shards(folder)[1]
    content = bytearray(victim.read_bytes())
    position = random.randrange(len(content) // 2, len(content))
    content[position] ^= 1 << random.randrange(8)
    victim.write_bytes(content)
    refused(f"in {victim.name} is not what the manifest.json beside it says", folder, tmp_path / "out")


def test_flipped_byte_is_found_by_verify(model, sharded):
    victim = shards(sharded)[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    comparison = verify(model / "ckpt", sharded)
    assert [difference.what for difference in comparison.differences] == ["bytes"]
    assert comparison.differences[0].name in load_file(victim)


def test_unknown_tensor_names_the_nearest_and_can_be_dropped(sharded, tmp_path):
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.visual.blocks.0.norm1.wieght"] = shards(sharded)[0].name
    index_path.write_text(json.dumps(index))
    rewrite(shards(sharded)[0], lambda tensors: tensors.update({"model.visual.blocks.0.norm1.wieght": torch.zeros(3)}))
    words = "wieght, nearest known is model.visual.blocks.0.norm1.weight.*--allow-drop"
    refused(words, sharded, tmp_path / "out")
    summary = import_folder(sharded, tmp_path / "out", allow_drop=["model.visual.blocks.0.norm1.wieght"])
    assert summary.notes == ("model.visual.blocks.0.norm1.wieght was left out: dropped as asked for with --allow-drop",)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["dropped"]) == ["model.visual.blocks.0.norm1.wieght"]


def test_tensor_to_drop_that_is_not_there(sharded, tmp_path):
    refused("--allow-drop nothing: .* has no such tensor", sharded, tmp_path / "out", allow_drop=["nothing"])


def test_config_that_disagrees_with_the_tensors(sharded, tmp_path):
    config = json.loads((sharded / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 104
    (sharded / "config.json").write_text(json.dumps(config))
    refused(r"has the shape \[.*96.*\] in .*; its config.json says \[.*104", sharded, tmp_path / "out")


def test_another_family(sharded, tmp_path):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    refused("model_type 'llama'", sharded, tmp_path / "out")


def test_tied_head_that_is_not_the_embedding(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 1)
    embedding = load_file(folder / "model.safetensors")["model.language_model.embed_tokens.weight"]
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert import_folder(folder, tmp_path / "same").notes == (
        "lm_head.weight was left out: a copy of the tied embedding",
    )
    rewrite(folder / "model.safetensors", lambda tensors: tensors["lm_head.weight"].add_(1))
    refused("says tie_word_embeddings, but its lm_head.weight is not", folder, tmp_path / "other")


def test_nan_is_reported_and_kept_with_its_payload(sharded, tmp_path):
    name = "model.language_model.norm.weight"
    victim = next(path for path in shards(sharded) if name in load_file(path))
    payload = torch.tensor([0x7FC01234, -0x3FEDCC], dtype=torch.int32).view(torch.float32)
    rewrite(victim, lambda tensors: tensors[name][:2].copy_(payload))
    assert load_file(victim)[name][:2].isnan().all()
    summary = import_folder(sharded, tmp_path / "out")
    assert summary.notes == ("language.head.norm.weight holds 2 NaN, kept as they are",)
    comparison = verify(sharded, tmp_path / "out")
    assert comparison.equal and comparison.nans == 2
    rewrite(victim, lambda tensors: tensors[name].view(torch.int32)[:1].add_(1))
    assert [d.name for d in verify(sharded, tmp_path / "out").differences] == [name]


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_infinity_is_reported_and_kept(sharded, tmp_path, dtype):
    name = "model.language_model.norm.weight"
    victim = next(path for path in shards(sharded) if name in load_file(path))
    rewrite(victim, lambda tensors: tensors[name][:3].copy_(torch.tensor([float("inf"), float("-inf"), 3.4e38])))
    summary = import_folder(sharded, tmp_path / "out", dtype=dtype)
    count = 2 if dtype == "keep" else 3  # the largest fp32 values are beyond those of bf16
    assert f"language.head.norm.weight holds {count} infinite values, kept as they are" in summary.notes
    exported = export_checkpoint(tmp_path / "out", tmp_path / "exported")
    assert exported.notes == (f"{name} holds {count} infinite values, kept as they are",)


def test_change_of_type_is_reported(model, tmp_path):
    summary = import_folder(model / "hf", tmp_path / "bf16", dtype="bf16")
    assert summary.dtypes == ("bfloat16",) and "the change of type altered" in summary.notes[0]
    assert import_folder(model / "hf", tmp_path / "fp32", dtype="fp32").notes == ()
    export_checkpoint(tmp_path / "bf16", tmp_path / "exact", dtype="fp32")
    manifest = json.loads((tmp_path / "exact" / "manifest.json").read_text())
    assert {entry["cast"]["changed"] for entry in manifest["tensors"].values()} == {0}


def test_types_that_cannot_be_joined(sharded, tmp_path):
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    victim = next(path for path in shards(sharded) if name in load_file(path))
    rewrite(victim, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    refused("is made of tensors of different types", sharded, tmp_path / "out")


def test_pickle_that_runs_a_program(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3_vl", 0)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    torch.save(tensors, folder / "pytorch_model.bin")
    assert import_folder(folder, tmp_path / "good").num_tensors > 100
    torch.save(tensors | {"model.hostile": Hostile()}, folder / "pytorch_model.bin")
    refused("pytorch_model.bin.*(posix|os).system", folder, tmp_path / "bad")
    assert not (tmp_path / "harmed").exists()


def wide_model(folder: Path) -> Path:
    """A folder of a few hundred megabytes, so that a conversion takes a moment."""
    write_random_model(folder, cut_depth(CONFIGS["RoboBrain2.0-3B"], 2))
    return folder


def start_import(source: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_rb.cli", "convert", "import", "--hf", str(source), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_writing_and_started_again(tmp_path, signum):
    source, out = wide_model(tmp_path / "hf"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    process = start_import(source, out)
    while not partial.is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.4))
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    if process.returncode == 0:  # it was faster
        assert out.is_dir() and not partial.exists()
        return
    assert not out.exists() and partial.is_dir()
    if signum == signal.SIGTERM:
        assert "run the same command again" in output
    assert start_import(source, out).wait(timeout=120) == 0
    assert out.is_dir() and not partial.exists()
    assert verify(source, out).equal


def test_finished_files_are_kept(model, sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import files, import_hf

    monkeypatch.setattr(import_hf, "FILE_BYTES", 200_000)
    real, written = files.write_dist_file, []

    def fails_at_the_fifth(path, targets, job):
        written.append(path.name)
        if len(written) == 5:
            # Files are written side by side: fail when the journal has one of the first four.
            deadline = time.monotonic() + 30
            while len(journal_file.read_text().splitlines()) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise OSError(28, "No space left on device")
        return real(path, targets, job)

    journal_file = tmp_path / "out.partial" / "journal.jsonl"
    monkeypatch.setattr(import_hf, "write_dist_file", fails_at_the_fifth)
    with pytest.raises(ValueError, match="is full; free some space and run the same command again"):
        import_folder(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    journal = journal_file.read_text().splitlines()
    kept = {json.loads(line)["file"] for line in journal[1:]}
    assert kept
    again = []
    monkeypatch.setattr(
        import_hf, "write_dist_file", lambda p, targets, job: (again.append(p.name), real(p, targets, job))[1]
    )
    import_folder(sharded, tmp_path / "out")
    assert again and not kept & set(again)
    assert verify(model / "ckpt", tmp_path / "out").equal


def test_finished_file_that_was_damaged_meanwhile_is_found(sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import import_hf

    monkeypatch.setattr(import_hf, "write_dist_metadata", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        import_folder(sharded, tmp_path / "out")
    monkeypatch.undo()
    victim = next((tmp_path / "out.partial").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match="read back from the new folder differ|does not hold|is damaged"):
        import_folder(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert import_folder(sharded, tmp_path / "out").num_tensors > 100


def test_another_conversion_in_the_same_place(model, sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import import_hf

    monkeypatch.setattr(import_hf, "write_dist_metadata", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        import_folder(sharded, tmp_path / "out")
    with pytest.raises(ValueError, match="holds the beginning of another conversion .*delete it, or choose another"):
        import_folder(sharded, tmp_path / "out", dtype="bf16")


def test_two_conversions_at_once(sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import import_hf

    def meanwhile(*arguments):
        with pytest.raises(ValueError, match="another process is converting into"):
            import_folder(sharded, tmp_path / "out")
        raise KeyboardInterrupt

    monkeypatch.setattr(import_hf, "write_dist_metadata", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        import_folder(sharded, tmp_path / "out")


def test_too_small_a_disk_is_told_before_anything_is_written(sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import workspace

    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: free)
    refused("has 0.00 GB free, 0.07 GB are needed", sharded, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", folder]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_that_fills_up(small_disk, sharded, tmp_path, monkeypatch):
    from megatron_rb.checkpoint.conversion import workspace

    monkeypatch.setattr(workspace, "SPARE", 0)
    ballast = small_disk / "ballast"
    real = workspace.Workspace._check_space

    def fills_up_afterwards(self, num_bytes):
        real(self, num_bytes)
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"\0" * (free - 600_000))

    monkeypatch.setattr(workspace.Workspace, "_check_space", fills_up_afterwards)
    with pytest.raises(ValueError, match="is full; free some space and run the same command again"):
        import_folder(sharded, small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    monkeypatch.setattr(workspace.Workspace, "_check_space", real)
    import_folder(sharded, small_disk / "out")
    assert verify(sharded, small_disk / "out").equal
