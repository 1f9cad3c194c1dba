"""Which megatron-core is taken, whether it is supported, and what its user is told."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rb.platform import mcore_version
from megatron_rb.platform.mcore_version import SUPPORTED, found_version, is_supported, version_fault

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2", "0.17.0rc0", "0.17.1", "0.18.2", "0.19.0", "0.19.1+d96d76c"])
def test_listed_releases_their_patches_and_candidates_are_supported(version):
    assert is_supported(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc0", "1.16.1"])
def test_no_other_release_is_supported(version):
    assert not is_supported(version)


def test_an_unsupported_release_is_told_with_what_is_supported_and_the_way_out(monkeypatch):
    monkeypatch.setattr(mcore_version, "found_version", lambda: "0.20.0")
    fault = version_fault()
    assert fault.startswith(f"megatron-core 0.20.0 of {mcore_version.found_folder()} is not supported")
    assert ", ".join(SUPPORTED) in fault and "pip install 'megatron-core==0.16.1'" in fault


def test_what_runs_here_is_supported():
    assert version_fault() == "" and is_supported(found_version())


def test_a_machine_without_megatron_core_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(mcore_version, "found_folder", lambda: None)
    assert version_fault() == "megatron-core is not installed; run `pip install 'megatron-core==0.16.1'`"


def test_the_folder_that_an_import_takes_counts_and_not_what_pip_has_installed(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('it is not to be imported')")
    (core / "package_info.py").write_text("__version__ = '0.99.0'")
    program = (
        "from megatron_rb.platform import get_platform\n"
        "from megatron_rb.platform.mcore_shims import install_mcore_shims\n"
        "try: install_mcore_shims(get_platform('cpu'))\n"
        "except ValueError as error: print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.startswith(f"megatron-core 0.99.0 of {core} is not supported"), run.stderr


def test_the_list_the_package_and_the_documentation_name_the_same_releases():
    setup, platforms = (REPOSITORY / name for name in ("setup.py", "docs/platforms.md"))
    major, minor = SUPPORTED[-1].split(".")[:2]
    assert re.findall(r'"(megatron-core[^"]*)"', setup.read_text()) == [
        f"megatron-core>={SUPPORTED[0]},<{major}.{int(minor) + 1}"
    ]
    rows = re.findall(r"^\| megatron-core (0\.\d+[.\d]*) \|", platforms.read_text(), re.MULTILINE)
    assert tuple(rows) == SUPPORTED


def test_the_release_that_users_are_told_to_install_is_the_one_that_the_tests_run_with():
    pinned = re.search(r"^megatron-core==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == mcore_version.ON_THE_INDEX
