"""The version of what is written to disk: checkpoints, prepared data and stored scores."""

from collections.abc import Mapping
from typing import Any

from rho1_jax.runtime.errors import UserError

KEY = "format_version"
# Raise it when this version would misread what the next one writes. Everything older must stay readable.
# 1 (no key): rho1_jax 0.1. 2: the key, config.objective. 3: checksums of arrays and files.
FORMAT_VERSION = 3


def check_format(stored: Mapping[str, Any], where: object) -> None:
    """Raises UserError if a newer version wrote this."""
    version = stored.get(KEY, 1)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where}: a newer version of rho1_jax wrote this (format {version}; this version reads up to "
            f"{FORMAT_VERSION}); upgrade rho1_jax"
        )
