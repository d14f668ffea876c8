"""Processes for the tests, forked from one that has imported what training needs, which takes seconds (see conftest.py).

What has to do with the start itself (imports, options of the interpreter, the program's entry) takes true processes.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from flowback.cli import main

FORKING = multiprocessing.get_context("forkserver")


class Forked:
    """A process that calls a function of a module, in a session of its own. Its methods are those of `subprocess.Popen`.

    Args:
        function: whose result is the exit status.
        environment: all of it; that of the tests if none.

    Attributes:
        stdin: to be closed; nothing can be written.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        pairs = [FORKING.Pipe(duplex=False) for _ in ("input", "output", "errors")]
        self.stdin, self.pipes = pairs[0][1], [reader for reader, _ in pairs[1:]]
        pipes = [pairs[0][0], *(writer for _, writer in pairs[1:])]
        known = dict(os.environ if environment is None else environment)
        self.process = FORKING.Process(target=_call, args=(pipes, known, os.getcwd(), function, arguments))
        self.process.start()
        for pipe in pipes:
            pipe.close()
        atexit.register(self.kill)  # before `multiprocessing` waits for it

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 120) -> int | None:
        self.process.join(timeout)
        return self.returncode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it wrote to its output and as errors, once no process holds them any more."""
        until, said = time.monotonic() + timeout, dict.fromkeys(self.pipes, b"")
        while pipes := [pipe for pipe in self.pipes if not pipe.closed]:
            ready = wait(pipes, until - time.monotonic())
            assert ready, "the process does not end"
            for pipe in ready:
                chunk = os.read(pipe.fileno(), 2**16)
                said[pipe] += chunk
                if not chunk:
                    pipe.close()
        self.wait()
        output, errors = (said[pipe].decode() for pipe in self.pipes)
        return output, errors


def _call(
    pipes: list[Connection], environment: dict[str, str], folder: str, function: Callable[..., Any], arguments: tuple
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process of the background may ignore
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def program(words: list[str]) -> int:
    """The command `flowback`, which another process can be started by, too."""
    sys.argv = [str(Path(sys.executable).with_name("flowback")), *words]
    return main()


def torchrun(processes: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in processes of torchrun's agent, which has them forked."""
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "tests"}
    agent = LaunchConfig(1, 1, processes, start_method="forkserver", monitor_interval=0.1, **place)
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    try:
        elastic_launch(agent, _one_thread)(function, *arguments)
    finally:
        for number, handler in handlers.items():  # of which the agent takes some
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _one_thread(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)
