"""The benchmark runs, and says what is missing. What it measures is not judged here."""

import sys

import pytest

from rho1_jax.data.store import Store
from rho1_jax.runtime.errors import UserError
from tools import benchmark
from tools.benchmark_data import loading_ways, scoring_ways


def test_each_arm_has_a_speed(capsys):
    found = benchmark.measure("steps", ["tiny"], peers=False, repeats=1, text=None)
    assert list(found["tiny"]) == ["CLM", "SLM online", "SLM cached", "scoring"]
    assert all(0 < way["lowest"] <= way["median"] <= way["highest"] for way in found["tiny"].values())
    assert "| SLM online |" in capsys.readouterr().out


def test_every_way_has_its_turn_in_each_round(monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    turns = []
    ways = {name: lambda name=name: turns.append(name) for name in "ab"}
    assert set(benchmark.timed(ways, 1, 2)) == {"a", "b"}
    assert turns == ["a", "b"] * 3


def test_loading_counts_targets(data):
    ways, amount = loading_ways(str(data), 4)
    assert amount == 10 * 4 * 16 and len(ways["batches"]()) == 10


def test_scoring_leaves_nothing_beside_the_data(data, monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    size = benchmark.SIZES["tiny"]._replace(model=benchmark.SIZES["tiny"].model | {"vocab_size": 300})
    ways, amount = scoring_ways(str(data), size.config())
    assert amount == 16 * len(Store(data).rows("train"))
    assert set(benchmark.timed(ways, amount, 1)) == {"forward pass", "score"}
    assert not (data / "scores").exists()


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.benchmark_peers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"--peers: .*torch.*pip install -e '.\[peers\]'"):
        benchmark.peer_module()
