"""What all commands share: --config, --help, and errors of one line with status 2."""

import difflib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, split_list

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
HELP = {"--help", "-help", "--helpshort", "-h", "-?"}


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


class _ConfigParser(config_flags.ConfigFileFlagParser):
    """Loads a config by name or by path, and names the nearest key if the command line has an unknown one."""

    def parse(self, argument: str) -> Any:
        config = super().parse(_config_file(argument))
        keys = list(_keys(config))
        for key in re.findall(r"^--?(?:no)?config\.([\w.]+)(?:=.*)?$", "\n".join(sys.argv[1:]), re.MULTILINE):
            if key not in keys:
                raise UserError(f"--config.{key}: no such key. Did you mean config.{_nearest_key(key, keys)}?")
        return config


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


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    """The sections and keys of a config: optimizer, optimizer.learning_rate, ..."""
    for name, value in config.items():
        yield prefix + name
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
    """Parses the flags and runs a command. A `UserError` ends it with one line on standard error and status 2.

    Args:
      main: the command.
      argument: holder of the flag that an argument without a name sets; None: the command takes no such argument.
    """

    plugins = flags.DEFINE_multi_string(
        "plugin",
        [],
        "Python file to load first, which registers a family, score, objective or task of yours. Repeatable. "
        "A config file given by --config may register them itself.",
    )

    def parse(argv: Sequence[str]) -> list[str]:
        if HELP & set(argv[1:]):
            print(_help(main))
            sys.exit(0)
        try:
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS:
                flags.FLAGS.config.lock()  # raises if the file did not load
        except OSError as error:
            # ml_collections passes on the traceback of the config file as text; its last line says what happened.
            _exit(f"--config: {str(error).strip().splitlines()[-1]}")
        except UserError as error:
            _exit(error)
        except (flags.Error, AttributeError, TypeError, ValueError) as error:
            _exit(f"command line: {error}")
        if argument is not None and len(rest) == 2:
            flags.FLAGS[argument.name].value = rest.pop()
        if len(rest) > 1:
            _exit(f"command line: unexpected argument {rest[1]!r}")
        return rest

    def guarded(_: Sequence[str]) -> None:
        try:
            _load_plugins(plugins.value)
            main()
        except UserError as error:
            _exit(error)

    logging.set_verbosity(logging.ERROR)
    app.run(guarded, flags_parser=parse)


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


def _exit(error: Exception | str) -> None:
    print("error:", " ".join(str(error).replace("\\'", "'").split()), file=sys.stderr)
    sys.exit(2)


def parse_named(text: str, key: str) -> dict[str, str]:
    """ "NAME=PATH,NAME=PATH" as a dict. `key` is the config key it came from, for the errors.

    Raises:
      UserError: a part is not NAME=PATH, or a path is not local.
    """
    named = {}
    for part in filter(None, split_list(text)):
        name, *rest = split_list(part, "=")
        path = "=".join(rest)
        if not name or not path:
            raise UserError(f"{key}: {part!r} is not NAME=PATH")
        named[name] = str(local_path(path, f"{key}: {name}"))
    return named
