"""Fine-tune a causal language model on conversations: LoRA, QLoRA, prefix tuning, prompt tuning, P-tuning, IA3, or in full.

    python open_instruct/finetune_peft.py --model_name_or_path MODEL --train_file FILE --use_prompt_tuning

See `--help` for every flag and README.md for what a run leaves in --output_dir.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.arguments import FinetuneArguments, check_arguments
from open_instruct.command_line import parse, warn_without_effect
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError
from open_instruct.methods import METHODS
from open_instruct.model import loading, memory
from open_instruct.report.summary import hyperparameter_lines, summary_lines
from open_instruct.training import (
    capabilities,
    checkpoint,
    engines,
    export,
    model_setup,
    packing,
    screening,
    setup,
    tracking,
)
from open_instruct.training import sample_answers as answers
from open_instruct.training.best import Best
from open_instruct.training.checkpoint import Progress
from open_instruct.training.doctor import Doctor, Finding
from open_instruct.training.evaluation import held_out_loss
from open_instruct.training.examples import Data, fill_virtual_tokens, load_data, num_virtual_tokens
from open_instruct.training.faults import (
    PREEMPTED,
    Preempted,
    ignore_signals,
    is_lost_contact,
    lost_contact,
    save_somewhere,
    warn,
)
from open_instruct.training.loop import fit
from open_instruct.training.packing import Forward
from open_instruct.training.tracking import Metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: wrong input, said in one line; 75: preempted, resumable; 130: interrupted."""
    try:
        arguments, origins = parse(sys.argv[1:] if argv is None else argv)
        model_setup.adopt_adapter(arguments, origins)
        check_arguments(arguments)
        warn_without_effect(origins)
        run(arguments, origins)
    except InputError as error:
        return say_error(error)
    except Preempted as stop:
        ignore_signals()  # a launcher that sees the first process end may tell the others once more
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stop}: continue with --resume_from_checkpoint", file=sys.stderr, flush=True)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted: continue with --resume_from_checkpoint if there is a checkpoint", file=sys.stderr)
        return 130
    return 0


