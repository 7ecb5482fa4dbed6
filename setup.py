"""Installs the packages llava, dama and eval with the console entry `dama`. Exact versions: constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# What gradio 6.31 imports. It asks for pillow < 13, whose pixels differ from those that LLaVA's checks record; it runs
# with 13 too, so scripts/setup.sh installs gradio itself without its requirements.
GRADIO_NEEDS = [
    "brotli>=1.1",
    "fastapi>=0.115.2",
    "gradio_client==2.7.2",
    "groovy>=0.1",
    "hf-gradio>=0.4.1",
    "orjson>=3",
    "pandas<4",
    "pydub<1",
    "python-multipart>=0.0.18",
    "pytz",
    "safehttpx>=0.1.7,<0.2",
    "semantic-version>=2",
    "tomlkit<0.15",
    "uvicorn>=0.14",
]

setup(
    name="dama-mllm",
    version="0.1.0",
    description="Data- and model-aware alignment of multimodal LLMs (DAMA) on the LLaVA-v1.5 layout",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llava*", "dama*", "eval*"]),
    package_data={
        "dama.pages": ["*.jinja", "*.css"],
        "dama.prepare": ["*.json"],
        "eval.lmms_tasks": ["*.yaml"],
        "eval": ["*.html.jinja", "*.css", "*.js", "*.json"],
        "llava": ["*.json"],
        "llava.rehearsal": ["*.c"],
    },
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
        "huggingface_hub>=1",
        "numpy>=1.26",
        "openai>=3.54,<4",
        "pillow>=11",
        "pyarrow>=21",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "psutil",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "import-linter>=2.17,<3",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-tqdm",
            "selenium>=4.30",
            "bitsandbytes>=0.45",
            "trl==1.16.0",
            "datasets>=4",
            "diffusers>=0.42",
            "nltk>=3.9",
            "spacy>=3.8",
            *GRADIO_NEEDS,
        ],
        "bench": ["trl==1.16.0", "datasets>=4"],  # scripts/bench/dpo_step.py compares with it
        "serve": ["gradio>=6.31,<7"],
        "flash": ["flash-attn>=2.6"],
        "eval": ["nltk>=3.9", "spacy>=3.8"],  # the official taggers; their data are downloads of their own
        "quant": ["bitsandbytes>=0.45"],
        "synth": ["diffusers>=0.42"],
    },
    entry_points={"console_scripts": ["dama=dama.cli:main"]},
)
