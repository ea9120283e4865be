"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Makes a `multiprocessing` worker end when its parent does, even if the parent is killed.

    Call it first in the worker. The worker ignores Ctrl-C, which a terminal sends to both; the parent handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process of multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
