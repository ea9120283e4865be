"""Run programs in the sandbox: check what they print and what they cannot do."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from rho1_jax.evals import sandbox
from rho1_jax.evals.sandbox import ENDED, TIMED_OUT, Sandbox, shown
from rho1_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def box():
    with Sandbox(seconds=30) as box:
        yield box


@pytest.fixture(scope="module")
def hurried():
    """A sandbox with a short time limit."""
    with Sandbox(seconds=1.5) as box:
        yield box


@pytest.mark.parametrize(
    "program, output",
    [
        ("print(1 + 1)", "2\n"),
        ("x = 20\nx + 1", "21\n"),
        ("print(x)\nx", "20\n20\n"),  # variables of earlier programs are visible
        ("None", ""),
        ("def f():\n    return 3\nf()", "3\n"),
        ("from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 4, x))", "[-2, 2]\n"),
        ("import numpy, scipy.optimize\nprint(numpy.linalg.det(numpy.eye(3)))", "1.0\n"),
        ("open('note.txt', 'w').write('mine')\nprint(open('note.txt').read())", "mine\n"),
        ("1 / 0", "ZeroDivisionError: division by zero\n"),
        ("print('before')\nundefined", "NameError: name 'undefined' is not defined\n"),
        ("x = (", "SyntaxError: '(' was never closed\n"),
        ("raise SystemExit('no')", "SystemExit: no\n"),
        ("def deeper(n):\n    return deeper(n + 1)\ndeeper(0)", "RecursionError: maximum recursion depth exceeded\n"),
        ("input()", "EOFError: EOF when reading a line\n"),
    ],
)
def test_program_output(box, program, output):
    assert box.run(program) == output


def test_shown_leaves_out_the_middle_of_long_output():
    assert shown("a" * 400 + "\n") == "a" * 400
    assert shown("a" * 300 + "b" * 300) == "a" * 200 + "..." + "b" * 200


REFUSED = "PermissionError"
# The errors for a file that is out of reach. The last two occur if the system lets the sandbox hide files.
NO_FILE = (REFUSED, "FileNotFoundError", "OSError: [Errno 18] Invalid cross-device link")
HOME = pathlib.Path.home()
FLOOD = "try: os.write(fd, b'x' * 10**6)\n        except OSError: pass"  # fills the pipe to the parent


@pytest.mark.parametrize(
    "program, output",
    [
        ("import os\nwhile True: os.fork()", REFUSED),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", REFUSED),
        ("import subprocess\nsubprocess.run(['true'])", REFUSED),
        ("import os\nos.execv('/bin/true', ['true'])", REFUSED),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("x = bytearray(10**11)", "MemoryError"),
        ("while True: pass", TIMED_OUT),
        ("import time\ntime.sleep(100)", TIMED_OUT),
        ("try:\n    while True: pass\nexcept BaseException:\n    pass", TIMED_OUT),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", TIMED_OUT),
        ("import os\nwhile True: os.write(1, b'x' * 10**6)", TIMED_OUT),
        (f"import os\nwhile True:\n    for fd in range(3, 20):\n        {FLOOD}", ENDED),
        ("9 ** 9 ** 9", TIMED_OUT),
        ("import os\nos._exit(0)", ENDED),
        ("import os\nos.abort()", ENDED),
        ("import ctypes\nctypes.string_at(0)", ENDED),
        ("open('/proc/self/environ').read()", NO_FILE),
        ("import os\nopen(f'/proc/{os.getppid()}/environ').read()", NO_FILE),
        (f"import os\nos.listdir({str(HOME)!r})", NO_FILE),
        ("open('/etc/passwd').read()", NO_FILE),
        ("open('/tmp/outside', 'w')", REFUSED),
        ("import os\nos.symlink('/etc/passwd', 'link')\nopen('link').read()", REFUSED),
        ("import os\nos.rename('/etc/hostname', 'mine')", NO_FILE),
        ("import os\nos.chmod('/tmp', 0o777)", REFUSED),
        ("import os\nos.utime('/tmp')", REFUSED),
        ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", REFUSED),
        ("import socket\nsocket.socket(socket.AF_UNIX)", REFUSED),
        ("import os\nos.kill(os.getppid(), 9)", REFUSED),
        ("import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)", REFUSED),
        ("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", REFUSED),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
        ("import os\nos.sched_setaffinity(os.getppid(), [0])", REFUSED),
    ],
)  # fmt: skip
def test_attacks_fail_and_the_next_program_runs(hurried, program, output):
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        result = hurried.run(program.replace("PORT", str(server.getsockname()[1])))
        assert time.monotonic() - start < 10
    assert result.startswith(output), result
    assert hurried.run("print('alive')") == "alive\n"
    assert not pathlib.Path("/tmp/outside").exists()


def test_memory_is_limited():
    with Sandbox(seconds=30) as fresh:
        assert fresh.run("x = []\nwhile True: x.append(bytearray(10**8))") == "MemoryError\n"


def test_environment_of_the_parent_is_hidden(box, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "12345")
    with Sandbox() as fresh:
        assert "12345" not in fresh.run("import os\nprint(dict(os.environ))")


def test_long_output_is_cut(box):
    output = box.run("for _ in range(10**6): print('x' * 100)")
    assert len(output) == sandbox.MAX_OUTPUT


def test_file_size_is_limited(box):
    assert box.run("with open('big', 'wb') as f:\n    f.write(bytes(10**8))").startswith("OSError: [Errno 27]")


def test_forged_answer_counts_as_output(box):
    """A program can find the pipe to the parent, but what it writes there is treated as its output, no more."""
    forged = (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'{\"output\": [1]}\\n')\n    except OSError: pass"
    )
    assert isinstance(box.run(forged), str)
    for noise in ("not json", "[]", '{"ready": 1}'):
        program = f"import os\nfor fd in range(3, 20):\n    try: os.write(fd, {noise + chr(10)!r}.encode())\n    "
        program += "except OSError: pass"
        assert isinstance(box.run(program), str)


def test_with_block_removes_process_and_folder():
    with Sandbox() as box:
        box.run("open('note', 'w').write('x')")
        process, scratch = box._process, pathlib.Path(box._scratch.name)
        assert (scratch / "note").exists()
    assert process.returncode is not None and not scratch.exists()


def test_process_ends_with_its_parent(tmp_path):
    program = (
        "from rho1_jax.evals.sandbox import Sandbox\n"
        "box = Sandbox()\nbox.run('1')\nprint(box._process.pid, flush=True)\n"
        "import os\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the sandbox still runs after its parent was killed")


@pytest.mark.parametrize("system, machine", [("Darwin", "arm64"), ("Linux", "riscv64"), ("Linux", "i686")])
def test_other_machines_are_refused_by_name(monkeypatch, system, machine):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    message = f"cannot run programs safely on {system} {machine}; use Linux on x86_64 or aarch64"
    with pytest.raises(UserError, match=message), Sandbox() as box:
        box.run("1")


@pytest.mark.parametrize("step", ["Landlock", "seccomp", "capset", "no_new_privs"])
def test_system_that_cannot_confine_is_refused(monkeypatch, tmp_path, step):
    """If any step of the confinement fails, no program runs."""
    child = tmp_path / "child.py"
    text = sandbox._CHILD.read_text()
    failing = f'    if name == "{step}":\n        raise OSError(38, f"{{name}}: not implemented")\n    if result < 0:'
    child.write_text(text.replace("    if result < 0:", failing))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    message = f"cannot run programs safely on this machine: .*{step}: not implemented; use another machine"
    with pytest.raises(UserError, match=message), Sandbox() as box:
        box.run("1")


HARMLESS = {
    "sympy": ("import sympy\nx = sympy.symbols('x')\nsympy.integrate(sympy.sin(x)**2, x)", "x/2 - sin(x)*cos(x)/2\n"),
    "numpy": ("import numpy as np\nprint(np.linalg.solve([[2., 1.], [1., 3.]], [3., 5.]))", "[0.8 1.4]\n"),
    "scipy": ("from scipy.optimize import linprog\nprint(linprog([1, 2], bounds=(1, 2)).fun)", "3.0\n"),
    "matplotlib": (
        "import os, matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('a.png')\nos.path.getsize('a.png') > 999",
        "True\n",
    ),
    "fractions": ("from fractions import Fraction\nprint(Fraction(1, 3) + Fraction(1, 6))", "1/2\n"),
    "decimal": ("from decimal import Decimal\nDecimal('0.1') * 3", "0.3\n"),
    "itertools": ("import itertools\nlen(list(itertools.permutations(range(5), 3)))", "60\n"),
    "datetime": ("import datetime\nprint(datetime.date(2024, 2, 28) + datetime.timedelta(2))", "2024-03-01\n"),
    "random": ("import random\nrandom.seed(1)\nrandom.randint(1, 100)", "18\n"),
    "math": ("import math\nmath.comb(50, 25)", "126410606437752\n"),
    "statistics": ("import statistics\nstatistics.stdev([1, 2, 3, 4])", "1.2909944487358056\n"),
    "re": ("import re\nre.findall(r'\\d+', 'a1b22')", "['1', '22']\n"),
    "collections": ("from collections import Counter\nCounter('abca').most_common(1)", "[('a', 2)]\n"),
    "time limit": (
        "import signal\ndef end(*_): raise TimeoutError('alarm')\nsignal.signal(signal.SIGALRM, end)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass",
        "TimeoutError: alarm\n",
    ),
    "sleep": ("import time\nt = time.time()\ntime.sleep(0.01)\ntime.time() - t >= 0.01", "True\n"),
    "temporary file": (
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n"
        "    f.write('x')\n    f.seek(0)\n    print(f.read())",
        "x\n",
    ),
    "rename": (
        "import os\nopen('n', 'w').close()\nos.replace('n', 'm')\nos.remove('m')\nos.path.exists('m')",
        "False\n",
    ),
    "processors": ("import os\nos.cpu_count() > 0 and os.getpid() > 0", "True\n"),
    "input": ("import sys\nprint(repr(sys.stdin.read()))", "''\n"),
}


@pytest.mark.parametrize("program, output", HARMLESS.values(), ids=HARMLESS)
def test_harmless_program(program, output, box):
    assert box.run(program) == output
