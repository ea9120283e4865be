"""The system calls that a sandboxed program may make, as a seccomp filter for each kind of processor.

A program may use files (Landlock decides which ones), memory, clocks and its own signal handlers. Everything else is
refused: other processes, threads, signals to anyone, the network, shared memory and queues, limits, namespaces,
attributes of files, and calls that newer kernels add.
"""

# How the kernel names a processor in seccomp's data (AUDIT_ARCH_*), and the column of its call numbers in CALLS.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Allowed calls: number on x86-64, number on AArch64.
CALLS: dict[str, tuple[int | None, int | None]] = {
    # files
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "open": (2, None),
    "openat": (257, 56), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "stat": (4, None),
    "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "umask": (95, 166),
    "ftruncate": (77, 46), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "unlink": (87, None), "unlinkat": (263, 35),
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "futex": (202, 98),
    # clocks, timers of this process, waiting
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "alarm": (37, None), "setitimer": (38, 103),
    "getitimer": (36, 102), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "pause": (34, None), "select": (23, None), "pselect6": (270, 72), "poll": (7, None),
    "ppoll": (271, 73), "sched_yield": (24, 124), "restart_syscall": (219, 128), "exit": (60, 93),
    "exit_group": (231, 94),
    # facts about this process and the machine
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163),
    "getrusage": (98, 165), "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getrandom": (318, 278),
}  # fmt: skip

# Calls that are allowed if their second argument is one of these values, which are the same on both processors.
COMMANDS = {
    "fcntl": ((72, 25), (0, 1, 2, 3, 1030)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
}
CLONE3 = 435  # reported as missing, so that libraries fall back to clone

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand

_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of BPF
_ALLOW, _KILL, _REFUSE, _MISSING = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_CALL, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24  # offsets in seccomp's data; low half of the argument
_X32 = 0x40000000  # calls of x86-64's 32-bit variant have this bit


def seccomp_filter(machine: str) -> list[Instruction]:
    """A BPF program that allows CALLS and COMMANDS, and makes other calls fail with EPERM.

    A call in the convention of another processor (int 0x80, x32) kills the process.

    Args:
      machine: a key of MACHINES.
    """
    architecture, column = MACHINES[machine]
    lines = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    lines += [(_LOAD, 0, 0, _CALL), (_JUMP_IF_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            lines += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    lines += [(_JUMP_IF_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _MISSING)]
    for numbers, commands in COMMANDS.values():
        checks = [(_LOAD, 0, 0, _SECOND_ARGUMENT)]
        for command in commands:
            checks += [(_JUMP_IF_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
        checks.append((_RETURN, 0, 0, _REFUSE))
        lines += [(_JUMP_IF_EQUAL, 0, len(checks), numbers[column]), *checks]
    lines.append((_RETURN, 0, 0, _REFUSE))
    return lines
