"""Make a plain checkpoint of base + adapter, with no PEFT left in it, that any engine can serve.

    python open_instruct/merge_peft.py --adapter output/run --output output/run-merged
    python open_instruct/merge_peft.py --adapter a=output/run-a --adapter b=output/run-b --output output/both

LoRA and IA3 are merged into the weights. Soft prompts of embeddings (prompt tuning, P-tuning) become new tokens that the tokenizer puts
before the input; several of them go into one checkpoint. The result is reloaded and compared with base + adapter before it is kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders as known
from open_instruct.adapters import merging
from open_instruct.command_line import OneLineArgumentParser, add_model_flags
from open_instruct.errors import InputError, exit_code
from open_instruct.files import flush, write_json
from open_instruct.quiet import silence_transformers


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: merged and verified; 2: wrong input, said in one line; 130: interrupted."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the plain checkpoint; must not exist")
    a = parser.parse_args(argv)
    return exit_code(
        lambda: print(
            report(
                merge(
                    a.adapter, a.output, a.model_name_or_path, a.dtype, a.any_base, a.trust_remote_code, a.allow_pickle
                ),
                a.output,
            )
        )
    )


def merge(
    adapter: Sequence[str],
    output: str,
    model_name_or_path: str | None = None,
    dtype: str = "stored",
    any_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Merge adapters into a plain checkpoint and verify it.

    Args:
        adapter: folders, or NAME=FOLDER.
        output: folder of the checkpoint; must not exist.
        model_name_or_path: base model; unset: the one that the adapters name.
        dtype: of the checkpoint: stored (as the base is), float32, bfloat16, float16.
        any_base: accept a base under another name than the adapters'.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: load a base whose weights exist only as pickle files.

    Returns:
        Content of `merged.json`: adapters, their tokens, largest relative difference of a logit, leaked probability.

    Raises:
        InputError: nothing to merge, an adapter that no plain checkpoint can hold, or a result that differs.
    """
    silence_transformers()
    final = Path(output)
    if final.exists():
        raise InputError(f"--output {output} exists already: name another folder")
    folders = known.parse_adapters(adapter)
    if not folders:
        raise InputError("nothing to merge: give --adapter DIR")
    merging.check_mergeable(folders)
    name = known.base_name(model_name_or_path, folders, any_base)
    base = known.load_base(name, dtype, folders, trust_remote_code, allow_pickle)
    if getattr(base, "is_quantized", False):
        base = base.dequantize()  # an adapter corrects the base that it was trained on, rounding included
    merging.check_room(base, folders)
    loaded = known.Adapters(base, folders)
    tokenizer = known.load_tokenizer(name, folders, trust_remote_code)
    templates = {
        folder.name: known.load_tokenizer(name, [folder], trust_remote_code).chat_template for folder in folders
    }
    wanted = merging.expected(loaded, tokenizer)
    model, sets = merging.merge(loaded, tokenizer, templates)

    working = final.with_name(f".{final.name}.merging")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        model.save_pretrained(working)
        tokenizer.save_pretrained(working)
        device, kind = model.device, model.dtype
        del model, loaded, base
        again = (
            AutoModelForCausalLM.from_pretrained(working, dtype=kind, trust_remote_code=trust_remote_code)
            .to(device)
            .eval()
        )
        found = merging.verify(
            again,
            AutoTokenizer.from_pretrained(working),
            known.load_tokenizer(name, folders, trust_remote_code),
            sets,
            wanted,
        )
        result = {
            "base": name,
            "adapters": {folder.name: {"path": str(folder.path), "method": folder.title} for folder in folders},
            "tokens": {new.adapter: {"first": new.ids[0], "number": len(new.ids), "text": new.text} for new in sets},
            "vocabulary_rows": again.get_input_embeddings().weight.shape[0],
            "quantised_in_training": known.quantisation(folders),
            "dtype": str(kind).removeprefix("torch."),
            **found,
        }
        write_json(working / "merged.json", result)
        for path in working.iterdir():
            flush(path)
        working.rename(final)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return result


def report(result: dict[str, Any], output: str) -> str:
    """What was done, and how to use it."""
    lines = [
        f"{output}: {', '.join(result['adapters'])} on {result['base']}, {result['dtype']}, {result['vocabulary_rows']:,} vocabulary rows"
    ]
    texts = f"{result['equal_texts']} of {result['texts']} greedy texts are equal"
    lines.append(
        f"reloaded and compared: logits differ by at most {result['largest_difference']:.1e} of the largest, {texts}"
    )
    for name, tokens in result["tokens"].items():
        chosen = f'chat_template_kwargs={{"adapter": "{name}"}}' if len(result["tokens"]) > 1 else "always"
        last = tokens["first"] + tokens["number"] - 1
        lines.append(f"  {name}: tokens {tokens['first']} to {last}, put first by the tokenizer ({chosen})")
    if result["tokens"]:
        lines.append(
            f"  new tokens take {result['leaked_probability']:.0e} of the probability at most, and generation_config suppresses them"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
