"""Ranks forked from a process that has imported PyTorch, DeepSpeed and transformers and done nothing
else: no launcher, and no seconds of imports. Each is a process of its own, with its own environment, that runs the
script from its first line; what it cannot show is how a launcher starts and ends ranks.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.preloaded"])


def environment(**more: str) -> dict[str, str]:
    """Of a rank."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        **more,
    }


def fork_context() -> multiprocessing.context.BaseContext:
    """For processes that are forked from the server, which runs now."""
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    return _context


class Forked:
    """The parent of the ranks; what of subprocess.Popen the tests need.

    Args:
        ranks: 0 for one process without the environment variables of a launcher.
        words: the script, or -m and a module, and the arguments.
        env: whole environment of the ranks.
        log: their output goes to log.out and log.err.
    """

    def __init__(self, ranks: int, words: list[str], env: dict[str, str], log: Path):
        self._process = fork_context().Process(target=_parent, args=(ranks, words, env, log))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked ranks", timeout)
        return self._process.exitcode


def _parent(ranks: int, words: list[str], env: dict[str, str], log: Path) -> None:
    """Ends with the exit code of the first rank whose own is not 0, once all have ended."""
    os.setsid()
    os.chdir(ROOT)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        file = os.open(log.with_suffix(suffix), flags, 0o644)
        os.dup2(file, 1 if stream is sys.stdout else 2)
        stream.reconfigure(write_through=True)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # readers of data start as always
    if not ranks:
        _finish(lambda: _run(words))
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if not children[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            _finish(lambda: _run(words))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next((code if code > 0 else 128 - code for code in codes if code), 0))


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))  # as `python SCRIPT` does
        runpy.run_path(words[0], run_name="__main__")


def _finish(main: Callable[[], None]) -> None:
    """Run it and end the process as an interpreter does."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
