"""Tasks that each run in a process of their own, a few at a time."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

POLL_S = 0.5


def run_in_processes(
    tasks: Sequence[Callable[[], object]], workers: int, on_poll: Callable[[list[int | None]], None] | None = None
) -> list[int]:
    """Run every task in a new process and return the exit codes in order, 0 where the task ended without an exception.

    A failed task does not stop the others. If the caller is interrupted, the running processes are terminated.

    Args:
        tasks: Picklable functions without arguments, such as functools.partial of a module's function, first to last.
        workers: Processes that run at the same time, >= 1.
        on_poll: Called when a process ends, and at least every POLL_S seconds, with the exit codes, None while a task
            has not ended.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    processes = [context.Process(target=task) for task in tasks]
    waiting, running = processes.copy(), []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                waiting[0].start()
                running.append(waiting.pop(0))
            wait([process.sentinel for process in running], POLL_S)
            running = [process for process in running if process.is_alive()]
            if on_poll:
                on_poll([process.exitcode for process in processes])
    finally:
        for process in running:
            process.terminate()
            process.join()
    return [process.exitcode for process in processes]
