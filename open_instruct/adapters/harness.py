"""Base and adapters as models of the EleutherAI harness (lm-eval), soft prompts included.

The harness's own `peft=` cuts padded vocabularies and pads on the left, where a soft prompt computes something else; here every request is
scored and answered by the functions that this project evaluates with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.scoring import token_scores
from open_instruct.adapters.served import Served
from open_instruct.errors import InputError


def evaluate(
    served: Served,
    tasks: Sequence[str],
    path: str | None,
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
) -> dict[str, Any]:
    """Run tasks for the base and each adapter.

    Args:
        served: base and adapters.
        tasks: names of tasks.
        path: folder with further tasks; where it is given, no network is needed for them.
        limit: documents of each task; None: all.
        batch_size: rows computed at once at most.
        apply_chat_template: put questions into the chat template.

    Returns:
        figures: for base and each adapter, "task metric" → value and interval (1.96 standard errors); no paired differences.

    Raises:
        InputError: lm-eval is not installed, or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--lm_eval_tasks needs lm-eval: pip install '.[harness]'")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path, include_defaults=True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"the harness has no task {', '.join(unknown)}: name others, or the folder that defines them with --lm_eval_path"
        )
    figures: dict[str, dict[str, Any]] = {}
    for name in [BASE, *served.names]:
        model = make_model(served, name, batch_size)
        options: dict[str, Any] = {"apply_chat_template": apply_chat_template, "log_samples": False}
        result = lm_eval.simple_evaluate(model, tasks=list(tasks), limit=limit, task_manager=manager, **options)
        figures[name] = read_figures(result["results"])
    return {
        "model": str(served.adapters.base.config._name_or_path),
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "tasks": list(tasks),
        "figures": figures,
    }


def read_figures(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Value and interval of each metric of each task."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            margin = 1.96 * error if isinstance(error, (int, float)) else None
            found[f"{task} {metric}" + ("" if kind == "none" else f" ({kind})")] = {
                "value": value,
                "interval": None if margin is None else [value - margin, value + margin],
            }
    return found


def make_model(served: Served, name: str, batch_size: int) -> Any:
    """A harness model that runs one adapter (or "base")."""
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
        room = served.room(name) or 1 << 30

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            """Token ids; special ones as the tokenizer adds them, unless the text has them already."""
            bos = served.tokenizer.bos_token
            special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
            return served.tokenizer(string, add_special_tokens=special)["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            rows = [(context + continuation)[-self.room :] for _, context, continuation in requests]
            scores = token_scores(served.adapters.use(name), rows, batch_size)
            found = []
            for (_, _, continuation), (losses, likeliest) in zip(requests, scores, strict=True):
                first = max(len(losses) - len(continuation), 0)
                found.append((-losses[first:].double().sum().item(), bool(likeliest[first:].all())))
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, in pieces as long as the context allows."""
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            found = []
            for (text,) in (request.args for request in requests):
                ids = self.tok_encode(text, add_special_tokens=False)
                windows = map(
                    make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.room - 1, 1)
                )
                pieces = [(("", ""), list(context), list(continuation)) for context, continuation in windows]
                found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Answers, cut at the first of each request's stop texts."""
            found = [""] * len(requests)
            groups: dict[Sampling, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(sampling_of(request.args[1]), []).append(number)
            for sampling, numbers in groups.items():
                if sampling.max_new_tokens >= self.room:
                    raise InputError(
                        f"a task wants {sampling.max_new_tokens} new tokens, and there is room for {self.room}: choose another task"
                    )
                prompts = [
                    self.tok_encode(requests[i].args[0])[-max(self.room - sampling.max_new_tokens, 1) :]
                    for i in numbers
                ]
                for place, answers in served.stream(prompts, name, sampling, batch_size):
                    stops = requests[numbers[place]].args[1].get("until") or []
                    found[numbers[place]] = cut([stops] if isinstance(stops, str) else stops, answers[0])
            return found

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """A conversation as text."""
            return str(
                served.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

    return Model()


def sampling_of(options: dict[str, Any]) -> Sampling:
    """What a task asks of generation."""
    temperature = options.get("temperature") or 0.0
    draw = bool(options.get("do_sample")) and temperature > 0
    return Sampling(
        max_new_tokens=options.get("max_gen_toks", 256),
        do_sample=draw,
        temperature=temperature if draw else 1.0,
        top_p=options.get("top_p") or 1.0,
        top_k=options.get("top_k") or 0,
    )


def cut(stops: Sequence[str], answer: str) -> str:
    """An answer up to the first stop text."""
    ends = [answer.find(stop) for stop in stops if stop and stop in answer]
    return answer[: min(ends)] if ends else answer
