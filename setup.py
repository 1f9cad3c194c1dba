"""Package metadata: the core needs no vendor package; each accelerator brings its own extra."""

from setuptools import find_namespace_packages, setup

CUDA = ["transformer-engine[pytorch]>=2.0", "flash-attn>=2.7", "triton>=3.1", "liger-kernel>=0.8.5"]
MUSA = ["torch_musa>=2.7"]
# From 17 on PyAV tells the turn of a frame and the key frames that a file lists.
VIDEO = ["av>=17"]
# On a machine without a GPU Triton's interpreter and its assemblers test the kernels, Liger-Kernel's among them.
KERNEL_TESTS = ["triton; sys_platform == 'linux'", "liger-kernel>=0.8.5; sys_platform == 'linux'"]
PYTEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6"]
# `make docs` makes a site of docs/; nothing else needs it.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]
# What adapters are held against.
PEFT = ["peft>=0.17", "accelerate>=1.0"]
DEV = [*VIDEO, *KERNEL_TESTS, *PYTEST, *PEFT, "ruff>=0.6", "mypy>=1.11"]

setup(
    name="megatron-rb",
    version="0.1.0",
    description="Hybrid-parallel training of the RoboBrain embodied vision-language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["megatron_rb", "megatron_rb.*"]),
    package_data={
        "megatron_rb.conf": ["**/*.yaml", "*.yaml"],
        "megatron_rb.launch": ["*.j2"],
        "megatron_rb.platform": ["*.cpp"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "tokenizers",
        "xxhash>=3.0",
        "hydra-core>=1.3,<1.4",
        "safetensors>=0.4",
        "numpy",
        "pillow",
        "psutil",
        "typer>=0.12",
        "rich",
        "tensorboard",
        "matplotlib",
        "sentencepiece",
        "Jinja2",
    ],
    extras_require={"cuda": CUDA, "musa": MUSA, "video": VIDEO, "docs": DOCS, "dev": DEV},
    entry_points={
        "console_scripts": ["rb = megatron_rb.cli:main"],
        "megatron_rb.platforms": [
            "cpu = megatron_rb.platform.cpu:CpuPlatform",
            "cuda = megatron_rb.platform.cuda:CudaPlatform",
            "musa = megatron_rb.platform.musa:MusaPlatform",
        ],
    },
)
