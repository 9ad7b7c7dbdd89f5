r"""Answers of a base model and of adapters on it: a chat, or a file of questions.

    python open_instruct/generate_peft.py --adapter output/run                                        # chat
    python open_instruct/generate_peft.py --adapter output/run --prompt "Why is the sky blue?"        # one answer
    python open_instruct/generate_peft.py --adapter a=output/a --adapter b=output/b \
        --input_file questions.jsonl --output_file answers.jsonl --batch_size 64                      # file

A file may have any form that training reads; if a row ends with an answer, that is kept as the reference. Each of
several adapters answers, and --combine makes one answer of theirs. The answer to a question does not depend on the
other questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders
from open_instruct.adapters.question_forms import FORM_FLAGS, add_form_flags, form_of_questions, say_as_it_is
from open_instruct.command_line import (
    OneLineArgumentParser,
    add_engine_flag,
    add_model_flags,
    at_least,
    number_from,
    seed,
)
from open_instruct.data import reading
from open_instruct.errors import exit_code, visible
from open_instruct.flags.data import BAD_ROWS
from open_instruct.interrupts import ending_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: done; 2: wrong input, reported in one line; 130: interrupted."""
    with ExitStack() as held:
        return exit_code(lambda: run(parse(argv), held), "interrupted: finished answers are kept, --resume continues")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = OneLineArgumentParser(
        ("system", "prompt"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser, dtype="auto")
    add_engine_flag(parser)
    add = parser.add_argument
    add("--chat_template_name", help="as in finetune_peft.py; unset: the adapter's own")
    add("--input_file", metavar="FILE", help="file of questions; without it, --prompt and --self_study: a chat")
    add("--prompt", metavar="TEXT", help="answer this one question; only the answer goes to the standard output")
    add("--bad_rows", choices=["error", "skip"], default="error", help=BAD_ROWS)
    add_form_flags(parser)
    add("--output_file", metavar="FILE", help="file for the answers, as JSON Lines")
    add("--resume", action="store_true", help="continue an unfinished output file")
    add("--batch_size", type=at_least(1, 10**6), default=32, help="largest number of answers at once (default: 32)")
    add(
        "--combine",
        choices=["vote", "concatenate"],
        help="combine the adapters' answers into one: the most frequent, or all of them joined",
    )
    add("--system", help="system message for every conversation that has none")
    add("--context", metavar="FILE", help="text before each conversation, as finetune_peft.py --distill_context has it")
    add(
        "--conversations",
        action="store_true",
        help="write each question with its answer as a conversation, which training reads; one model, one answer",
    )
    add = parser.add_argument_group("self-study: conversations about a text, to distil it from").add_argument
    add(
        "--self_study",
        type=at_least(1),
        metavar="N",
        help="let the model write this many questions about the text of --context, and answer them behind it",
    )
    add(
        "--self_study_prompts",
        metavar="FILE",
        help="YAML file of the kinds of questions (default: open_instruct/adapters/self_study.yaml)",
    )
    add(
        "--piece_tokens",
        type=at_least(8),
        help="tokens of the piece of the text that a question is about (default: 512)",
    )
    add = parser.add_argument_group("sampling, as in transformers").add_argument
    add("--max_new_tokens", type=at_least(1), default=256, help="largest number of tokens of an answer (default: 256)")
    add("--do_sample", action="store_true", help="draw tokens at random, instead of taking the likeliest one")
    add("--temperature", type=number_from(1e-4, 1e4), default=1.0, help="divisor of the scores (default: 1.0)")
    add(
        "--top_p",
        type=number_from(1e-9, 1),
        default=1.0,
        help="draw from the likeliest tokens with this probability (default: 1.0)",
    )
    add("--top_k", type=at_least(0), default=0, help="draw from this many likeliest tokens; 0: all (default: 0)")
    add(
        "--repetition_penalty",
        type=number_from(0.01, 100),
        default=1.0,
        help="above 1: repetition is less likely (default: 1.0)",
    )
    add(
        "--num_beams",
        type=at_least(1, 1000),
        default=1,
        help="beam search: follow this many continuations, and take the likeliest (default: 1)",
    )
    add(
        "--num_return_sequences",
        type=at_least(1, 10_000),
        default=1,
        help="number of answers of each adapter to each question (default: 1)",
    )
    add("--seed", type=seed, default=42, help="seed of the draws (default: 42)")
    args = parser.parse_args(argv)
    problems = wrong_together(args)
    if problems:
        parser.error("; ".join(problems))
    args.piece_tokens = args.piece_tokens or 512
    return args


def wrong_together(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with arguments that do not go together, a sentence each."""
    drawing = args.temperature != 1.0 or args.top_p != 1.0 or args.top_k or args.num_return_sequences > 1
    is_file = bool(args.input_file or args.self_study)
    checks = [
        (
            args.num_beams > 1 and args.do_sample,
            f"--num_beams {args.num_beams} follows the likeliest tokens, and --do_sample draws them: drop one",
        ),
        (
            args.num_beams > 1 and bool(args.self_study),
            f"--num_beams {args.num_beams}: --self_study draws its questions at random: drop one",
        ),
        (
            args.num_beams > 1 and not (is_file or args.prompt),
            f"--num_beams {args.num_beams}: a chat prints an answer as it comes, and beams come all at once: give "
            "--prompt or --input_file",
        ),
        (
            args.num_beams > 1 and args.engine != "transformers",
            f"--num_beams {args.num_beams}: vLLM has no such search here: use --engine transformers",
        ),
        (
            bool(args.prompt) and (is_file or bool(args.output_file)),
            "--prompt answers one question: remove it, or --input_file, --self_study and --output_file",
        ),
        (
            bool(args.prompt)
            and bool(len(args.adapter or []) > 1 or args.num_return_sequences > 1 or args.combine or args.resume),
            "--prompt prints one answer of one model: give at most one --adapter, and neither --num_return_sequences, "
            "--combine nor --resume",
        ),
        (
            drawing and not args.do_sample,
            "--temperature, --top_p, --top_k and --num_return_sequences need --do_sample: greedy answers are all alike",
        ),
        (
            is_file != bool(args.output_file),
            "--input_file (or --self_study) and --output_file go together: give both, or none for a chat",
        ),
        (
            not args.output_file
            and not args.prompt
            and (args.combine or args.resume or args.context or args.conversations or args.engine != "transformers"),
            "--combine, --resume, --engine, --context and --conversations belong to --input_file: drop them for a chat",
        ),
        (
            any(getattr(args, name) is not None for name in FORM_FLAGS) and not args.input_file,
            "--columns, --template, --shots and --shots_file are for rows of --input_file: give that, or drop them",
        ),
        (
            bool(args.prompt and args.conversations),
            "--conversations has no effect with --prompt, which prints an answer alone: remove one",
        ),
        (
            bool(args.self_study) and (not args.context or bool(args.input_file)),
            "--self_study writes questions about the text of --context FILE: give that, and no --input_file",
        ),
        (
            bool(args.self_study_prompts or args.piece_tokens) and not args.self_study,
            "--self_study_prompts and --piece_tokens have no effect without --self_study: remove them, or add it",
        ),
        (
            bool(args.conversations or args.self_study)
            and (len(args.adapter or []) > 1 or args.num_return_sequences > 1 or bool(args.combine)),
            "--conversations and --self_study write one answer of one model: give at most one --adapter, and neither "
            "--num_return_sequences nor --combine",
        ),
        (
            bool(args.self_study and (args.system or args.conversations)),
            "--self_study writes conversations, without a system message: remove --system and --conversations",
        ),
    ]
    return [text for wrong, text in checks if wrong]


def run(args: argparse.Namespace, held: ExitStack) -> None:
    """Check, then chat or answer a file."""
    adapters = folders.parse_adapters(args.adapter)
    folders.base_name(args.model_name_or_path, adapters, args.any_base)
    if args.input_file:
        reading.files_of(args.input_file)

    with ending_at_once():  # they import torch: only now that the arguments are checked
        from open_instruct.adapters import answering, interactive, self_study
        from open_instruct.adapters.generation import Sampling
        from open_instruct.adapters.served import load
        from open_instruct.data.context import context_of, read_context
        from open_instruct.data.questions import key_of, read_questions, with_calls_written

    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    rows, num_done = [], 0
    text = read_context(args.context, "--context") if args.context else None
    kinds = self_study.read_kinds(args.self_study_prompts) if args.self_study else []
    if args.output_file:
        form = None
        if args.input_file:
            form = form_of_questions(adapters, args.columns, args.template, args.shots, args.shots_file, args.seed)
            rows = read_questions(args.input_file, args.bad_rows, rendering=form)
        settings = {
            "adapter": args.adapter or [],
            "model_name_or_path": args.model_name_or_path,
            "input_file": args.input_file,
            "questions": hashlib.sha256(json.dumps([key_of(row.messages) for row in rows]).encode()).hexdigest(),
            "chat_template_name": args.chat_template_name,
            "dtype": args.dtype,
            "system": args.system,
            "combine": args.combine,
            "engine": args.engine,
            "context": text and hashlib.sha256(text.encode()).hexdigest(),
            "conversations": args.conversations or None,
            "questions_form": form and form.key,
            "kinds": [asdict(kind) for kind in kinds] or None,
            "piece_tokens": args.piece_tokens if kinds else None,
            **asdict(sampling),
            "num_beams": sampling.num_beams if sampling.num_beams > 1 else None,  # as files made without it have it
        }
        held.enter_context(answering.locked_output(Path(args.output_file)))
        num_done = answering.prepare_output(Path(args.output_file), settings, args.resume)
    served = load(
        args.adapter,
        args.model_name_or_path,
        args.dtype,
        args.any_base,
        args.trust_remote_code,
        args.chat_template_name,
        args.allow_pickle,
        args.engine,
    )
    before = context_of(text, served.tokenizer) if text else None
    rows = with_calls_written(rows, served.tokenizer)
    if not args.output_file:
        say_as_it_is(adapters)
    if args.prompt:
        answer = answering.answer_one(served, args.prompt, sampling, args.system, before)
        print(visible(answer) if sys.stdout.isatty() else answer)
        return
    if not args.output_file:
        interactive.chat(served, sampling, args.system)
        return
    output = Path(args.output_file)
    if text and args.self_study:
        made = self_study.write_conversations(
            served, text, kinds, args.self_study, output, sampling, args.batch_size, args.piece_tokens
        )
        notes = [f"{made.empty} left out: question or answer came out empty"] if made.empty else []
        if made.behind_piece:
            notes.append(f"{made.behind_piece} answered behind their piece: the whole text is too long for the model")
        print("; ".join([f"{made.written} conversations written: {output}", *notes]))
        return
    num_unanswered = answering.answer_file(
        served,
        rows,
        output,
        num_done,
        sampling,
        args.batch_size,
        args.system,
        args.combine,
        before,
        args.conversations,
    )
    names = ", ".join(served.names or [folders.BASE])
    without = f"; {num_unanswered} fill the context and have no answer" if num_unanswered else ""
    print(f"{len(rows)} questions answered by {names}: {args.output_file}{without}")


if __name__ == "__main__":
    sys.exit(main())
