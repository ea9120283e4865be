"""Run untrusted programs. sandbox.py starts this file as a separate process; it imports nothing from this package.

Before the first program, the process confines itself for good:

- Where the system lets it, it moves to a root folder that holds only a scratch folder and the interpreter's libraries.
- It gives up its capabilities.
- Landlock denies it all other files, and signals to other processes.
- seccomp allows only the system calls in sandbox_calls.py.
- Resource limits cap its processor time and memory.

Each line on standard input is a program, as a JSON string. Each line on standard output is its result, as a JSON
object.
"""

import ast
import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import sys
import traceback

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on every processor
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # flags of unshare(2)
NO_SETUID, NO_DEVICES, BIND, RECURSIVELY = 2, 4, 1 << 12, 1 << 14  # flags of mount(2)
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
SCRATCH_FILES = READ_FILE | READ_FOLDER | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # write, remove, create, truncate
# Rights that a ruleset can handle, from each version of Landlock on: files, network ports, scopes (sockets, signals).
HANDLED = {1: ((1 << 13) - 1, 0, 0), 2: ((1 << 14) - 1, 0, 0), 3: ((1 << 15) - 1, 0, 0), 4: ((1 << 15) - 1, 3, 0),
           5: ((1 << 16) - 1, 3, 0), 6: ((1 << 16) - 1, 3, 3)}  # fmt: skip


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Path(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def _checked(result: int, name: str) -> int:
    """The result of a system call. Raises OSError, with the given name, if the call failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def hide_files(libc: ctypes.CDLL, scratch: str, readable: list[str]) -> None:
    """Gives this process a root folder that holds nothing but `scratch` and `readable`, under their own names.

    Does nothing if the system does not let its users create namespaces; other files can then be seen, but not opened.
    Raises OSError if it lets them, but a later step fails.
    """
    root, user, group = os.path.dirname(scratch), os.getuid(), os.getgid()
    if root == "/":
        return
    try:
        _checked(libc.unshare(NEW_USER | NEW_MOUNTS), "unshare")
        same = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, value in same.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(value)
        sources = {path: os.open(path, os.O_PATH) for path in [*filter(os.path.exists, readable), scratch]}
        _checked(libc.mount(b"tmpfs", root.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, b"size=1m,mode=755"), "mount")
    except OSError:
        return
    os.chdir(root)
    for path, descriptor in sources.items():
        source, target = f"/proc/self/fd/{descriptor}", f".{path}"
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        elif not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.mknod(target)
        _checked(libc.mount(source.encode(), target.encode(), None, BIND | RECURSIVELY, None), f"mount, {path}")
        os.close(descriptor)
    _checked(libc.chroot(b"."), "chroot")
    os.chdir(scratch)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Gives up what the superuser may do, such as raising resource limits."""
    version_and_process, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _checked(libc.capset(version_and_process, none), "capset")


def confine_files(libc: ctypes.CDLL, scratch: str, readable: list[str]) -> None:
    """Limits writing to `scratch`, and reading to `scratch` and `readable`, from now on.

    A program can create files in `scratch`, but no folders or links. With version 6 of Landlock (Linux 6.12), it cannot
    send signals to other processes or connect to abstract sockets either, by any system call.
    """
    version = _checked(libc.syscall(CREATE_RULESET, None, 0, 1), "Landlock")
    files, network, scopes = HANDLED[min(version, max(HANDLED))]
    ruleset = _Ruleset(files, network, scopes)
    rules = _checked(libc.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0), "Landlock")
    for path, rights in [(scratch, SCRATCH_FILES), *((path, READ_FILE | READ_FOLDER) for path in readable)]:
        if os.path.exists(path):
            granted = rights & files if os.path.isdir(path) else rights & ~READ_FOLDER
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            beneath = _Path(granted, descriptor)
            _checked(libc.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), 0), f"Landlock, {path}")
            os.close(descriptor)
    _checked(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def confine_calls(libc: ctypes.CDLL, instructions: list[list[int]]) -> None:
    """Installs a seccomp filter, given as BPF instructions."""
    lines = (_Instruction * len(instructions))(*(_Instruction(*line) for line in instructions))
    program = _Program(len(lines), lines)
    _checked(libc.prctl(22, 2, ctypes.byref(program), 0, 0), "seccomp")


def confine(
    parent: int, scratch: str, readable: list[str], limits: dict[str, int], instructions: list[list[int]]
) -> None:
    """Confines this process. Raises OSError if the system cannot.

    Args:
      parent: id of the parent process. This process is killed when the parent ends.
      scratch: folder that programs may write to.
      readable: files and folders that programs may read.
      limits: limits by name, such as {"CPU": 600}; see setrlimit(2).
      instructions: the seccomp filter.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    hide_files(libc, scratch, readable)
    drop_capabilities(libc)
    _checked(libc.prctl(1, signal.SIGKILL, 0, 0, 0), "parent-death signal")
    if os.getppid() != parent:  # the parent ended before the call
        sys.exit()
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    _checked(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    confine_files(libc, scratch, readable)
    confine_calls(libc, instructions)


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

    Lone surrogates, which no file can hold, become question marks.

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
        output = printed.getvalue()
    except BaseException as error:
        output = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:max_output] + "\n"
    return output.encode("utf-8", "replace").decode()


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
