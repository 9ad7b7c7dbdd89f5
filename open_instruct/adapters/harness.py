"""Base and adapters as models of the EleutherAI harness (lm-eval), soft prompts included.

The harness's own `peft=` cuts padded vocabularies and pads on the left, where a soft prompt computes something else.
Here every request is scored and answered by the functions with which this project evaluates.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_instruct.adapters import loaded
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.scoring import token_scores
from open_instruct.adapters.served import Served
from open_instruct.data.chat import render_texts
from open_instruct.errors import InputError, input_faults

SHARES = ("acc", "exact", "em", "f1", "mc1", "mc2", "pass")  # metrics from 0 to 1 begin so, or with …_acc


def load_tasks(tasks: Sequence[str], path: str | None) -> Any:
    """Load tasks with their data, before any model.

    Args:
        tasks: names of tasks.
        path: folder with further tasks, which need no network, and whose Python is run; None: no such folder.

    Returns:
        The harness's manager of tasks.

    Raises:
        InputError: lm-eval is not installed, or a task is unknown, malformed, or can't be fetched.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--lm_eval_tasks needs lm-eval: pip install '.[harness]'")
    from lm_eval.tasks import TaskManager, get_task_dict

    if path is not None and not Path(path).is_dir():
        raise InputError(f"--lm_eval_path {path} is no folder: name the one that holds the tasks")
    with input_faults(f"--lm_eval_path {path}", "mend its tasks, or name another folder"):
        manager = TaskManager(include_path=path, include_defaults=True)
        known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise InputError(
            f"the harness has no task {', '.join(unknown)}: "
            "name others, or the folder that defines them with --lm_eval_path"
        )
    remedy = "check the network, fetch their data before, or use local tasks with --lm_eval_path"
    with input_faults(f"--lm_eval_tasks {' '.join(tasks)}", remedy):
        get_task_dict(list(tasks), manager)
    return manager


def check_hard_prompts(served: Served) -> None:
    """Refuse adapters that need a text before each question: a task has texts of its own.

    Raises:
        InputError: naming one.
    """
    for name in served.hard_prompts:
        raise InputError(
            f"adapter {name} was trained behind a hard prompt, which stands before no question of the harness: measure "
            "it on a --file"
        )


def run_tasks(
    served: Served,
    tasks: Sequence[str],
    manager: Any,
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
) -> dict[str, Any]:
    """Run tasks for the base and each adapter.

    Args:
        served: base and adapters.
        tasks: names of tasks.
        manager: result of `load_tasks`.
        limit: documents of each task; None: all.
        batch_size: most rows computed at once.
        apply_chat_template: put questions into the chat template.

    Returns:
        `model`, `adapters`, `tasks`, and `figures`: for base and each adapter, "task metric" → value and interval
        (1.96 standard errors to both sides). There are no paired differences.
    """
    loaded.refuse_encoder_decoder(served.adapters.base, "--lm_eval_tasks")
    import lm_eval
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # of the current folder, where git complains if it has none
    figures: dict[str, dict[str, Any]] = {}
    for name in [BASE, *served.names]:
        model = make_model(served, name, batch_size)
        options: dict[str, Any] = {"apply_chat_template": apply_chat_template, "log_samples": False}
        result = lm_eval.simple_evaluate(model, tasks=list(tasks), limit=limit, task_manager=manager, **options)
        figures[name] = read_figures(result["results"])
    return {
        "model": served.model_name,
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "tasks": list(tasks),
        "figures": figures,
    }


def read_figures(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return value and interval of each metric of each task, from the harness's `results`."""
    figures = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(
                ","
            )  # "exact_match,strict-match"; "none" where answers are not filtered
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            interval = None
            error = values.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, (int, float)) and math.isfinite(error):
                interval = [value - 1.96 * error, value + 1.96 * error]
                if 0 <= value <= 1 and (metric.startswith(SHARES) or metric.endswith("_acc")):
                    interval = [max(0.0, interval[0]), min(1.0, interval[1])]
            name = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            figures[name] = {"value": value, "interval": interval}
    return figures


def make_model(served: Served, name: str, batch_size: int) -> Any:
    """Return a harness model that runs one adapter (or "base")."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """Scores and answers through the adapter."""

        tokenizer = served.tokenizer
        eot_token_id = served.tokenizer.eos_token_id
        prefix_token_id = (
            served.tokenizer.bos_token_id
            if served.tokenizer.bos_token_id is not None
            else served.tokenizer.eos_token_id
        )
        tokenizer_name = served.tokenizer.name_or_path.replace("/", "__")
        max_length = served.max_length(name) or 1 << 30  # a model that names no limit

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            """Return token ids; special ones as the tokenizer adds them, unless the text has them already."""
            bos = served.tokenizer.bos_token
            special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
            return served.tokenizer(string, add_special_tokens=special)["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            rows = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
            scores = token_scores(served.adapters.use(name), rows, batch_size)
            likelihoods = []
            for (_, _, continuation), (losses, likeliest) in zip(requests, scores, strict=True):
                first = max(len(losses) - len(continuation), 0)
                likelihoods.append((-losses[first:].double().sum().item(), bool(likeliest[first:].all())))
            return likelihoods

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Return the log-likelihood of each text, scored in pieces as long as the context allows."""
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            likelihoods = []
            for (text,) in (request.args for request in requests):
                ids = self.tok_encode(text, add_special_tokens=False)
                windows = map(
                    make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
                )
                pieces = [(("", ""), list(context), list(continuation)) for context, continuation in windows]
                likelihoods.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
            return likelihoods

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Return answers, each cut at the first of its request's stop texts."""
            answers = [""] * len(requests)
            groups: dict[Sampling, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(sampling_of(request.args[1]), []).append(index)
            for sampling, indices in groups.items():
                if sampling.max_new_tokens >= self.max_length:
                    raise InputError(
                        f"a task wants {sampling.max_new_tokens} new tokens, and the model has {self.max_length} "
                        "positions for question and answer: choose another task"
                    )
                longest = max(self.max_length - sampling.max_new_tokens, 1)
                prompts = [self.tok_encode(requests[i].args[0])[-longest:] for i in indices]
                for i, texts in served.stream(prompts, name, sampling, batch_size):
                    stops = requests[indices[i]].args[1].get("until") or []
                    answers[indices[i]] = cut_at([stops] if isinstance(stops, str) else stops, texts[0])
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """Return a conversation as text."""
            (text,), _ = render_texts(served.tokenizer, [chat_history], add_generation_prompt=add_generation_prompt)
            return text

    return Model()


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Return how a task wants answers to be drawn, from its `generation_kwargs`."""
    temperature = options.get("temperature") or 0.0
    draw = bool(options.get("do_sample")) and temperature > 0
    return Sampling(
        max_new_tokens=options.get("max_gen_toks", 256),
        do_sample=draw,
        temperature=temperature if draw else 1.0,
        top_p=options.get("top_p") or 1.0,
        top_k=options.get("top_k") or 0,
    )


def cut_at(stops: Sequence[str], answer: str) -> str:
    """Return an answer up to the first stop text."""
    ends = [answer.find(stop) for stop in stops if stop and stop in answer]
    return answer[: min(ends)] if ends else answer
