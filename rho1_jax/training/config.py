"""Config files on the command line, with errors a user can act on."""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from rho1_jax.configs.default import ModelConfig
from rho1_jax.method.selection import Selection
from rho1_jax.models.attention import ATTENTION
from rho1_jax.models.decoder import FAMILIES, REMAT
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import write_text

CONFIG_FILE = "config.json"
# The fields of the `model` section that say how a model is run, not which one it is.
RUN_SETTINGS = ("compute_dtype", "attention", "remat", "unroll", "loss_chunk")


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


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The `model` section. Raises UserError where its sizes do not fit together."""
    model = ModelConfig(**config.model)
    if model.heads % model.kv_heads:
        raise UserError(f"config.model.kv_heads={model.kv_heads} does not divide config.model.heads={model.heads}")
    if model.head_width % 2:
        raise UserError(f"config.model.head_width={model.head_width} is odd: rotary positions need pairs")
    for key, values in (("family", FAMILIES), ("attention", ATTENTION), ("remat", REMAT)):
        if config.model[key] not in values:
            raise UserError(f"config.model.{key}={config.model[key]!r} is none of {', '.join(values)}")
    return model


def selection_rule(config: ml_collections.ConfigDict) -> Selection:
    """The `selection` section. Raises UserError where a value cannot be."""
    rule = Selection(**config.selection)
    try:
        rule.check()
    except ValueError as error:
        raise UserError(f"config.selection.{error}") from None
    return rule


def run_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of the `model` section that belong to a run, whatever the model."""
    return {name: config.model[name] for name in RUN_SETTINGS}


def as_saved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as it will be read back from JSON."""
    return json.loads(json.dumps(config.to_dict()))


def parse_named(text: str, key: str) -> dict[str, str]:
    """ "NAME=PATH,NAME=PATH" as a dict. Raises UserError, naming the key, where it is something else."""
    named = {}
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if not name or not path:
            raise UserError(f"{key}: {part!r} is not NAME=PATH")
        named[name] = path
    return named


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Saves the resolved config beside the run."""
    write_text(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> list[str]:
    """The keys in which two nested dicts differ, as "config.a.b: 1 -> 2"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}.{key}")
        elif before != after:
            found.append(f"{prefix}.{key}: {before!r} -> {after!r}")
    return found
