"""One run, from flags to saved adapter. It reads downwards: setup, data, model, method, fit, save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from open_instruct.flags import Flags
from open_instruct.methods import model_facts
from open_instruct.model import memory
from open_instruct.quiet import silence_transformers
from open_instruct.report.summary import hyperparameter_lines, summary_lines
from open_instruct.training import (
    base_model,
    checkpoint,
    dry_run,
    engines,
    forward,
    output,
    sample_answers,
    settings,
    sharding,
    start,
    tracking,
)
from open_instruct.training.continuing import adopt_adapter, copy_for_saving, put_adapter_on
from open_instruct.training.doctor import Doctor
from open_instruct.training.faults import explained_faults
from open_instruct.training.load_data import Data, load_data
from open_instruct.training.loop import TrainingJob, fit
from open_instruct.training.optimizer import make_optimizer
from open_instruct.training.settings import Resolved
from open_instruct.training.state import History, TrainState, median_norm


def run(
    flags: Flags,
    given: dict[str, str],
    bases: base_model.Bases | None = None,
    measure: Callable[[Any, Any, Data], dict[str, Any]] = lambda model, tokenizer, data: {},
) -> dict[str, Any] | None:
    """Train as the flags say.

    Args:
        flags: checked by `flags.check_flags`.
        given: where each flag that was given comes from.
        bases: base models that earlier runs of this process loaded (one process only); None: the base is read anew.
        measure: takes trained model, tokenizer and data at the end, and returns further entries of summary.json.

    Returns:
        The summary on the main process; None elsewhere and if nothing was to be trained.

    Raises:
        InputError: the flags, the files or the machine don't allow the run.
        Preempted: a signal stopped it.
    """
    silence_transformers()
    tracking.reset_peak_memory()

    # Setup
    flags, given, adapter = adopt_adapter(flags, given)
    config = base_model.load_base_config(settings.base_model_settings(flags))
    before = settings.before_data(flags, given, config, adapter)
    saved = output.check_folder(before.output)
    tracking.check_trackers(before.tracking)
    accelerator = engines.make_accelerator(before.processes)
    engine = engines.engine_of(accelerator)
    before.check_engine(engine)
    is_sharded, method = engines.is_sharded(engine), before.method
    accelerator.print(f"{method.title}: {engines.describe(accelerator, before.model.dtype, before.model.quantise)}")

    # Data
    tokenizer = base_model.load_base_tokenizer(before.tokenizer, adapter)
    data = load_data(before.data, accelerator, tokenizer)
    if flags.cache_dataset_only:
        accelerator.print(f"tokenised data is in {before.data.cache_dir}/{data.train.fingerprint}")
        return None
    before.forward.check_rows(data.longest)

    # Model
    base = (bases.take if bases else base_model.load_base)(before.model, config, tokenizer, accelerator)
    num_questions = 0 if is_sharded or flags.dry_run else flags.num_sample_answers
    questions = sample_answers.draw_questions(data.held_out, tokenizer, num_questions, before.data.seed)
    samples = sample_answers.ask_base(base, tokenizer, questions, before.answer_length)

    # Method
    facts = engines.broadcast(model_facts(base, tokenizer, method.wants_keys))
    resolved = settings.with_recipe(before, facts, is_sharded)
    torch.manual_seed(flags.seed)  # the same start on every process
    model = put_adapter_on(base, tokenizer, method, resolved.method_settings, adapter)
    is_new = adapter is None and saved is None and not flags.dry_run
    candidates = start.init_candidates(method, resolved.method_settings, model, tokenizer) if is_new else []
    pad = tokenizer.pad_token_id
    chosen = forward.choose_forward(model, method, before.forward, accelerator, before.compute_dtype, pad)
    accelerator.print(f"forward pass: {chosen.description}")
    plan = before.plan(len(data.train), accelerator.num_processes)
    with chosen:
        start.search_init(method, candidates, accelerator, chosen, data.train, plan)
        resolved, rates = start.search_rate(resolved, saved, accelerator, chosen, data.train, plan)
        shown, origins = resolved.shown(), resolved.origins
        accelerator.print(hyperparameter_lines(method.title, shown, origins, resolved.recipe_sources))
        if flags.dry_run:
            accelerator.print(dry_run.plan_text(resolved, data, plan, model, config, chosen.training, accelerator))
            return None

        # Fit
        vectors = method.prompt_vectors(model) if accelerator.is_main_process or not is_sharded else None
        forward.switch_on(chosen, flags.gradient_checkpointing, flags.compile)
        if is_sharded:
            sharding.shard(chosen.model, forward.decoder_layers(forward.causal_of(model)), accelerator)
        clip = resolved.optimizer.clip_grad_norm
        optimizer, schedule = make_optimizer(method, chosen.model, resolved.optimizer, plan.num_steps)
        prepared, optimizer = engines.prepare(accelerator, chosen.model, optimizer, clip)
        identity = engines.broadcast(resolved.identity(data, config, plan))
        state = TrainState(identity=identity, history=History(prompt_norm=median_norm(vectors)))
        if saved:
            state = checkpoint.restore(saved, model, optimizer, schedule, identity, accelerator)
        elif flags.resume_from_checkpoint:
            accelerator.print(f"no complete checkpoint in {before.output.checkpoints} yet: starting at step 0")
        record = resolved.record(data, accelerator.num_processes, engine, saved) | output.environment()
        output.open_folder(before.output, accelerator, record, vectors, rates, resumed=saved is not None)
        tracking.start_trackers(before.tracking, accelerator, resolved.values())
        metrics = tracking.Metrics(before.output.folder / tracking.METRICS, accelerator, plan.num_steps, state.step)
        doctor = Doctor(resolved.run_info(data, plan, facts), state.history)
        loop = resolved.loop(plan)
        job = TrainingJob(accelerator, prepared, optimizer, schedule, method, chosen, data, plan, loop, metrics, doctor)
        with metrics, explained_faults(accelerator, state, before.output.checkpoints):
            fit(job, state)

    # Save
    summary = save_result(resolved, job, state, config, tokenizer, model, samples, measure)
    if bases:
        bases.give_back(before.model, model)
    tracking.end_trackers(accelerator)
    return summary


def save_result(
    resolved: Resolved,
    job: TrainingJob,
    state: TrainState,
    config: Any,
    tokenizer: Any,
    model: Any,
    samples: sample_answers.SampleAnswers,
    measure: Callable[[Any, Any, Data], dict[str, Any]],
) -> dict[str, Any] | None:
    """Take the best parameters or the last ones, let the model answer, and write the run's results.

    Returns:
        The summary on the main process, None elsewhere.
    """
    accelerator, method, folder = job.accelerator, job.method, resolved.output.folder
    is_sharded = engines.is_sharded(engines.engine_of(accelerator))
    if state.best_is_earlier:
        accelerator.print(state.best_text())
    trained = state.best
    if is_sharded and not state.best_is_earlier:
        trained = sharding.gather_full(sharding.trained_parameters(model), accelerator)
    if not is_sharded and state.best_is_earlier and accelerator.is_main_process:
        state.restore_best(model)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    if is_sharded:
        model = copy_for_saving(
            resolved.model, config, tokenizer, method, resolved.method_settings, resolved.adapter, trained
        )
    answers, exact_match = samples.compare(model, tokenizer)
    keep_network = method.keeps_network(resolved.method_settings)
    num_bytes = output.save_somewhere(lambda path: output.save_model(model, tokenizer, path, keep_network), folder)
    summary = {
        **state.summary(),
        **memory.counts(model),
        "adapter_bytes": num_bytes,
        "peak_memory_mb": tracking.peak_memory_mb(),
        "exact_match": exact_match,
        "samples": answers,
        **measure(model, tokenizer, job.data),
    }
    output.finish(resolved.output, state, summary, f"{method.name}: {folder.name}")
    print(summary_lines(summary, answers, exact_match, str(resolved.flags.output_dir)))
    return summary