def say_error(error: InputError) -> int:
    """Print one line, and end this process so that its launcher ends the others: they may wait in a collective for it."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(
            5
        )  # an error that every process meets is said by the first, and the launcher ends this one meanwhile
    print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(2)
    return 2


def run(
    a: FinetuneArguments,
    origins: dict[str, str],
    bases: model_setup.Bases | None = None,
    measure: Callable[[Any, Any, Data], dict[str, Any]] = lambda model, tokenizer, data: {},
) -> dict[str, Any] | None:
    """One run, from flags to saved adapter.

    Args:
        a: the flags.
        origins: where each comes from.
        bases: base models of former runs of this process, of one process alone; unset: the base is read anew.
        measure: takes trained model, tokenizer and data at the end, and returns further entries of summary.json.

    Returns:
        The summary on the main process, None elsewhere and where nothing was to be trained.
    """
    tracking.reset_peak_memory()

    # Setup
    resume_from = setup.check_output_dir(a)
    accelerator = setup.make_accelerator(a)
    engine = engines.engine_of(accelerator)
    setup.check_capabilities(a, engine)

    # Data
    tokenizer, config = setup.load_tokenizer_and_config(a)
    if fill_virtual_tokens(a, config):
        origins["num_virtual_tokens"] = "recipe"
    data = load_data(a, accelerator, tokenizer, config)
    for name, examples in {"training": data.train, "held out": data.held_out}.items():
        accelerator.print(examples.describe(name) if examples else "held out: none (--validation_fraction 0)")
    if a.cache_dataset_only:
        accelerator.print(f"tokenised data is in {a.dataset_local_cache_dir}/{data.train.fingerprint}")
        return None

    # Model
    base = (bases.take if bases else model_setup.load_base)(a, config, tokenizer, accelerator)
    context = loading.context_length(config)
    room = context and context - num_virtual_tokens(a)  # the same for both models, so that their answers compare
    whole = not engines.shares_weights(engine)
    asked = a.num_sample_answers if whole and not a.dry_run else 0
    questions = answers.questions(data.held_out, tokenizer, asked, a.data_seed)
    examination = answers.examine(base, tokenizer, questions, room)

    # Method
    accelerator.print(capabilities.line(METHODS[a.method]))
    model, recipe, facts = model_setup.wrap_method(a, base, tokenizer, origins, whole)
    starts = screening.starts(a, model, tokenizer, resumed=resume_from is not None)
    forward = setup.choose_forward(a, origins, data, config, model, accelerator, tokenizer.pad_token_id)
    plan = setup.make_plan(a, len(data.train), accelerator.num_processes)
    screening.choose_start(a, accelerator, forward, data, plan, starts)
    rates = setup.find_rate(a, origins, accelerator, forward, data, plan, resume_from)
    accelerator.print(hyperparameter_lines(METHODS[a.method].title, setup.hyperparameters(a), origins, recipe.sources))
    if a.dry_run:
        sharing = engines.sharing(engine, accelerator.num_processes)
        accelerator.print(setup.dry_run_text(a, data, plan, model, config, forward.training, sharing))
        return None
    progress, best = begin(a, accelerator, model, engines.told(setup.run_identity(a, data, config, plan)), resume_from)

    # Fit
    start = METHODS[a.method].start(model) if whole or accelerator.is_main_process else None
    training_model, optimizer, schedule = setup.prepare(a, accelerator, forward, plan.num_steps)
    if resume_from:
        checkpoint.resume_optimizer(resume_from, optimizer, schedule, engines.part_name(accelerator))
    record = export.run_record(
        a, origins, data.fingerprints(), accelerator.num_processes, engine, recipe.sources, resume_from
    )
    export.open_output_dir(a, accelerator, record, start, rates, keep=resume_from is not None)
    doctor = Doctor(setup.patient(a, data, plan, facts, start))
    doctor.remember(
        progress.base_eval_loss, progress.initial_eval_loss, [finding["name"] for finding in progress.findings]
    )
    train(a, accelerator, forward, training_model, optimizer, schedule, data, plan, progress, best, doctor)

    # Save
    summary = save(a, accelerator, config, tokenizer, model, data, progress, best, examination, measure)
    if bases:
        bases.give_back(a, model)
    accelerator.end_training()
    return summary


def begin(
    a: FinetuneArguments, accelerator: Any, model: Any, identity: dict[str, Any], resume_from: Path | None
) -> tuple[Progress, Best]:
    """Where the run starts: at step 0, or after a checkpoint, whose parameters the model takes."""
    progress, best = Progress(identity=identity), Best(a.keep_best)
    if resume_from:
        progress = checkpoint.resume(resume_from, model, identity, engines.part_name(accelerator))
        best.tensors = checkpoint.resume_best(resume_from, progress) if accelerator.is_main_process else {}
        accelerator.print(f"resuming after step {progress.step} from {resume_from}")
    elif a.resume_from_checkpoint:
        accelerator.print(f"no complete checkpoint in {a.output_dir}/checkpoints yet: starting at step 0")
    return progress, best


def train(
    a: FinetuneArguments,
    accelerator: Any,
    forward: Forward,
    training_model: Any,
    optimizer: Any,
    schedule: Any,
    data: Data,
    plan: Plan,
    progress: Progress,
    best: Best,
    doctor: Doctor,
) -> None:
    """Measure the base and the start, run the steps. Updates `progress`."""
    output_dir = Path(a.output_dir)
    metrics = Metrics(output_dir / "metrics.jsonl", accelerator, plan.num_steps, progress.step)
    started, seconds_before = time.perf_counter(), progress.wall_seconds

    def tell(findings: list[Finding]) -> None:
        for finding in findings:
            progress.findings.append({"step": progress.step, **asdict(finding)})
            metrics.say(str(finding))

    def evaluate() -> None:
        if data.held_out:
            loss, tokens = held_out_loss(accelerator, training_model, data.held_out, forward.evaluation)
            progress.record_eval(loss)
            best.consider(progress, loss, forward.model.model, accelerator)
            metrics.write({"step": progress.step, "eval_loss": loss, "eval_tokens": tokens})
            metrics.say(
                f"step {progress.step}/{plan.num_steps} | held-out loss {loss:.4f} (base model {progress.base_eval_loss:.4f})"
            )
            if progress.step:
                tell(doctor.evaluation(progress.step, loss, prompt_norm()))
            else:
                tell(doctor.first(progress.base_eval_loss or loss, loss))

    def prompt_norm() -> float:
        whole = not engines.shares_weights(engines.engine_of(accelerator))
        vectors = METHODS[a.method].start(forward.model.model) if whole else None
        return math.nan if vectors is None else vectors.norm(dim=1).median().item()

    def observe(loss: float, grad_norm: float) -> None:
        tell(doctor.step(loss, grad_norm))

    def save() -> None:
        progress.wall_seconds = seconds_before + time.perf_counter() - started
        folder, keep = output_dir / "checkpoints", a.keep_last_n_checkpoints
        inner = forward.model.model
        problem = checkpoint.save_checkpoint(
            folder, inner, optimizer, schedule, progress, best.tensors, keep, accelerator
        )
        if problem and accelerator.is_main_process:  # training goes on: the last good checkpoint is still there
            warn(f"checkpoint of step {progress.step} could not be written ({problem})")

    try:
        if progress.step == 0:
            tell(doctor.before())
            if data.held_out and a.method != "full":  # in full fine-tuning the start is the base
                progress.base_eval_loss, _ = held_out_loss(
                    accelerator, training_model, data.held_out, forward.evaluation, adapter=False
                )
            evaluate()
        settings = setup.fit_settings(a, plan, forward.training)
        fit(
            accelerator,
            training_model,
            optimizer,
            schedule,
            data.train,
            plan,
            settings,
            progress,
            metrics,
            observe,
            evaluate,
            save,
        )
    except InputError as error:
        newest = checkpoint.complete_checkpoints(output_dir / "checkpoints")
        raise InputError(
            f"{error}; last good checkpoint: {newest[-1] if newest else 'none (set --checkpointing_steps)'}"
        ) from None
    except RuntimeError as error:
        if accelerator.num_processes > 1 and is_lost_contact(error):
            raise lost_contact(error, accelerator, progress.step) from error
        raise
    finally:
        metrics.close()
        packing.release(forward)
    progress.wall_seconds = seconds_before + time.perf_counter() - started


def save(
    a: FinetuneArguments,
    accelerator: Any,
    config: Any,
    tokenizer: Any,
    model: Any,
    data: Data,
    progress: Progress,
    best: Best,
    examination: answers.Examination,
    measure: Callable[[Any, Any, Data], dict[str, Any]],
) -> dict[str, Any] | None:
    """Keep the best parameters or the last ones, let the model answer, write what the run leaves. Returns the main process's summary."""
    whole = not engines.shares_weights(engines.engine_of(accelerator))
    tensors = {}
    if progress.best_is_earlier:
        accelerator.print(setup.best_text(progress))
    if not whole:
        tensors = (
            best.tensors
            if progress.best_is_earlier
            else engines.whole(checkpoint.trained_parameters(model), accelerator)
        )
    elif progress.best_is_earlier and accelerator.is_main_process:
        best.put_back(model)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    model = model if whole else model_setup.empty_copy(a, config, tokenizer, tensors)
    samples, exact = examination.of(model, tokenizer)
    network = a.method == "p_tuning" or a.prefix_projection
    size = save_somewhere(lambda folder: export.save_model(model, tokenizer, folder, network), Path(a.output_dir))
    summary = {
        **progress.summary(),
        **memory.counts(model),
        "adapter_bytes": size,
        "peak_memory_mb": tracking.peak_memory_mb(),
    }
    summary |= {"exact_match": exact, "samples": samples, **measure(model, tokenizer, data)}
    export.finish(a, progress, summary)
    print(summary_lines(summary, samples, exact, a.output_dir))
    return summary


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread of gloo that meets the dying interpreter aborts it now and then, and the launcher would end the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
