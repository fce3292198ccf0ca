"""Packaging. Exact versions live in requirements/*.lock; the names here are what each part imports."""

from setuptools import find_packages, setup

setup(
    name="megatron-vespo",
    version="0.1.0",
    description="Stable off-policy reinforcement learning of MoE language models: Megatron-Core, SGLang, Ray, VESPO",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_vespo", "megatron_vespo.*"]),
    package_data={"megatron_vespo.observability": ["*.html", "*.css", "*.js"]},
    install_requires=[
        "torch>=2.9",
        "megatron-core==0.16.1",
        "psutil",
        "xxhash",
        "einops",
        "ray>=2.50",
        "transformers>=5",
        "tokenizers",
        "safetensors",
        "numpy",
        "pydantic>=2.10",
        "PyYAML",
        "typer",
        "rich",
        "aiohttp",
        "msgspec",
        "pybase64",
        "reasoning-gym",
        "math-verify",
        "pyarrow",
        "tensorboard",
        "jinja2",
        "markupsafe",
    ],
    extras_require={
        "wandb": ["wandb>=0.31"],
        "cuda": ["sglang==0.5.23", "transformer-engine[pytorch]"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "pyright", "trl", "mkdocs-material"],
    },
    entry_points={
        "console_scripts": ["megatron-vespo = megatron_vespo.cli:main"],
        "sglang.srt.plugins": ["megatron_vespo = megatron_vespo.rollout.sglang_on_cpu:register"],
    },
)
