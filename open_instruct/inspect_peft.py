"""Look inside a soft prompt: neighbours in the vocabulary, norms, similarities, drift during training, attention of each layer.

    python open_instruct/inspect_peft.py --adapter output/run --file heldout.jsonl --output_dir output/run-inspected

Numbers only: that a virtual token stands near a word does not say that it means the word.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import inspection
from open_instruct.adapters.served import Served, load
from open_instruct.command_line import OneLineArgumentParser, add_model_flags, at_least
from open_instruct.data import questions, reading
from open_instruct.errors import InputError, exit_code
from open_instruct.files import check_result_folder, write_result
from open_instruct.report import inspection as insight


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: wrong input, said in one line; 130: interrupted."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, dtype="auto")
    parser.add_argument("--file", metavar="FILE", help="questions on which attention is measured; unset: no attention")
    parser.add_argument("--rows", type=at_least(1), default=16, help="rows of the file (default: 16)")
    parser.add_argument(
        "--neighbours", type=at_least(1), default=3, help="nearest tokens of each virtual one (default: 3)"
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help="where inspection.json, .md and .png go; unset: the text is only printed"
    )
    a = parser.parse_args(argv)
    return exit_code(lambda: run(a))


def run(a: argparse.Namespace) -> None:
    """Inspect, print, write."""
    if not a.adapter or len(a.adapter) > 1:
        raise InputError("give the one adapter to look at, --adapter DIR")
    check_result_folder(a.output_dir, "inspection.json")
    options = {"any_base": a.any_base, "trust_remote_code": a.trust_remote_code, "allow_pickle": a.allow_pickle}
    result = inspect(a.adapter[0], a.model_name_or_path, a.file, a.rows, a.neighbours, dtype=a.dtype, **options)
    text = insight.markdown(result)
    print(text)
    write_result(a.output_dir, "inspection", text, insight.plot, result)


def inspect(
    adapter: str,
    model_name_or_path: str | None = None,
    file: str | None = None,
    rows: int = 16,
    neighbours: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Look inside a soft prompt.

    Args:
        adapter: folder of prompt tuning, P-tuning or prefix tuning.
        model_name_or_path: base model; unset: the one that the adapter names.
        file: questions on which attention is measured; None: not measured.
        rows: of the file.
        neighbours: nearest tokens of each virtual token.
        options: further arguments of `load`.

    Returns:
        Content of inspection.json.

    Raises:
        InputError: the adapter is no soft prompt, or wrong input.
    """
    asked = (
        list(itertools.islice(questions.questions(reading.read_files(reading.files_of(file))), rows)) if file else []
    )
    served = load(adapter, model_name_or_path, **options)
    (folder,) = served.adapters.folders.values()
    if not folder.num_virtual_tokens:
        raise InputError(f"adapter {folder.name} is {folder.title}, which has no virtual tokens to look at")
    result: dict[str, Any] = {
        "adapter": str(folder.path),
        "method": folder.title,
        "virtual_tokens": folder.num_virtual_tokens,
    }
    model = served.adapters.use(folder.name)
    prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in asked]
    if folder.method == "PREFIX_TUNING":
        result["prefix_norms"] = inspection.prefix_norms(model)
        if prompts:
            result["base_norms"] = inspection.base_norms(served.adapters.base, prompts)
    else:
        result |= embedding_figures(served, folder.name, neighbours)
    if prompts:
        served.adapters.use(folder.name)
        result["attention"] = inspection.attention_mass(model, served.adapters.base, prompts, folder.num_virtual_tokens)
    return result


def embedding_figures(served: Served, name: str, count: int) -> dict[str, Any]:
    """Neighbours, norms, similarities and drift of a soft prompt of embeddings."""
    folder, base = served.adapters.folders[name], served.adapters.base
    vocabulary, ids = inspection.vocabulary_vectors(base, served.tokenizer)
    end = served.adapters.models[name].get_prompt(batch_size=1)[0].detach().float().cpu()
    found: dict[str, Any] = {
        "norms": {"vocabulary": inspection.norms(vocabulary), "prompt": inspection.norms(end)},
        "end": inspection.neighbours(end, vocabulary, ids, served.tokenizer, count),
        "similarity": inspection.similarity(end).tolist(),
    }
    start = inspection.start_of(folder)
    if start is not None:
        found["norms"]["prompt at start"] = inspection.norms(start)
        found["start"] = inspection.neighbours(start, vocabulary, ids, served.tokenizer, count)
        found["moved"] = (end - start).norm(dim=1).tolist()
        found["drift"] = inspection.drift(folder, start)
    return found


if __name__ == "__main__":
    sys.exit(main())
