"""An interpreter whose torch is a CPU build: this one, or that of an environment made for it in the cache."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from megatron_rb.platform.guard import cache_folder

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
Run = Callable[[Sequence[str]], None]


def run_command(words: Sequence[str]) -> None:
    """Run a command; its output is shown.

    Raises:
        ValueError: it failed.
    """
    if subprocess.run(list(words)).returncode:
        raise ValueError(f"`{' '.join(words)}` failed; make an environment with a CPU build of torch by hand")


def cpu_interpreter(agree: Callable[[str], bool], run: Run = run_command) -> str:
    """Path of a Python with the packages of this one and a CPU build of the same torch.

    Only torch is installed into the new environment; all other packages are those of this one.

    Args:
        agree: asked once, with what is about to be made, before it is made.

    Raises:
        ValueError: it was not agreed to, or it cannot be made.
    """
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return sys.executable
    version = metadata.version("torch").partition("+")[0]
    folder = cache_folder() / f"cpu-torch-{version}-python-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.is_file():
        return str(python)
    if not agree(f"a rehearsal needs a CPU build of torch {version} (about 200 MB); make {folder} for it"):
        raise ValueError(
            f"a rehearsal needs a CPU build of torch {version}, this one is built for CUDA {torch.version.cuda}; agree "
            f"to make {folder} with --make-environment, or rehearse where such a build is installed"
        )
    _make(folder, python, version, run)
    ready.touch()
    return str(python)


def _make(folder: Path, python: Path, version: str, run: Run) -> None:
    run([sys.executable, "-m", "venv", "--clear", str(folder)])
    run([str(python), "-m", "pip", "install", "--no-deps", f"torch=={version}", "--index-url", CPU_WHEELS])
    # After the packages of its own, so that its torch comes first.
    inside = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / inside / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    roots = [sysconfig.get_path("purelib"), str(Path(__file__).parents[2])]
    (site / "beside.pth").write_text("\n".join(dict.fromkeys(roots)) + "\n", encoding="utf-8")
