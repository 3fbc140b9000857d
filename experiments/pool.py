"""Independent tasks in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


def execute(tasks: Mapping[str, Callable[[], Any]], jobs: int) -> Iterator[tuple[str, Any]]:
    """Call every task, and yield its key and its result as soon as it has finished.

    Args:
        tasks: callables by key. With more than one job they must be picklable, as module-level functions and `functools.partial` are.
        jobs: number of processes, each with one thread. 1 calls the tasks in this process, with the threads that it has.
    """
    if jobs == 1:
        for key, task in tasks.items():
            yield key, task()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            # Ctrl-C reaches all processes. They inherit that it is ignored, and this one ends them.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                keys = {pool.submit(task): key for key, task in tasks.items()}
            finally:
                signal.signal(signal.SIGINT, handler)
            for future in as_completed(keys):
                yield keys[future], future.result()
        except (KeyboardInterrupt, GeneratorExit):  # GeneratorExit: Ctrl-C came while the caller worked on a result
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
