"""One run, from flags to saved adapter. It reads downwards: setup, data, model, method, fit, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from open_instruct.data.context import Context, RowContexts
from open_instruct.data.hard_prompt import KEY
from open_instruct.data.plan import Plan
from open_instruct.data.sources import mixture_of
from open_instruct.errors import warn
from open_instruct.flags import Flags
from open_instruct.flags.combinations import parse_weights
from open_instruct.methods import model_facts
from open_instruct.model import memory
from open_instruct.model.away_from_start import away_from_start
from open_instruct.model.distillation import DistilledModel
from open_instruct.model.fit import try_out
from open_instruct.model.precision import autocast
from open_instruct.quiet import silence_transformers
from open_instruct.report.summary import hyperparameter_lines, summary_lines
from open_instruct.training import (
    base_model,
    checkpoint,
    distilling,
    dry_run,
    engines,
    forward,
    forward_pairs,
    identity,
    output,
    quantised_base,
    sample_answers,
    settings,
    sharding,
    start,
    tracking,
)
from open_instruct.training.continuing import adopt_adapter, copy_for_saving, put_adapter_on
from open_instruct.training.doctor import Doctor
from open_instruct.training.ending import check_patience, end_text
from open_instruct.training.evaluation import source_summary
from open_instruct.training.faults import explained_faults
from open_instruct.training.hard_prompts import with_hard_prompt
from open_instruct.training.load_data import Data, load_data
from open_instruct.training.loop import TrainingJob, fit, stop_at_end
from open_instruct.training.optimizer import make_optimizer
from open_instruct.training.preemption import Preempted, RunGuard
from open_instruct.training.settings import Resolved, Settings
from open_instruct.training.state import History, TrainState, median_norm


def run(
    flags: Flags,
    given: dict[str, str],
    guard: RunGuard,
    bases: base_model.Bases | None = None,
    measure: Callable[[Any, Any, Data], dict[str, Any]] = lambda model, tokenizer, data: {},
) -> dict[str, Any] | None:
    """Train as the flags say.

    Args:
        flags: checked by `flags.check_flags`.
        given: where each flag that was given comes from.
        guard: entered by the caller; it handles signals, and unlocks the run's folder at its end.
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
    config = base_model.load_base_config(base_model.base_model_settings(flags), needs_weights=not flags.dry_run)
    before = settings.before_data(flags, given, config, adapter)
    saved = output.occupy_folder(before.output, guard)
    tracking.check_trackers(before.tracking)
    accelerator = engines.make_accelerator(before.processes)
    engine = engines.engine_of(accelerator)
    before.check_engine(engine)
    engines.check_agreement(accelerator, identity.of_processes(before, saved))
    is_sharded, method = engines.is_sharded(engine), before.method
    described = engines.describe(accelerator, before.model.dtype, before.model.quantise, before.compute_dtype)
    accelerator.print(f"{method.title}: {described}")

    # Data
    tokenizer = base_model.load_base_tokenizer(before.tokenizer, before.adapter)
    before = with_hard_prompt(before, config, tokenizer)
    inputs = read_inputs(before, config, tokenizer, saved, accelerator)
    if inputs is None:
        return None
    data, context, plan = inputs.data, inputs.context, inputs.plan

    # Model
    load = base_model.load_or_count if flags.dry_run else bases.take if bases else base_model.load_base
    base = load(before.model, config, tokenizer, accelerator)
    with autocast(accelerator.device.type, before.compute_dtype):
        quantisation = quantised_base.check_quantised(base, before.model)
    for line in quantisation.lines:
        accelerator.print(line)
    num_questions = 0 if is_sharded or flags.dry_run else flags.num_sample_answers
    questions = sample_answers.draw_questions(data, tokenizer, num_questions, before.data.seed)
    with autocast(accelerator.device.type, before.compute_dtype):
        samples = sample_answers.ask_base(base, tokenizer, questions, before.answer_length)

    # Method
    facts = engines.broadcast(model_facts(base, tokenizer, method.wants_keys))
    resolved = settings.with_recipe(before, facts, is_sharded)
    unweighed = dry_run.unweighed(before, facts, base) if flags.dry_run else None
    torch.manual_seed(flags.seed)  # the same start on every process
    model = put_adapter_on(base, tokenizer, method, resolved.method_settings, adapter, before.model.revision)
    is_new = adapter is None and saved is None and not flags.dry_run
    starts = start.Starts()
    if is_new:
        text = context if isinstance(context, Context) and not is_sharded else None  # else no process can compute it
        starts = start.init_candidates(method, resolved.method_settings, model, tokenizer, text)
    pad = tokenizer.pad_token_id
    choose = forward_pairs.choose_pair_forward if config.is_encoder_decoder else forward.choose_forward
    passes = before.forward.with_beginnings(data.train, data.held_out)
    with away_from_start(model) if method.probed_away_from_start else nullcontext():
        chosen = choose(model, method, passes, accelerator, before.compute_dtype, pad)
    chosen = distilling.distilled(chosen, before.distillation, context, accelerator, before.compute_dtype)
    engines.check_agreement(accelerator, {"attention": chosen.attention})
    accelerator.print(f"forward pass: {chosen.description}")
    with chosen:
        starts = start.with_attended(starts, method, accelerator, chosen, data.train, plan)
        start.search_init(method, starts, accelerator, chosen, data.train, plan)
        resolved, rates = start.search_rate(resolved, saved, accelerator, chosen, data.train, plan)
        shown, origins = resolved.shown() | (unweighed.unknown if unweighed else {}), resolved.origins
        accelerator.print(hyperparameter_lines(method.title, shown, origins, resolved.recipe_sources))
        if flags.dry_run:
            accelerator.print(dry_run.plan_text(resolved, data, plan, model, config, chosen, accelerator, unweighed))
            return None

        # Fit
        vectors = method.prompt_vectors(model) if accelerator.is_main_process or not is_sharded else None
        forward.switch_on(chosen, flags.gradient_checkpointing, flags.compile)
        if is_sharded:
            if isinstance(chosen.model, DistilledModel):
                chosen.model.forget_context()  # all processes compute it together
            sharding.shard(chosen.model, forward.decoder_layers(forward.causal_of(model)), accelerator)
        clip = resolved.optimizer.clip_grad_norm
        optimizer, schedule = make_optimizer(resolved.groups(chosen.model), resolved.optimizer, plan.num_steps)
        prepared, optimizer = engines.prepare(accelerator, chosen.model, optimizer, clip)
        own = engines.broadcast(identity.of_run(inputs.identity, resolved, chosen.attention))
        state = TrainState(history=History(prompt_norm=median_norm(vectors)))
        if saved:
            identity.check_resumed(saved, own)
            state = checkpoint.restore(saved, model, optimizer, schedule, accelerator)
        elif flags.resume_from_checkpoint:
            accelerator.print(f"no complete checkpoint in {before.output.checkpoints} yet: starting at step 0")
        state.identity = own
        hard = {KEY: before.data.hard_prompt.record()} if before.data.hard_prompt else {}
        hard |= quantisation.record
        record = resolved.record(data, accelerator.num_processes, engine, saved) | hard | output.environment()
        folder = output.open_folder(before.output, accelerator, record, vectors, rates, saved)
        tracking.start_trackers(before.tracking, accelerator, resolved.values())
        metrics = tracking.Metrics(before.output.folder / tracking.METRICS, accelerator, plan.num_steps, state.step)
        doctor = Doctor(resolved.run_info(data, plan, facts), state.history)
        loop = resolved.loop(plan)
        job = TrainingJob(
            accelerator, prepared, optimizer, schedule, method, chosen, data, plan, loop, metrics, doctor, folder, guard
        )
        with metrics, explained_faults(accelerator, state, before.output.checkpoints):
            worth = distilling.worth_of_context(accelerator, prepared, chosen, data.held_out_answers)
            fit(job, state)

    # Save
    summary = save_result(resolved, job, state, config, tokenizer, model, samples, worth, measure)
    if bases:
        bases.give_back(before.model, model)
    tracking.end_trackers(accelerator)
    return summary


