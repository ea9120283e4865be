"""Local paths, and files that are written whole or not at all."""

import pathlib

import pytest

from rho1_jax.data.loader import parse_mixture
from rho1_jax.runtime.command_line import parse_named
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import json_lines, local_path, replacing, write_text


@pytest.mark.parametrize("text", ["gs://b/run", "s3://b", "hf://org/model", "file:///tmp/x", "a+b.c-1://x"])
def test_a_path_with_a_scheme_is_refused(text):
    with pytest.raises(UserError, match="--workdir=.*: rho1 reads and writes local files only; mount the bucket"):
        local_path(text, "--workdir")
    with pytest.raises(UserError, match="local files only"):
        local_path(pathlib.Path(text), "--workdir")  # "gs:/b/run"


@pytest.mark.parametrize("text", ["run", "/tmp/run", "./a:b", "a:3", "DIR:3", "../x", "a//b", "", "1s3:/x"])
def test_any_other_path_is_local(text):
    assert local_path(text, "--workdir") == pathlib.Path(text)
    assert local_path(pathlib.Path(text), "--workdir") == pathlib.Path(text)


def test_lists_of_paths_name_the_key():
    with pytest.raises(UserError, match="config.data.train=gs://b/x:3: rho1 reads"):
        parse_mixture("a:1,gs://b/x:3")
    with pytest.raises(UserError, match="config.data.train=gs://b/x: rho1 reads"):
        parse_mixture("gs://b/x")
    assert parse_mixture("a:1,b/c") == [("a", 1.0), ("b/c", 1.0)]
    with pytest.raises(UserError, match="config.eval.data: b=s3://x: rho1 reads"):
        parse_named("a=x,b=s3://x", "config.eval.data")
    assert parse_named("a=x,b=y/z", "config.eval.data") == {"a": "x", "b": "y/z"}
    with pytest.raises(UserError, match="config.eval.data: 'x' is not NAME=PATH"):
        parse_named("x", "config.eval.data")
    assert parse_named(r"a=x\,y=z,b=w", "config.eval.data") == {"a": "x,y=z", "b": "w"}
    with pytest.raises(UserError, match="is not NAME=PATH"):
        parse_named("=x", "config.eval.data")
    with pytest.raises(UserError, match="config.eval.data: two paths have the name 'a'; rename one"):
        parse_named("a=x,b=z,a=y", "config.eval.data")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, '{"a": 1}')
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == '{"a": 1}'
    write_text(path, json_lines(["\u2028", 1]))
    assert path.read_text(encoding="utf-8") == '"\u2028"\n1\n'
    assert [child.name for child in path.parent.iterdir()] == ["a.json"]
