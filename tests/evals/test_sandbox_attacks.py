"""Attack the sandbox, its parent and the machine."""

import ctypes
import os
import pathlib
import subprocess
import sys
import time

import pytest

from rho1_jax.evals import sandbox
from rho1_jax.evals.sandbox import ENDED, MAX_OUTPUT, TIMED_OUT, Sandbox

REFUSED = "PermissionError"
# The errors for a file that is out of reach. The last two occur if the system lets the sandbox hide files.
NO_FILE = (REFUSED, "FileNotFoundError", "OSError: [Errno 18] Invalid cross-device link")
MISSING_CALL = "-1 1\n"  # EPERM
# Makes a system call by its number on x86-64.
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall({}), ctypes.get_errno())
"""
PIPES = "range(3, 20)"  # the pipes to the parent are among these descriptors


@pytest.fixture(scope="module")
def box():
    with Sandbox(seconds=2) as box:
        yield box


@pytest.fixture
def victim():
    """Another process of the same user."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        assert process.poll() is None, "the victim was killed"
        process.kill()


def survives(box):
    assert box.run("print('alive')") == "alive\n"


SIGNALS = {
    "owner": "fcntl.fcntl(r, fcntl.F_SETOWN, PID)",
    "owner by type": "fcntl.fcntl(r, 15, struct.pack('ii', 1, PID))",
    "signal": "fcntl.fcntl(r, 10, 9)",
    "asynchronous": "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)",
    "asynchronous by ioctl": "fcntl.ioctl(r, 0x5452, struct.pack('i', 1))",
    "owner by ioctl": "fcntl.ioctl(r, 0x8901, struct.pack('i', PID))",
    "process group by ioctl": "fcntl.ioctl(r, 0x8902, struct.pack('i', PID))",
    "folder": "fcntl.fcntl(os.open('.', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_CREATE)",
    "lease": "fcntl.fcntl(os.open('file', os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    "lock": "fcntl.lockf(os.open('file', os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)",
    "pipe size": "fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 20)",
    "keystroke": "fcntl.ioctl(0, 0x5412, b'x')",
}


@pytest.mark.parametrize("step", SIGNALS.values(), ids=SIGNALS)
def test_no_signal_by_file_ownership(box, victim, step):
    program = f"import fcntl, os, struct\nr, w = os.pipe()\n{step}".replace("PID", str(victim.pid))
    assert box.run(program).startswith(REFUSED)


def test_pipe_that_kills_its_owner_is_refused(box, victim):
    """All steps of the attack, each of which may fail."""
    program = "import fcntl, os, struct\nr, w = os.pipe()\n"
    for step in SIGNALS.values():
        program += f"try: {step}\nexcept OSError: pass\n".replace("PID", str(victim.pid))
    assert box.run(program + "os.write(w, b'x')") == "1\n"
    time.sleep(0.1)
    survives(box)


X86_64_CALLS = {
    "timer that signals a thread": "222, 1, 0, 0",
    "signal to a thread": "200, PID, 9",
    "signal to a thread of a group": "234, PID, PID, 9",
    "queued signal": "129, PID, 9, 0",
    "signal by process descriptor": "424, 3, 9, 0, 0",
    "no parent-death signal": "157, 1, 0, 0, 0, 0",
    "memory of the parent": "310, PID, 0, 0, 0, 0, 0",
    "debugging": "101, 16, PID, 0, 0",
    "shared memory": "29, 0, 4096, 0o1600",
    "semaphores": "64, 0, 1, 0o1600",
    "message queue": "68, 0, 0o1600",
    "named message queue": "240, b'name', 0o102, 0o600, 0",
    "io_uring": "425, 1, ctypes.create_string_buffer(200)",
    "page faults": "323, 0",
    "performance counters": "298, 0, PID, -1, -1, 0",
    "kernel programs": "321, 0, 0, 0",
    "keys": "248, b'user', b'name', b'x', 1, -2",
    "namespace": "272, 0x10000000",
    "another namespace": "308, 0, 0",
    "anonymous file": "319, b'name', 0",
    "program from a file": "322, 0, b'', 0, 0, 0x1000",
    "comparison of processes": "312, PID, PID, 0, 0, 0",
    "priority of the parent": "141, 0, PID, 19",
    "disk priority of the parent": "251, 1, PID, 0x6000",
    "processors of the parent": "203, PID, 8, ctypes.byref(ctypes.c_uint64(1))",
    "limits of the parent": "302, PID, 0, 0, 0",
    "own limits": "160, 9, (ctypes.c_ulong * 2)(1 << 40, 1 << 40)",
    "own limits, newer call": "302, 0, 9, (ctypes.c_ulong * 2)(1 << 40, 1 << 40), 0",
    "personality": "135, 0x0040000",
    "handle of a file": "303, -100, b'/etc/passwd', 0, 0, 0",
    "file by its handle": "304, -100, 0, 0",
    "watch": "294, 0",
    "watch of a file system": "300, 0, 0",
    "capabilities": "126, ctypes.create_string_buffer(8), 0",
    "another user": "105, 0",
    "another root folder": "161, b'/tmp'",
    "lock of a library": "73, 3, 2",
    "pair of sockets": "53, 1, 1, 0, ctypes.create_string_buffer(8)",
    "disk space": "285, 3, 1, 0, 1 << 40",
    "flush of all disks": "162",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64; test_sandbox_calls.py covers AArch64")
@pytest.mark.parametrize("arguments", X86_64_CALLS.values(), ids=X86_64_CALLS)
def test_system_call_is_refused(box, arguments):
    assert box.run(CALL.format(arguments.replace("PID", "os.getppid()"))) == MISSING_CALL


FILES = {
    "folder": "os.mkdir('folder')",
    "link": "os.symlink('/etc', 'link')",
    "hard link": "os.link(os.__file__, 'link')",
    "named pipe": "os.mkfifo('pipe')",
    "device": "os.mknod('device', 0o20600, os.makedev(1, 1))",
    "memory": "open('/proc/self/mem', 'r+b')",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "descriptors of the parent": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "terminal": "open('/dev/tty', 'w')",
    "library": "open(os.__file__, 'a')",
    "name of a library": "os.rename(os.__file__, 'mine')",
    "cut": "os.truncate(os.__file__, 0)",
    "cut by opening": "os.open(os.__file__, os.O_WRONLY | os.O_TRUNC)",
    "own folder": "os.rmdir(os.getcwd())",
    "attribute": "os.setxattr(os.__file__, 'user.x', b'x')",
    "nameless file": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
}


@pytest.mark.parametrize("step", FILES.values(), ids=FILES)
def test_no_file_beyond_the_scratch_folder(box, step):
    assert box.run(f"import os\n{step}").startswith((*NO_FILE, "OSError: [Errno 95]")), step


def altered(monkeypatch, tmp_path, old, new):
    """Makes sandboxes start a child with another text."""
    text = sandbox._CHILD.read_text()
    assert old in text
    (tmp_path / "child.py").write_text(text.replace(old, new))
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")


def has_namespaces():
    return subprocess.run(["unshare", "--user", "--mount", "true"], capture_output=True).returncode == 0


LOOK = "import os\nprint(os.path.exists('/etc/passwd'), os.path.exists(os.__file__), os.listdir('.'), os.getcwd())"


def test_files_are_hidden_where_the_system_allows_it(monkeypatch, tmp_path):
    with Sandbox() as fresh:
        hidden = fresh.run(LOOK)
        assert hidden == f"{not has_namespaces()} True [] {fresh._scratch.name}\n"
    altered(monkeypatch, tmp_path, "libc.unshare(NEW_USER | NEW_MOUNTS)", "-1")
    with Sandbox() as fresh:
        assert fresh.run(LOOK) == f"True True [] {fresh._scratch.name}\n"
        for step in (*FILES.values(), "open('/etc/passwd')", "os.listdir('/etc')", f"os.listdir({str(tmp_path)!r})"):
            assert fresh.run(f"import os\n{step}").startswith((*NO_FILE, "OSError: [Errno 95]")), step


@pytest.mark.parametrize("version", range(1, 7))
def test_older_versions_of_landlock_protect_files(monkeypatch, tmp_path, version):
    """Tests the versions that the kernel of this machine has."""
    altered(monkeypatch, tmp_path, "HANDLED[min(version, ", f"HANDLED[min(version, {version}, ")
    with Sandbox() as fresh:
        assert fresh.run("open('note', 'w').write('mine')\nprint(open('note').read())") == "mine\n"
        for step in FILES.values():
            assert fresh.run(f"import os\n{step}").startswith((*NO_FILE, "OSError: [Errno 95]")), step


def test_landlock_alone_stops_signals(monkeypatch, tmp_path, victim):
    """From version 6 on, even without the filter of system calls."""
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 6:
        return
    altered(monkeypatch, tmp_path, "    confine_calls(libc, instructions)", "")
    with Sandbox() as fresh:
        assert fresh.run(f"import os\nos.kill({victim.pid}, 9)").startswith(REFUSED)
        program = f"import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {victim.pid})\n"
        program += "fcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        assert fresh.run(program + "print(os.write(w, b'x'))") == "1\n"
    time.sleep(0.1)


def test_system_calls_of_other_conventions_end_the_program(box):
    machine_code = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write({})
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
    if os.uname().machine == "x86_64":
        assert box.run(machine_code.format(r"b'\xb8\x14\x00\x00\x00\xc3'")) == "20\n"  # return 20
        assert box.run(machine_code.format(r"b'\xb8\x14\x00\x00\x00\xcd\x80\xc3'")) == ENDED  # int 0x80
        assert box.run(CALL.format("0x40000000 + 39")) == ENDED  # x32
    survives(box)


def test_capabilities_are_given_up(box):
    libc = ctypes.CDLL(None, use_errno=True)
    mine = (ctypes.c_uint32 * 6)()
    with Sandbox() as fresh:
        fresh.run("1")
        assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, fresh._process.pid), mine) == 0
    assert list(mine) == [0] * 6


