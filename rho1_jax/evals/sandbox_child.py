"""Runs programs of unknown origin. Started by sandbox.py as a process of its own; imports nothing of this package.

Before the first program the process gives up, for good: files outside a scratch folder and the interpreter's libraries
(Landlock), network, other processes, signals and a list of further system calls (seccomp), and more than a fixed amount
of processor time and memory. Each line on standard input is a program as JSON; each line on standard output a result.
"""

import ast
import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import traceback

# fmt: off
# System calls of x86-64 that fail, by number.
DENIED = (
    29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, *range(240, 246),  # System V and POSIX message queues, memory
    *range(41, 60),  # sockets; clone, fork, vfork, execve
    62, 129, 200, 234, 297, 424, 434, 438,  # signals, and descriptors of processes
    76, 90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280, 452, *range(188, 200),  # what Landlock leaves: modes, times
    101, 310, 311, 312,  # other processes' memory
    141, 142, 144, 203, 251, 256, 279, 302, 314,  # other processes' limits and scheduling
    135, 155, *range(161, 180), 246, 248, 249, 250, 272, 288, 298, 299, 307, 308, 313, 320, 321, 322, 323,  # the system
    425, 426, 427, *range(428, 434), 442, 463, 464, 465, 466,  # io_uring, mounts, extended attributes
)
# fmt: on
ENOSYS_CALLS = (435,)  # clone3: libraries then try clone
X86_64 = 0xC000003E
READ_FILE_AND_DIRECTORY, ALL_RIGHTS = (1 << 2) | (1 << 3), 13  # Landlock: rights of its first version


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("rights", ctypes.c_uint64),)


class _Path(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def _system(libc: ctypes.CDLL, what: str, *arguments: object) -> int:
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def confine_files(libc: ctypes.CDLL, scratch: str, readable: list[str]) -> None:
    """From now on only `scratch` can be written, and only it and `readable` can be read."""
    rights = (1 << ALL_RIGHTS) - 1
    ruleset = _Ruleset(rights)
    rules = _system(libc, "Landlock", 444, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)
    for path, allowed in [(scratch, rights), *((path, READ_FILE_AND_DIRECTORY) for path in readable)]:
        if os.path.exists(path):
            granted = allowed if os.path.isdir(path) else allowed & ~(1 << 3)
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            beneath = _Path(granted, descriptor)
            _system(libc, f"Landlock, {path}", 445, rules, 1, ctypes.byref(beneath), 0)
            os.close(descriptor)
    _system(libc, "Landlock", 446, rules, 0)
    os.close(rules)


def confine_calls(libc: ctypes.CDLL) -> None:
    """From now on the system calls of DENIED fail with EPERM, those of other architectures end the process."""
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    lines = [(load, 0, 0, 4), (equal, 1, 0, X86_64), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(above, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for calls, error in ((DENIED, 1), (ENOSYS_CALLS, 38)):
        for call in calls:
            lines += [(equal, 0, 1, call), (give, 0, 0, refuse | error)]
    lines.append((give, 0, 0, allow))
    instructions = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    program = _Program(len(lines), instructions)
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def confine(scratch: str, readable: list[str], cpu_seconds: int, memory: int, file_size: int) -> None:
    """All of it. Raises OSError where the system cannot."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        raise OSError(f"{os.uname().sysname} on {os.uname().machine}: only Linux on x86_64 can confine programs here")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # ends with its parent
    limits = {"AS": memory, "CPU": cpu_seconds, "FSIZE": file_size, "NOFILE": 64, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges
        raise OSError(ctypes.get_errno(), "no_new_privs")
    confine_files(libc, scratch, readable)
    confine_calls(libc)


class _Bounded(io.StringIO):
    """Text that stops growing: what is written beyond is dropped."""

    def __init__(self, most: int):
        super().__init__()
        self._left = most

    def write(self, text: str) -> int:
        super().write(text[: self._left])
        self._left = max(0, self._left - len(text))
        return len(text)


def execute(code: str, names: dict, most: int) -> str:
    """What a program prints, and the value of its last line; the last line of the traceback where it fails."""
    printed = _Bounded(most)
    try:
        tree = ast.parse(code)
        end = tree.body[-1] if tree.body else None
        last = ast.Expression(end.value) if isinstance(end, ast.Expr) else None
        if last:
            tree.body.pop()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, "<program>", "exec"), names)
            value = eval(compile(last, "<program>", "eval"), names) if last else None
            if value is not None:
                print(value)
        return printed.getvalue()
    except BaseException as error:
        return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:most] + "\n"


def main() -> None:
    """The process: its settings are the first line on standard input."""
    # The programs' own standard input and output lead nowhere: these two lines belong to the parent.
    requests, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    settings = json.loads(requests.readline())
    most = settings.pop("most")
    try:
        confine(**settings)
    except OSError as error:
        results.write(json.dumps({"refused": str(error)}) + "\n")
        results.flush()
        return
    results.write(json.dumps({"ready": True}) + "\n")
    results.flush()
    names: dict = {"__name__": "__main__"}
    for line in requests:
        results.write(json.dumps({"output": execute(json.loads(line), names, most)}) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
