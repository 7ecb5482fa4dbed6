"""Installs the packages llava, dama and eval with the console entry `dama`. Exact versions: constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dama-mllm",
    version="0.1.0",
    description="Data- and model-aware alignment of multimodal LLMs (DAMA) on the LLaVA-v1.5 layout",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llava*", "dama*", "eval*"]),
    package_data={"dama": ["*.html.jinja", "*.md.jinja"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "deepspeed>=0.19",
        "peft>=0.21",
        "open_clip_torch>=3.3",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.22",
        "protobuf>=5",
        "numpy>=1.26",
        "pillow>=11",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": ["pytest>=8", "ruff>=0.12", "mypy>=1.15", "types-tqdm"],
        "flash": ["flash-attn>=2.6"],
        "quant": ["bitsandbytes>=0.45"],
    },
    entry_points={"console_scripts": ["dama=dama.cli:main"]},
)
