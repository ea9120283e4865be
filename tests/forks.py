"""Runs many command lines as a user does, importing the package only once."""

import json
import pathlib
import subprocess
import sys

from helpers import environment

# Imports every command once, then runs each command line in a fork, from an empty folder of its own.
FORKS = """
import importlib, json, os, sys, traceback
from rho1_jax import cli
for module, _ in cli.COMMANDS.values():
    importlib.import_module(f"rho1_jax.{module}")
for name, arguments in json.load(sys.stdin).items():
    os.makedirs(f"{name}/cwd")
    child = os.fork()
    if not child:
        os.chdir(f"{name}/cwd")
        for stream, file in ((1, "../stdout"), (2, "../stderr")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        status = 0
        try:
            sys.argv = ["rho1", *arguments]
            cli.main()
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{name}/status", "w") as file:
        file.write(str(status))
"""


class Done:
    """What a command left: status, output, and the names of the files it created."""

    def __init__(self, folder: pathlib.Path):
        self.status = int((folder / "status").read_text())
        self.stdout, self.stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
        self.created = [path.name for path in (folder / "cwd").iterdir()]


def run_all(commands: dict[str, list[str]], folder: pathlib.Path, make: bool = False) -> dict[str, Done]:
    if make:
        folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(commands),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: Done(folder / name) for name in commands}