@dataclass(frozen=True)
class Inputs:
    """What a run reads before its model."""

    data: Data
    context: Context | RowContexts | None
    plan: Plan
    identity: dict[str, Any]  # what a resumed run must share, as far as it is known without the model


def read_inputs(
    before: Settings, config: Any, tokenizer: Any, saved: checkpoint.Checkpoint | None, accelerator: Accelerator
) -> Inputs | None:
    """Read examples and context, and compare them between processes and with the checkpoint.

    Returns:
        None where the run only fills the token cache.

    Raises:
        InputError: they can't be used, or belong to another run.
    """
    data = load_data(before.data, accelerator, tokenizer)
    if before.flags.cache_dataset_only:
        accelerator.print(data.cached())
        return None
    if before.flags.keep_best and (line := data.too_few()):
        accelerator.print(line)
    before.forward.check_rows(data.longest)
    flags = before.flags
    weights = parse_weights(flags.source_weights) if flags.source_weights else None
    mixture = mixture_of(data.train.sources, weights, flags.mixture_temperature, flags.seed)
    plan = before.plan(len(data.train), accelerator.num_processes, mixture)
    if mixture:
        accelerator.print(mixture.describe())
    check_patience(before.flags.patience, before.eval_steps(plan), plan.num_steps)
    context = distilling.context_of_run(before.data.context, data, tokenizer)
    distilling.check_room(context, data, config)
    if context:
        accelerator.print(context.describe())
    own = identity.of_data(before, data, context, config, plan, accelerator.num_processes)
    engines.check_agreement(accelerator, own)
    if saved:
        identity.check_resumed(saved, own)
    return Inputs(data, context, plan, own)


