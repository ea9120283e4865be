"""Commands on the command line: config files, flags, and errors a user can act on."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from rho1_jax.runtime.errors import UserError


def define_config_flag() -> Any:
    """--config=FILE[:stage] and --config.key=value, with every key locked."""
    holder = config_flags.DEFINE_config_file("config", None, "Config file, with a stage behind a colon.")
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[], None]) -> None:
    """Runs a command. What the user can mend ends it with one line on standard error and status 2."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS:
                flags.FLAGS.config.lock()  # raises where the file did not load
        except OSError as error:
            # ml_collections gives the traceback of the config file as text; its last line says what happened.
            _exit(f"--config: {str(error).strip().splitlines()[-1]}")
        except (UserError, flags.Error, AttributeError, TypeError, ValueError) as error:
            _exit(f"command line: {error}")
        if len(rest) > 1:
            _exit(f"command line: unexpected argument {rest[1]!r}")
        return rest

    def guarded(_: Sequence[str]) -> None:
        try:
            main()
        except UserError as error:
            _exit(error)

    logging.set_verbosity(logging.ERROR)
    app.run(guarded, flags_parser=parse)


def _exit(error: Exception | str) -> None:
    print("error:", " ".join(str(error).replace("\\'", "'").split()), file=sys.stderr)
    sys.exit(2)


def parse_named(text: str, key: str) -> dict[str, str]:
    """ "NAME=PATH,NAME=PATH" as a dict. Raises UserError, naming the key, where it is something else."""
    named = {}
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if not name or not path:
            raise UserError(f"{key}: {part!r} is not NAME=PATH")
        named[name] = path
    return named
