"""What all commands share: --config, --help, and errors of one line with status 2."""

import atexit
import difflib
import errno
import glob
import importlib.util
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from rho1_jax.runtime import peers, stopping
from rho1_jax.runtime.errors import UserError, printable
from rho1_jax.runtime.files import local_path, split_list
from rho1_jax.runtime.processes import is_first_with, say
from rho1_jax.runtime.stopping import Stopped

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
HELP = {"--help", "-help", "--helpshort", "--helpfull", "--helpxml", "-h", "-?"}
BAD_USAGE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # exit statuses; the last two follow the shell
# Errors caused by a path that the user gave, or by the machine. All others are bugs.
PATH_ERRORS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EBUSY),
}
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE}
# Device files of a TPU's driver. Without a TPU, libtpu prints five lines of warnings unless these variables are set.
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/*")
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}


def define_config_flag() -> Any:
    """Defines --config=NAME_OR_FILE[:stage] and --config.key=value. Every key is locked: none can be added."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        f"A config of rho1_jax ({', '.join(_config_names())}) or a .py file, with a stage after a colon: default:slm. "
        "--config.KEY=VALUE changes a key.",
    )
    flags.FLAGS["config"].parser = _ConfigParser("config")
    flags.mark_flag_as_required("config")
    return holder


def overridden_keys() -> Collection[str]:
    """The keys that the command line sets, such as model.layers."""
    return config_flags.get_override_values(flags.FLAGS["config"])


class _ConfigParser(config_flags.ConfigFileFlagParser):
    """Loads a config by name or by path, and checks the keys that the command line overrides."""

    def parse(self, argument: str) -> Any:
        file = _config_file(argument)
        try:
            config = super().parse(file)
            getattr(config, "lock", None)  # raises if the file could not be read
        except UserError:
            raise
        except Exception as error:  # the file may run any code
            # ml_collections passes some errors on as the text of a traceback; its last line says what happened.
            lines = str(error).strip().splitlines()
            problem = lines[-1].replace("\\'", "'") if len(lines) > 1 else f"{type(error).__name__}: {error}"
            raise UserError(f"--config={argument}: {problem}") from error
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(f"--config={argument}: get_config must return a ConfigDict, not {type(config).__name__}")
        for word in flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False):
            override = re.match(r"--?(?:no)?config\.([^=]*)", word)
            if override:
                _check_key(config, override[1])
        return config


def _check_key(config: Any, key: str) -> None:
    """Raises UserError if a config has no such key, or only a section of that name."""
    keys = dict(_keys(config))
    if key not in keys:
        raise UserError(f"--config.{key}: no such key. Did you mean config.{_nearest_key(key, list(keys))}?")
    if hasattr(keys[key], "items"):
        raise UserError(f"--config.{key} is a section; set its keys one by one: {', '.join(keys[key])}")


def _config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "def get_config(" in path.read_text(encoding="utf-8"))


def _config_file(text: str) -> str:
    """The FILE[:stage] that a --config stands for."""
    local_path(text, "--config")
    name, colon, stage = text.partition(":")
    if "/" in name or name.endswith(".py") or pathlib.Path(name).is_file():
        return text
    names = _config_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, cutoff=0)
        raise UserError(f"--config={text}: no config of that name. The nearest are {', '.join(nearest)}")
    return f"{CONFIGS / name}.py{colon}{stage}"


def _keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The sections and keys of a config with their values: optimizer, optimizer.learning_rate, ..."""
    for name, value in config.items():
        yield prefix + name, value
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{name}.")


def _nearest_key(wanted: str, keys: Sequence[str]) -> str:
    """The key whose own name is nearest, in letters or as initials (lr); of equally near ones, the nearest path."""

    def likeness(key: str) -> tuple[float, float]:
        own, wanted_own = key.rpartition(".")[2], wanted.rpartition(".")[2]
        initials = "".join(word[:1] for word in own.split("_"))
        near = difflib.SequenceMatcher(None, wanted_own, own).ratio()
        return 1.0 if wanted_own == initials else near, difflib.SequenceMatcher(None, wanted, key).ratio()

    return max(keys, key=likeness)


def _load_plugins(paths: Sequence[str]) -> None:
    """Imports Python files by path. Raises UserError, naming the file, if one cannot be imported."""
    for path in paths:
        file = local_path(path, "--plugin")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise UserError(f"--plugin={path}: not a Python file; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--plugin={path}: {type(error).__name__}: {error}") from error


def run(main: Callable[[], None], argument: Any = None) -> None:
    """Parses the flags and runs a command.


    A `UserError`, or a file system error, ends it with one line on standard error and status 2. Ctrl-C ends it
    with status 130, and a closed pipe (`rho1 ... | head`) with 141.

    Args:
      main: the command.
      argument: the flag that a positional argument sets; None: the command takes no positional argument.
    """
    plugins = flags.DEFINE_multi_string(
        "plugin",
        [],
        "Python file to load first, which registers a family, score, objective or task of yours. Repeatable. "
        "A config file given by --config may register them itself.",
    )

    def command() -> int:
        _load_plugins(plugins.value)
        status = 0
        try:
            main()
        except Stopped as stop:
            stopping.saved()
            say(str(stop))
            status = stop.status
        peers.done()
        return status

    if not any(map(glob.glob, TPU_DEVICES)):
        os.environ.update(NO_TPU | os.environ)
    logging.set_verbosity(logging.ERROR)
    app.run(lambda _: _guarded(command), flags_parser=lambda argv: _guarded(_parse, argv, main, argument))


def _parse(argv: Sequence[str], main: Callable[[], None], argument: Any) -> list[str]:
    """Parses the flags. Raises UserError for anything wrong on the command line or in the config file."""
    if HELP & set(argv[1:]):
        print(_help(main), flush=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        missing = re.findall(r"flag --(\w+)=None: Flag", str(error))
        problem = f"give {' and '.join(f'--{name}' for name in missing)}" if missing else error
        raise UserError(f"command line: {problem}") from None
    if argument is not None and len(rest) == 2:
        flags.FLAGS[argument.name].value = rest.pop()
    if len(rest) > 1:
        raise UserError(f"command line: unexpected argument {rest[1]!r}")
    return rest


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function. Errors that are not bugs end the program with one line or none."""
    try:
        result = function(*arguments)
        sys.stdout.flush()  # here a closed pipe can still be caught
        return result
    except UserError as error:
        _exit(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # Threads that write a checkpoint still finish. Python's teardown after that can crash in a library, so skip it.
        atexit.register(os._exit, INTERRUPTED)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            peers.leave(CLOSED_PIPE)
        path = [] if error.filename is None else [os.fsdecode(error.filename)]
        if error.errno not in (MACHINE_ERRORS | PATH_ERRORS if path else MACHINE_ERRORS):
            raise
        _exit(": ".join([*path, os.strerror(error.errno)]))
    except Exception:
        peers.wait_for_verdict()
        raise


def _stdout_is_closed() -> bool:
    """True if nobody reads standard output any more. Buffered output is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _help(main: Callable[[], None]) -> str:
    """The docstring of the command's module, and the command's own flags."""
    lines = [sys.modules[main.__module__].__doc__ or ""]
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.startswith(("rho1_jax.", "tools.")):
            for flag in defined:
                default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
                lines.append(f"  --{'[no]' if flag.boolean else ''}{flag.name}")
                lines.append(flags.text_wrap(f"{flag.help}{default}", indent=" " * 6))
    return "\n".join(lines)


def _exit(error: Exception | str) -> NoReturn:
    """Prints an error as one line and ends the program. Of several processes with one error, one prints it."""
    line = " ".join(filter(None, (part.strip() for part in str(error).splitlines())))
    if is_first_with(line):
        # A path may contain anything, such as control characters of a terminal.
        print("error:", printable(line), file=sys.stderr, flush=True)
    peers.leave(BAD_USAGE)


def parse_named(text: str, key: str) -> dict[str, str]:
    """ "NAME=PATH,NAME=PATH" as a dict. `key` is the config key it came from, for the errors.

    Raises:
      UserError: a part is not NAME=PATH, a name comes twice, or a path is not local.
    """
    named = {}
    for part in filter(None, split_list(text)):
        name, *rest = split_list(part, "=")
        path = "=".join(rest)
        if not name or not path:
            raise UserError(f"{key}: {part!r} is not NAME=PATH")
        if name in named:
            raise UserError(f"{key}: two paths have the name {name!r}; rename one")
        named[name] = str(local_path(path, f"{key}: {name}"))
    return named
