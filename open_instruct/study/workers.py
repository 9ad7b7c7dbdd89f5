"""Runners of trials: this process, several processes with a GPU each, or Ray's actors. Each loads a base once."""

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
from typing import Any, TypeVar

import torch

from open_instruct.errors import InputError
from open_instruct.study.trials import Task, run_trial
from open_instruct.training.base_model import Bases

Item = TypeVar("Item")
# Runs tasks, and yields each with its outcome as soon as it has finished.
Runner = Callable[[list[Task]], Iterator[tuple[Task, dict[str, Any]]]]

# The base models of a worker process. A module's variable, because a pool's worker outlives each of its tasks and
# nothing else does: the next task finds the weights loaded. Empty in the study's own process.
_bases = Bases()


def choose_runner(num_workers: int, engine: str) -> AbstractContextManager[Runner]:
    """Return the runner for a number of workers.

    Args:
        num_workers: trials at a time.
        engine: "local" or "ray".

    Raises:
        InputError: Ray is chosen and not installed.
    """
    if engine == "ray":
        return with_ray(num_workers)
    return in_this_process() if num_workers == 1 else with_processes(num_workers)


@contextmanager
def in_this_process() -> Iterator[Runner]:
    """Run one trial after another in this process."""
    bases = Bases()
    yield lambda tasks: ((task, run_trial(task, bases)) for task in tasks)


@contextmanager
def with_processes(num_workers: int) -> Iterator[Runner]:
    """Run trials in several processes; each sees one GPU, where there are any, and its share of the CPU's cores."""
    context = get_context("spawn")
    indices: Queue[int] = context.Queue()
    for index in range(num_workers):
        indices.put(index)
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    initial = (indices, torch.cuda.device_count(), num_threads)
    with ProcessPoolExecutor(num_workers, context, _start_worker, initial) as pool:

        def run(tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
            futures = {pool.submit(_run_in_worker, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield run
        except BaseException:  # SIGTERM makes each worker save its trial's checkpoint, if the trial keeps any
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def _start_worker(indices: Queue[int], num_gpus: int, num_threads: int) -> None:
    """Choose a worker's GPU and threads, before anything touches a GPU."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    index = indices.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % num_gpus)
    torch.set_num_threads(num_threads)


def _exit_with_parent(parent: int) -> None:
    """End this process when the study's process has ended, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(task: Task) -> dict[str, Any]:
    return run_trial(task, _bases)


@contextmanager
def with_ray(num_workers: int) -> Iterator[Runner]:
    """Run trials in Ray's actors, on the cluster that RAY_ADDRESS names, or on this machine.

    Each actor has a GPU where the cluster has any. All nodes must see this folder, the data and the model under the
    same paths, as on a shared file system.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install '.[ray]'") from None
    root = str(Path(__file__).resolve().parents[2])
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    remote_actor = ray.remote(num_gpus=int(has_gpus), num_cpus=1)(Actor)
    pool = ActorPool([remote_actor.remote(os.getcwd()) for _ in range(num_workers)])

    def run(tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        yield from pool.map_unordered(lambda actor, task: actor.run.remote(task), tasks)

    try:
        yield run
    finally:
        ray.shutdown()


class Actor:
    """A process of Ray's that keeps its base models."""

    def __init__(self, folder: str) -> None:
        """Enter the folder in which the study was started: its paths count from there."""
        os.chdir(folder)

    def run(self, task: Task) -> tuple[Task, dict[str, Any]]:
        """Run a trial and return it with its outcome."""
        return task, _run_in_worker(task)


def shard_of(items: Iterable[Item], shard: tuple[int, int]) -> list[Item]:
    """Return every N-th item from the I-th, for shard (I, N)."""
    index, num_shards = shard
    return list(items)[index::num_shards]
