"""Programs in Python, run in processes forked from one that has imported what takes each of them two seconds."""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired


def run_python(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path | None = None, timeout: float = 600
) -> CompletedProcess[str]:
    """
    What ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)`` does, but for the imports that
    tests/conftest.py has the server of forks make. Those must not read what the environment says to programs, as mujoco does.

    :param arguments: A script, or -m and a module, and what is to be its command line
    :param env: Its environment
    :param cwd: Its working directory, by default the current one
    :param timeout: After so many seconds it is killed
    :raises TimeoutExpired: if it was
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        for path in outputs:
            path.touch()
        process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=([*arguments], dict(env), cwd or Path.cwd(), *outputs)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(arguments, timeout, *(path.read_bytes() for path in outputs))
        return CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def output_of(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path | None = None, code: int = 0, timeout: float = 600
) -> str:
    """
    :param arguments: As :func:`run_python` has them, and ``env``, ``cwd`` and ``timeout``
    :param code: The exit status that there has to be
    :return: What the program wrote to its standard output, and then to its standard error
    """
    result = run_python(arguments, env, cwd, timeout)
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def _main(arguments: list[str], env: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path) -> None:
    for number, path in enumerate((stdout, stderr), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path[:0] = [str(cwd if is_module else Path(arguments[0]).parent), *env.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        # as at the end of a program, not of a child: where trackers write what they have left
        atexit._run_exitfuncs()
