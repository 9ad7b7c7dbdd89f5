"""Write the table of docs/quantised.md by training on the bundled model in each quantised form that runs here.

Run from the repository root: python -m docs.make_quantised
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quantised.md"
MODEL, TRAIN, HELD_OUT = (
    ROOT / path for path in ("assets/tiny-model", "data/sample/train.jsonl", "data/sample/heldout.jsonl")
)
START, END = "<!-- table: python -m docs.make_quantised -->", "<!-- end of the table -->"
NUM_STEPS = 20
METHODS = ("prompt_tuning", "prefix_tuning", "p_tuning", "lora")
BLOCK = 128  # of an FP8 checkpoint's scales
GROUP = 32  # of a GPTQ checkpoint's scales


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    """Return transformers' configuration of one of torchao's ways."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


def four_bits(kind: str, double: bool) -> dict[str, Any]:
    """Return a configuration of bitsandbytes' 4 bits."""
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}


def linear_weights(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights of linear layers within the bundled model's layers."""
    return [name for name in tensors if ".layers." in name and name.endswith("proj.weight")]


def in_int8(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Hold weights in 8 bits with a scale for each row, as compressed-tensors does; return the configuration."""
    for name in linear_weights(tensors):
        weight = tensors[name]
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def in_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Hold weights in FP8 with a scale for each block, as DeepSeek's checkpoints do; return the configuration."""
    for name in linear_weights(tensors):
        weight = tensors[name]
        blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3)) / 448  # the largest number of float8_e4m3fn
        tensors[name] = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    return {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


def in_gptq(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Hold weights in 4 bits with a scale for each group of a row, as GPTQ's checkpoints do; return the configuration.

    The codes are those of rounding, not of GPTQ's own search, which needs texts.
    """
    for name in linear_weights(tensors):
        groups = tensors.pop(name).unflatten(1, (-1, GROUP))  # [outputs, groups, inputs of a group]
        stem, num_inputs = name.removesuffix("weight"), groups.shape[1] * GROUP
        scale = (groups.abs().amax(dim=2) / 7).half()
        codes = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).long() + 8
        nibbles = codes.flatten(1).T.unflatten(0, (-1, 8)) << (4 * torch.arange(8))[:, None]
        tensors[f"{stem}qweight"] = nibbles.sum(dim=1).to(torch.uint32).view(torch.int32)
        tensors[f"{stem}qzeros"] = torch.full((groups.shape[1], len(groups) // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{stem}scales"] = scale.T
        tensors[f"{stem}g_idx"] = torch.arange(num_inputs, dtype=torch.int32) // GROUP
    form = {
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "backend": "gptq_torch_aten",
    }
    return {"quant_method": "gptq", "checkpoint_format": "gptq", **form}


def checkpoint(folder: Path, quantise: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> Path:
    """Write the bundled model as a quantised checkpoint, by hand."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantise(tensors)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved_checkpoint(folder: Path, configuration: dict[str, Any]) -> Path:
    """Write the bundled model as transformers saves a quantised one."""
    from transformers import AutoModelForCausalLM

    from open_instruct.model.quantised import configuration_of

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    made = configuration_of(json.dumps(configuration), torch.float32)
    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=made, dtype=torch.float32).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Backend:
    """A quantised form of the bundled model.

    Args:
        title: what the table calls it.
        package: what has to be installed.
        configuration: value of --quantisation_config; None: a checkpoint.
        write: writes the checkpoint into a folder.
    """

    title: str
    package: str
    configuration: dict[str, Any] | None = None
    write: Callable[[Path], Path] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the package is there."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # a part of a package that is not there
            return False

    def flags(self, folder: Path) -> list[str]:
        """Return the flags of a run on this form; a checkpoint is written into the folder first."""
        if self.write:
            if not folder.exists():
                self.write(folder)
            return ["--model_name_or_path", str(folder)]
        return ["--model_name_or_path", str(MODEL), "--quantisation_config", json.dumps(self.configuration)]


NF4 = four_bits("nf4", True)
INT8 = torchao("Int8WeightOnlyConfig")
BACKENDS = (
    Backend("bitsandbytes, 8 bits (LLM.int8())", "bitsandbytes", {"load_in_8bit": True}),
    Backend("bitsandbytes, NF4", "bitsandbytes", four_bits("nf4", False)),
    Backend("bitsandbytes, NF4, double quantisation", "bitsandbytes", NF4),
    Backend("bitsandbytes, FP4", "bitsandbytes", four_bits("fp4", False)),
    Backend("bitsandbytes, FP4, double quantisation", "bitsandbytes", four_bits("fp4", True)),
    Backend("torchao, int8 weights", "torchao", INT8),
    Backend("torchao, float8 weights", "torchao", torchao("Float8WeightOnlyConfig")),
    Backend("torchao, int8 weights and activations", "torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    Backend("quanto, int8 weights", "optimum.quanto", {"quant_method": "quanto", "weights": "int8"}),
    Backend("quanto, float8 weights", "optimum.quanto", {"quant_method": "quanto", "weights": "float8"}),
    Backend("checkpoint of bitsandbytes, NF4", "bitsandbytes", write=lambda folder: saved_checkpoint(folder, NF4)),
    Backend("checkpoint of torchao, int8 weights", "torchao", write=lambda folder: saved_checkpoint(folder, INT8)),
    Backend(
        "checkpoint of compressed-tensors, int8", "compressed_tensors", write=lambda folder: checkpoint(folder, in_int8)
    ),
    Backend("checkpoint of GPTQ, 4 bits", "gptqmodel", write=lambda folder: checkpoint(folder, in_gptq)),
    Backend("checkpoint in FP8, blocks of 128", "transformers", write=lambda folder: checkpoint(folder, in_fp8)),
)


@dataclass
class Row:
    """What came of one form."""

    title: str
    cosine: float | None = None
    ratio: float | None = None
    base: float = 0.0
    losses: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def train(folder: Path, *flags: str) -> tuple[int, str]:
    """Run a training on the bundled data in this process; return its exit code and its errors."""
    from accelerate.state import AcceleratorState

    from open_instruct.finetune_peft import main

    AcceleratorState._reset_state(reset_partial_state=True)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main([
            *flags, "--train_file", str(TRAIN), "--validation_file", str(HELD_OUT), "--max_train_steps", str(NUM_STEPS),
            "--output_dir", str(folder), "--per_device_train_batch_size", "8", "--eval_steps", "0",
            "--num_sample_answers", "0", "--dataset_local_cache_dir", str(folder.parent / "cache"),
        ])  # fmt: skip
    return code, errors.getvalue()


def tried(backend: Backend, folder: Path) -> Row:
    """Train every method on one form."""
    row = Row(backend.title)
    if not backend.is_installed:
        row.problem = f"{backend.package} is not installed"
        return row
    flags = backend.flags(folder / "model")
    for method in METHODS:
        run = folder / method
        code, errors = train(run, *flags, f"--use_{method}")
        if code:
            line = errors.strip().splitlines()[-1].removeprefix("error: ")
            if method == METHODS[0]:
                row.problem = line
                return row
            row.losses[method] = "refused"
            continue
        summary = json.loads((run / "summary.json").read_text())
        row.base = summary["base_eval_loss"]
        row.losses[method] = f"{summary['final_eval_loss']:.4f}"
        if probe := json.loads((run / "run.json").read_text())["quantisation"]["probe"]:
            row.cosine, row.ratio = probe["cosine"], probe["norm_ratio"]
    return row


def render(rows: Sequence[Row]) -> str:
    """Return the table."""
    packages = (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "torchao",
        "compressed-tensors",
        "optimum-quanto",
        "gptqmodel",
    )
    used = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            used.append(f"{name} {importlib.metadata.version(name)}")
    lines = [
        START,
        f"Measured on {platform.machine()} CPU in float32 with {', '.join(used)}; {NUM_STEPS} steps of 8 examples with "
        "the recipe, held-out loss before and after.",
        "",
        "| form | cosine | norm | base's loss | prompt tuning | prefix tuning | P-tuning | LoRA |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.title} | refused: {row.problem} |" + " |" * 6)
            continue
        figures = "whole | whole" if row.cosine is None else f"{row.cosine:.5f} | {row.ratio:.3f}"
        losses = " | ".join(row.losses[method] for method in METHODS)
        lines.append(f"| {row.title} | {figures} | {row.base:.4f} | {losses} |")
    return "\n".join([*lines, END])


def main() -> None:
    """Try every form and write the table into the page."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, backend in enumerate(BACKENDS):
            rows.append(tried(backend, Path(name) / str(number)))
            print(rows[-1], file=sys.stderr)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(START)[0], text.partition(END)[2]
    PAGE.write_text(before + render(rows) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
