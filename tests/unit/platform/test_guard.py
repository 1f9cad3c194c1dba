"""The library that a rehearsal loads before torch: where it is kept, and whether the loader takes it."""

import os
import shutil
import subprocess
import sys

import pytest

from megatron_rb.platform import guard
from megatron_rb.platform.guard import COMPILERS, guard_library, preloading

needs_compiler = pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A library in a folder with a blank in its name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("a cache")))
        return guard_library()


@needs_compiler
@pytest.mark.timeout(120)
def test_a_cache_with_a_blank_in_its_path_is_loaded_from(compiled):
    code = "print(open('/proc/self/maps').read())"
    environment = os.environ | preloading(compiled)
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert str(compiled) in said.stdout and not said.stderr


@needs_compiler
@pytest.mark.timeout(120)
def test_a_library_that_cannot_be_loaded_is_made_again(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stale = tmp_path / guard.CACHE_FOLDER / compiled.name
    stale.parent.mkdir()
    stale.write_text("of a disk that was full")

    def compile_again(library, flags):
        shutil.copy(compiled, library)

    monkeypatch.setattr(guard, "_compile", compile_again)
    assert guard_library() == stale and stale.read_bytes() == compiled.read_bytes()


def test_another_environment_with_the_same_torch_has_a_library_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(guard, "_compile", lambda library, flags: None)
    monkeypatch.setattr(guard, "_trouble_of", lambda library: "")
    here = guard_library()
    monkeypatch.setattr(guard, "_torch_folder", lambda: tmp_path / "elsewhere" / "torch")
    assert guard_library() != here


def test_a_cache_that_cannot_be_made_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(guard, "_compiler", lambda: "c++")
    with pytest.raises(ValueError, match=r"the cache .*file/megatron-rb cannot be made \(Not a directory\); name an"):
        guard_library()


def test_a_path_that_the_loader_would_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its folder has a : or ; in it; set XDG_CACHE_HOME"):
        preloading(tmp_path / "a:b" / "guard.so")
