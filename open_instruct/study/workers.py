"""Who runs the trials: this process, several processes with a GPU each, or Ray's actors. Each reads a base model once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from open_instruct.errors import InputError
from open_instruct.study.trials import Task, run_trial
from open_instruct.training.model_setup import Bases

Runner = Callable[
    [list[Task]], Iterator[tuple[Task, dict[str, Any]]]
]  # yields a task and its result as soon as it is done

_bases = Bases()  # of a worker process


def choose(workers: int, engine: str) -> AbstractContextManager[Runner]:
    """The runner for a number of workers.

    Args:
        workers: trials at a time.
        engine: "local" or "ray".

    Raises:
        InputError: Ray is asked for and not installed.
    """
    if engine == "ray":
        return with_ray(workers)
    return here() if workers == 1 else with_processes(workers)


@contextmanager
def here() -> Iterator[Runner]:
    """One trial after another in this process."""
    bases = Bases()
    yield lambda tasks: ((task, run_trial(task, bases)) for task in tasks)


@contextmanager
def with_processes(workers: int) -> Iterator[Runner]:
    """Several processes; each sees one GPU, where there are any, and its share of the CPU's cores."""
    context = get_context("spawn")
    numbers: Queue[int] = context.Queue()
    for number in range(workers):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, _settle, (numbers, torch.cuda.device_count(), threads)) as pool:

        def run(tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
            futures = {pool.submit(_in_worker, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield run
        except (
            BaseException
        ):  # the study is stopped: its workers are told, and save where their trials keep checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def _settle(numbers: Queue[int], devices: int, threads: int) -> None:
    """A worker's first act, before anything touches a GPU."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    number = numbers.get()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % devices)
    torch.set_num_threads(threads)


def _follow(parent: int) -> None:
    """End with the study's process, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_worker(task: Task) -> dict[str, Any]:
    return run_trial(task, _bases)


@contextmanager
def with_ray(workers: int) -> Iterator[Runner]:
    """Ray's actors on the cluster that RAY_ADDRESS names, or on this machine; each has a GPU where the cluster has any.

    All nodes must see this folder, the data and the model under the same paths, as on a shared file system.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install '.[ray]'") from None
    code = str(Path(__file__).resolve().parents[2])
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": code}})
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    actor = ray.remote(num_gpus=int(on_gpu), num_cpus=1)(Actor)
    pool = ActorPool([actor.remote(os.getcwd()) for _ in range(workers)])

    def run(tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        yield from pool.map_unordered(lambda one, task: one.run.remote(task), tasks)

    try:
        yield run
    finally:
        ray.shutdown()


class Actor:
    """A process of Ray's that keeps its base models."""

    def __init__(self, folder: str) -> None:
        """`folder`: where the study was started; its paths count from there."""
        os.chdir(folder)

    def run(self, task: Task) -> tuple[Task, dict[str, Any]]:
        """A trial."""
        return task, _in_worker(task)


def mine(items: Iterable[Any], shard: tuple[int, int]) -> list[Any]:
    """Every n-th item from the i-th, for shard (i, n)."""
    number, of = shard
    return list(items)[number::of]