def save_result(
    resolved: Resolved,
    job: TrainingJob,
    state: TrainState,
    config: Any,
    tokenizer: Any,
    model: Any,
    samples: sample_answers.SampleAnswers,
    worth: Mapping[str, Any],
    measure: Callable[[Any, Any, Data], dict[str, Any]],
) -> dict[str, Any] | None:
    """Write the best parameters or the last ones, then let the model answer, and write the rest of the results.

    Returns:
        The summary on the main process, None elsewhere.

    Raises:
        InputError: the trained model computes what is not finite.
        Preempted: a signal arrived before the answers were there; a checkpoint of the last step is written.
    """
    accelerator, method = job.accelerator, job.method
    is_sharded = engines.is_sharded(engines.engine_of(accelerator))
    if state.best_is_earlier:
        accelerator.print(state.best_text())
    trained = state.best
    if is_sharded and not state.best_is_earlier:
        trained = sharding.gather_full(sharding.trained_parameters(model), accelerator)
    is_exchanged = not is_sharded and state.best_is_earlier and accelerator.is_main_process
    if is_exchanged:
        state.exchange_best(model)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    if is_sharded:
        model = copy_for_saving(
            resolved.model, config, tokenizer, method, resolved.method_settings, resolved.adapter, trained
        )
    elif not resolved.flags.compile:  # it would compile for this alone
        with (
            explained_faults(accelerator, state, resolved.output.checkpoints),
            autocast(accelerator.device.type, resolved.compute_dtype),
        ):
            try_out(model, "the trained model", "lower --learning_rate", training=False)
    keep_network = method.keeps_network(resolved.method_settings)
    num_bytes = output.save_somewhere(
        lambda folder: output.save_model(model, tokenizer, folder, keep_network), job.folder
    )
    answers: list[dict[str, str]] = []
    exact_match, measured = None, {}
    try:
        with job.guard.stoppable(), autocast(accelerator.device.type, resolved.compute_dtype):
            answers, exact_match = samples.compare_or_warn(model, tokenizer)
            measured = measure(model, tokenizer, job.data)
    except Preempted:
        if checkpoint.can_save_alone(accelerator):
            if is_exchanged:
                state.exchange_best(model)
            stop_at_end(job, state)
        warn(f"stopped by {job.guard.signal}: the sample answers are left out, everything else is saved")
    summary = {
        **state.summary(),
        "by_source": source_summary(state, job.data.held_out),
        "ended_by": end_text(state, job.plan.num_steps),
        **memory.counts(model),
        "adapter_bytes": num_bytes,
        "peak_memory_mb": tracking.peak_memory_mb(),
        "exact_match": exact_match,
        "samples": answers,
        **worth,
        **measured,
    }
    output.finish(resolved.output, job.folder, state, summary, f"{method.name}: {job.folder.path.name}")
    print(summary_lines(summary, answers, exact_match, str(resolved.flags.output_dir)))
    return summary
