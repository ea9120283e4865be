"""With any arguments, a command runs, or ends with one line and status 2."""

import contextlib
import io
import sys
from unittest import mock

from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from rho1_jax.configs import default
from rho1_jax.runtime.command_line import _keys, define_config_flag, run
from rho1_jax.training.config import check_values

TEXT = st.text("abclr01.-=_[]{}:,'\"\\ \n\0é\N{GRINNING FACE}", max_size=8)
KEYS = st.sampled_from([key for key, _ in _keys(default.get_config())])
VALUES = TEXT | (st.integers() | st.floats() | st.booleans() | st.tuples(TEXT)).map(str)
OVERRIDES = st.builds(
    "{}config.{}{}{}".format,
    st.sampled_from(["--", "-", "--no"]),
    KEYS | TEXT | st.builds("{}{}".format, KEYS, TEXT),
    st.sampled_from(["=", "", " "]),
    VALUES,
)
ARGUMENTS = st.lists(OVERRIDES | VALUES | TEXT.map("--{}".format), max_size=4)
CONFIGS = st.sampled_from(["default", "default:clm", "demo:slm"]) | st.text("demofault:/.py\0", max_size=9)


@settings(deadline=None)
@given(CONFIGS, ARGUMENTS)
def test_any_arguments(config, arguments):
    known, printed = set(flags.FLAGS), io.StringIO()
    with mock.patch.object(sys, "argv", ["rho1 test", f"--config={config}", *arguments]):
        holder = define_config_flag()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            try:
                run(lambda: check_values(holder.value))
            except SystemExit as stopped:
                status = stopped.code
            finally:
                for name in set(flags.FLAGS) - known:
                    delattr(flags.FLAGS, name)
                sys.modules.pop("config_config", None)
    lines = printed.getvalue().splitlines()
    assert (status, lines) == (None, []) or status == 0 or (status == 2 and len(lines) == 1), (status, lines)
