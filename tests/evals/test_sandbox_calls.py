"""The seccomp filter: run it on every system call of both processors, and compare its table with the kernel's."""

import pathlib
import re

import pytest

from rho1_jax.evals.sandbox_calls import CALLS, CLONE3, COMMANDS, MACHINES, seccomp_filter

ALLOW, KILL, REFUSE, MISSING = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
# Each names its numbers as `#define __NR_read 0`, or as another name.
HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
AUDIT_ARCH_I386, AUDIT_ARCH_ARM = 0x40000003, 0x40000028


def verdict(machine, number, second_argument=0, architecture=None):
    """Runs the filter as the kernel does."""
    data = {0: number, 4: architecture or MACHINES[machine][0], 24: second_argument}
    lines, position, value = seccomp_filter(machine), 0, None
    while True:
        code, yes, no, operand = lines[position]
        position += 1
        if code == 0x20:
            value = data[operand]
        elif code == 0x06:
            return operand
        else:
            position += yes if {0x15: value == operand, 0x35: value >= operand}[code] else no


@pytest.mark.parametrize("machine", MACHINES)
def test_only_the_calls_of_the_table_are_allowed(machine):
    column = MACHINES[machine][1]
    numbers = {call[column] for call in CALLS.values()} - {None}
    commands = {numbers[column]: values for numbers, values in COMMANDS.values()}
    assert not numbers & commands.keys()
    for number in range(1000):
        for argument in (0, 4, 8, 10, 15, 1026, 1031, 0x5401, 0x5412, 0x5452, 0x8901, 0x8902, 2**32 - 1):
            allowed = number in numbers or argument in commands.get(number, ())
            assert verdict(machine, number, argument) == (
                MISSING if number == CLONE3 else ALLOW if allowed else REFUSE
            ), (number, argument)


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_in_another_convention_kill_the_process(machine):
    other = next(architecture for name, (architecture, _) in MACHINES.items() if name != machine)
    for architecture in (AUDIT_ARCH_I386, AUDIT_ARCH_ARM, other):
        assert verdict(machine, 0, architecture=architecture) == KILL
    for number in (0, 39, 2**31 - 1):
        assert verdict(machine, number | 0x40000000) == KILL
    assert verdict(machine, 2**32 - 1) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_reach_beyond_the_process_are_refused(machine):
    """By their numbers in the kernel's headers: AArch64's are those that all newer processors share."""
    numbers = {
        "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
        "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
        "clone": (56, 220), "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268),
        "prctl": (157, 167), "prlimit64": (302, 261), "setrlimit": (160, 164), "capset": (126, 91),
        "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "io_uring_setup": (425, 425),
        "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219),
        "timer_create": (222, 107), "mq_open": (240, 180), "mq_notify": (244, 184), "shmget": (29, 194),
        "semget": (64, 190), "msgget": (68, 186), "personality": (135, 92), "memfd_create": (319, 279),
        "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "inotify_init1": (294, 26),
        "sched_setaffinity": (203, 122), "setpriority": (141, 140), "ioprio_set": (251, 30), "mount": (165, 40),
        "mkdirat": (258, 34), "linkat": (265, 37), "symlinkat": (266, 36), "mknodat": (259, 33), "fallocate": (285, 47),
        "fchmodat": (268, 53), "utimensat": (280, 88), "setxattr": (188, 5), "flock": (73, 32), "sync": (162, 81),
    }  # fmt: skip
    for call, row in numbers.items():
        assert verdict(machine, row[MACHINES[machine][1]]) == REFUSE, call


@pytest.mark.parametrize("machine", [name for name in HEADERS if pathlib.Path("/usr/include", HEADERS[name]).exists()])
def test_numbers_are_those_of_the_kernel(machine):
    text = pathlib.Path("/usr/include", HEADERS[machine]).read_text()
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    if machine == "aarch64":  # named differently in C on 64-bit processors
        defined["newfstatat"] = defined["fstatat"]
    for call, row in CALLS.items() | {(call, row) for call, (row, _) in COMMANDS.items()}:
        number = row[MACHINES[machine][1]]
        assert defined.get(call) == (None if number is None else str(number)), call
    assert defined["clone3"] == str(CLONE3)
