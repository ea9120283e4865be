"""Every config file loads in every stage, holds exactly the default's keys, and says what each is for."""

import importlib
import pathlib
import re

import pytest

from configs import default
from rho1_jax.errors import UserError

FILES = sorted(path for path in pathlib.Path(default.__file__).parent.glob("*.py") if path.name != "__init__.py")


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


@pytest.mark.parametrize("stage", default.STAGES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stages_differ_in_their_score_and_no_key_is_new(file, stage):
    config = importlib.import_module(f"configs.{file.stem}").get_config(stage)
    assert config.selection.score == default.STAGES[stage]
    assert set(keys(config)) == set(keys(default.get_config()))


def test_every_key_has_a_comment_or_a_group_that_has():
    for line in pathlib.Path(default.__file__).read_text().splitlines():
        if re.match(r'\s+"\w+": [^{]*,', line) and not re.search(r'"(b1|b2|eps|max_new_tokens)"', line):
            assert "#" in line, line


def test_an_unknown_stage_is_refused():
    with pytest.raises(UserError, match="unknown stage 'dpo'"):
        default.get_config("dpo")
