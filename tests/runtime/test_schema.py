"""JSON from outside: a value of the type, or one line that names the key."""

import dataclasses

import pydantic
import pytest

from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.schema import parse_json, read_json


@dataclasses.dataclass
class Item:
    count: int
    share: pydantic.FiniteFloat = 0.0
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def test_a_file_that_fits_becomes_an_instance(tmp_path):
    (tmp_path / "item.json").write_text('{"count": 3, "share": 1, "files": {"a": "b"}}')
    assert read_json(tmp_path / "item.json", Item) == Item(3, 1.0, {"a": "b"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"f.json: input should be an object, not \[\]"),
        ("null", "f.json: input should be an object, not None"),
        ("{}", "f.json: count: field required"),
        ('{"count": "3"}', "f.json: count: input should be a valid integer, not '3'"),
        ('{"count": 1, "share": NaN}', "f.json: share: input should be a finite number, not nan"),
        ('{"count": 1, "files": {"a": 3}}', "f.json: files.a: input should be a valid string, not 3"),
        ('{"count', "f.json: not JSON: EOF"),
        ("[" * 100_000, "f.json: not JSON: recursion limit exceeded"),
        ("9" * 5_000, "f.json: not JSON: number out of range"),
        (b"\xff", "f.json: not JSON"),
        ('{"count": "' + "x" * 10_000 + '"}', r"not 'x{59}\.\.\.$"),
    ],
)
def test_text_that_does_not_fit_gives_one_line_that_names_the_key(text, message):
    with pytest.raises(UserError, match=message):
        parse_json(text, Item, "f.json")


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_json(tmp_path / "none.json", Item)
    with pytest.raises(UserError, match=r"cannot read it: Is a directory"):
        read_json(tmp_path, Item)
