"""Which packages a rehearsal stands in for, and that nothing of it stays."""

import sys
from importlib import metadata

import pytest

from megatron_rb.kernels.dispatch import distribution_exists
from megatron_rb.platform.base import module_exists, package_exists
from megatron_rb.rehearsal.packages.catalogue import PACKAGES, packages_asked
from megatron_rb.rehearsal.packages.finder import stand_in_for_packages
from megatron_rb.rehearsal.stand_ins import StandIns


def test_words_name_packages_and_releases_and_the_last_release_where_none_is_named():
    last = {package.name: package.releases[-1] for package in PACKAGES}
    assert packages_asked("flash_attn=2.8.1, flash_attn_4") == {
        "flash_attn": "2.8.1",
        "flash_attn_4": last["flash_attn_4"],
    }
    assert packages_asked("none") == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("apex", "--with names 'apex'; there are stand-ins for flash_attn"),
        ("flash_attn=1.0", "flash_attn 1.0 cannot be stood in for, only 2.8.0"),
        ("flash_attn,flash_attn=2.8.3", "--with names flash_attn twice"),
    ],
)
def test_wrong_words_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        packages_asked(words)


def test_what_is_installed_here_is_stood_in_for_without_a_word(tmp_path, monkeypatch):
    assert packages_asked("") == {}
    install(tmp_path, "flash_attn", "2.8.2+cu12torch2.8")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages_asked("") == {"flash_attn": "2.8.2"}
    install(tmp_path, "flash_attn_4", "4.0.0b1")
    with pytest.raises(ValueError, match="rehearse --with flash_attn_4="):
        packages_asked("")


def install(folder, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise ImportError('libcudart.so.12 is not there')\n")


def test_packages_are_there_inside_and_not_after():
    modules = set(sys.modules)
    with StandIns() as stand_ins:
        stand_in_for_packages(stand_ins, {"flash_attn": "2.8.3", "flash_attn_4": "4.0.0b27"})
        import flash_attn
        from flash_attn.cute import flash_attn_varlen_func

        assert flash_attn.__version__ == metadata.version("flash-attn") == "2.8.3"
        assert distribution_exists("flash-attn-4") and package_exists("flash_attn")
        assert flash_attn_varlen_func is not flash_attn.flash_attn_varlen_func
    assert not module_exists("flash_attn") and not distribution_exists("flash-attn-4")
    assert {name for name in set(sys.modules) - modules if "flash_attn" in name.partition(".")[0]} == set()


def test_flash_attn_4_alone_leaves_a_folder():
    with StandIns() as stand_ins:
        stand_in_for_packages(stand_ins, {"flash_attn_4": "4.0.0b27"})
        assert module_exists("flash_attn.cute") and not package_exists("flash_attn")


def test_an_installed_package_that_is_not_asked_for_is_not_found(tmp_path, monkeypatch):
    install(tmp_path, "flash_attn", "2.8.3")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_exists("flash_attn") and distribution_exists("flash-attn")
    with StandIns() as stand_ins:
        stand_in_for_packages(stand_ins, {})
        assert not package_exists("flash_attn") and not distribution_exists("flash-attn")
    assert package_exists("flash_attn") and distribution_exists("flash-attn")
