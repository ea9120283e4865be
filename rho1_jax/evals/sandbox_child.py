"""Run untrusted programs. sandbox.py starts this file as a separate process; it imports nothing from this package.

Before the first program, the process confines itself for good. Landlock denies it all files except a scratch folder and
the interpreter's libraries. seccomp denies it the network, other processes, signals and further system calls. Resource
limits cap its processor time and memory. Each line on standard input is a program, as a JSON string. Each line on
standard output is its result, as a JSON object.
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
# Numbers of the x86-64 system calls that are denied.
DENIED = (
    29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, *range(240, 246),  # System V and POSIX message queues, memory
    *range(41, 60),  # sockets; clone, fork, vfork, execve
    62, 129, 200, 234, 297, 424, 434, 438,  # signals, process descriptors
    76, 90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280, 452, *range(188, 200),  # beyond Landlock: modes, times
    101, 310, 311, 312,  # other processes' memory
    141, 142, 144, 203, 251, 256, 279, 302, 314,  # other processes' limits and scheduling
    135, 155, *range(161, 180), 246, 248, 249, 250, 272, 288, 298, 299, 307, 308, 313, 320, 321, 322, 323,  # the system
    425, 426, 427, *range(428, 434), 442, 463, 464, 465, 466,  # io_uring, mounts, extended attributes
)
# fmt: on
ENOSYS_CALLS = (435,)  # clone3: reported as missing, so that libraries fall back to clone
X86_64 = 0xC000003E
READ_FILE_AND_DIRECTORY, ALL_RIGHTS = (1 << 2) | (1 << 3), 13  # access rights in version 1 of Landlock


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


def _system(libc: ctypes.CDLL, name: str, *arguments: object) -> int:
    """Makes a system call. Raises OSError, with the given name, if it fails."""
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def confine_files(libc: ctypes.CDLL, scratch: str, readable: list[str]) -> None:
    """Limits writing to `scratch`, and reading to `scratch` and `readable`, from now on."""
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
    """Makes the system calls in DENIED fail with EPERM from now on. Calls of another architecture kill the process."""
    load, jump_if_equal, jump_if_at_least, ret = 0x20, 0x15, 0x35, 0x06  # instructions of BPF
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    lines = [(load, 0, 0, 4), (jump_if_equal, 1, 0, X86_64), (ret, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(jump_if_at_least, 0, 1, 0x40000000), (ret, 0, 0, kill)]
    for calls, error in ((DENIED, 1), (ENOSYS_CALLS, 38)):
        for call in calls:
            lines += [(jump_if_equal, 0, 1, call), (ret, 0, 0, refuse | error)]
    lines.append((ret, 0, 0, allow))
    instructions = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    program = _Program(len(lines), instructions)
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def confine(scratch: str, readable: list[str], cpu_seconds: int, memory: int, file_size: int) -> None:
    """Confines this process: resource limits, files, then system calls. Raises OSError if the system cannot."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        raise OSError(f"{os.uname().sysname} on {os.uname().machine}: only Linux on x86_64 is supported")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # ends when its parent does
    limits = {"AS": memory, "CPU": cpu_seconds, "FSIZE": file_size, "NOFILE": 64, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges
        raise OSError(ctypes.get_errno(), "no_new_privs")
    confine_files(libc, scratch, readable)
    confine_calls(libc)


class _Bounded(io.StringIO):
    """A text stream that drops what is written beyond `limit` characters."""

    def __init__(self, limit: int):
        super().__init__()
        self._left = limit

    def write(self, text: str) -> int:
        super().write(text[: self._left])
        self._left = max(0, self._left - len(text))
        return len(text)


def execute(code: str, names: dict, max_output: int) -> str:
    """Runs a program and returns what it prints, or the last line of its traceback if it fails.

    Args:
      code: the program. The value of an expression on its last line is printed.
      names: its global variables, which the program changes.
      max_output: characters of output to keep.
    """
    printed = _Bounded(max_output)
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
        return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:max_output] + "\n"


def main() -> None:
    """Confines the process, then runs one program after another. The first line of standard input has its settings."""
    # Keep the pipes to the parent. The programs' own standard input and output lead nowhere.
    requests, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    settings = json.loads(requests.readline())
    max_output = settings.pop("max_output")
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
        results.write(json.dumps({"output": execute(json.loads(line), names, max_output)}) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