@pytest.mark.parametrize(
    "program",
    [
        "n = 0\nwhile True:\n    open(f'f{n}', 'wb').write(bytes(2**20))\n    n += 1",
        "n = 0\nwhile True:\n    open(f'f{n}', 'wb')\n    n += 1",
        "for n in range(200): open(f'f{n}', 'w')",  # ends before the folder is checked
    ],
)
def test_files_are_limited_in_number(box, program):
    assert box.run(program) == ENDED
    survives(box)


def test_open_files_are_limited_in_number(box):
    program = "import os\nkept = []\nwhile True:\n    kept.append(open('f', 'wb'))\n    os.remove('f')"
    assert box.run(program).startswith("OSError: [Errno 24]")


ANSWERS = {
    "deep": b"[" * 200_000,
    "deep output": b'{"output": ' + b"[" * 200_000,
    "surrogate": rb'{"output": "\ud800"}',
    "bytes": b'{"output": "\xff\xfe"}',
    "number": b'{"output": 1e999}',
    "list": b'{"output": ["x"]}',
    "two": b'{"output": "x"}\n{"output": "y"}',
    "zero": b"\0",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_forged_answers_do_not_reach_the_parent(box, answer):
    program = f"import os\nfor fd in {PIPES}:\n    try: os.write(fd, {answer!r} + b'\\n')\n    except OSError: pass"
    assert box.run(program) == ENDED
    survives(box)


def test_program_that_forges_its_answer_does_not_run_on(box):
    forged = (
        "import os, time\n"
        f'for fd in {PIPES}:\n    try: os.write(fd, b\'{{"output": "forged"}}\\n\')\n    except OSError: pass\n'
        "time.sleep(1)\nn = 0\nwhile True:\n    open(f'f{n}', 'w')\n    n += 1"
    )
    assert box.run(forged) == "forged"
    time.sleep(1.2)
    assert not os.listdir(box._scratch.name)  # between two programs, the process is halted
    assert box.run("1") == ENDED
    survives(box)


def test_program_that_does_not_read_the_next_one_times_out(box):
    """It answers in the sandbox's name and then sleeps; the next program does not fit into the pipe."""
    forged = (
        "import os, time\n"
        f'for fd in {PIPES}:\n    try: os.write(fd, b\'{{"output": "forged"}}\\n\')\n    except OSError: pass\n'
        "time.sleep(100)"
    )
    assert box.run(forged) == "forged"
    assert box.run(f"x = {'1' * 1_000_000!r}") == TIMED_OUT
    survives(box)


@pytest.mark.parametrize(
    "program, output",
    [
        (r"print('a\ud800b')", "a?b\n"),
        (r"'\udcff'", "?\n"),
        (r"raise ValueError('\ud800')", "ValueError: ?\n"),
        (r"print('\0\x1b[31mred\x07\r')", "\0\x1b[31mred\x07\r\n"),
        ("import sys\nsys.stdout.write('no line end')\nNone", "no line end"),
        ("print('x' * 10**8)", "x" * MAX_OUTPUT),
        ("for n in range(1000): print('\\U0001F600' * 1000)", ("\U0001f600" * 1000 + "\n") * 99 + "\U0001f600" * 901),
        ("raise ValueError('x' * 10**7)", "ValueError: " + "x" * (MAX_OUTPUT - 12)),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E: <exception str() failed>\n"),
        ("type('', (Exception,), {'__module__': 'builtins'})()\nraise _", "NameError: name '_' is not defined\n"),
    ],
)
def test_output_is_text_of_bounded_length(box, program, output):
    result = box.run(program)
    assert result == output[:MAX_OUTPUT]
    result.encode()


@pytest.mark.parametrize(
    "program, outputs",
    [
        ("import os\nos.closerange(3, 60)", (ENDED,)),
        ("import gc\nfor o in gc.get_objects(): o.clear() if isinstance(o, dict) else None", (ENDED,)),
        (
            "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
            (ENDED, TIMED_OUT, "RecursionError", "MemoryError"),
        ),
        ("kept = []\nimport os\nwhile True: kept.append(os.pipe())", ("OSError: [Errno 24]",)),
        ("import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 10**8))", ("OSError: [Errno 12]",)),
        ("import gc\nraise MemoryError", ("MemoryError",)),
        ("raise type('', (Exception,), {'__module__': 'builtins'})", (ENDED, "")),
    ],
)
def test_program_that_ruins_its_own_process_harms_nothing_else(box, program, outputs):
    assert box.run(program).startswith(outputs)
    box.close()
    survives(box)


def test_sandboxes_do_not_see_each_other(box):
    box.run("open('note', 'w').write('mine')")
    folder = box.run("import os\nprint(os.getcwd())").strip()
    with Sandbox() as other:
        assert other.run(f"open({folder + '/note'!r}).read()").startswith(NO_FILE)
        assert other.run(f"open({folder + '/note'!r}, 'w')").startswith(NO_FILE)


def test_program_ends_with_its_parent_even_if_it_resists():
    """The parent is killed while the program tries to outlive it."""
    program = (
        "import ctypes, os, signal\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True:\n    pass"
    )
    parent = (
        "import os, signal, threading, time\nfrom rho1_jax.evals.sandbox import Sandbox\n"
        "box = Sandbox(60)\nbox.run('1')\n"
        f"threading.Thread(target=box.run, args=({program!r},), daemon=True).start()\ntime.sleep(0.3)\n"
        "print(box._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True).stdout)
    for _ in range(50):
        if not pathlib.Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the program still runs after its parent was killed")
