"""The benchmark runs, and names a missing extra. The speeds themselves are not tested."""

import sys

import pytest

from rho1_jax.data.store import Store
from rho1_jax.runtime.errors import UserError
from tools import benchmark, benchmark_cases
from tools.benchmark_cases import SIZES, timed
from tools.benchmark_data import loading_ways, scoring_ways


@pytest.mark.slow
def test_each_arm_has_a_speed(capsys):
    speeds = benchmark.measure("steps", ["tiny"], peers=False, repeats=1, text=None)["tiny steps"]
    slm = ["SLM online", "SLM cached", "SLM online, 60% backward", "SLM cached, 60% backward"]
    assert list(speeds) == ["CLM", *slm, "scoring"]
    assert all(0 < way["lowest"] <= way["median"] <= way["highest"] for way in speeds.values())
    assert "| SLM online |" in capsys.readouterr().out


def test_every_way_runs_once_per_round(monkeypatch):
    monkeypatch.setattr(benchmark_cases, "PAUSE", 0)
    turns = []
    ways = {name: lambda name=name: turns.append(name) for name in "ab"}
    assert set(timed("turns", ways, 1, 2)) == {"a", "b"}
    assert turns == ["a", "b"] * 3


def test_loading_counts_the_targets(data):
    ways, amount = loading_ways(str(data), 4)
    assert amount == 10 * 4 * 16 and len(ways["batches"]()) == 10


def test_scoring_writes_nothing_into_the_data_set(data, monkeypatch):
    monkeypatch.setattr(benchmark_cases, "PAUSE", 0)
    size = SIZES["tiny"]._replace(model=SIZES["tiny"].model | {"vocab_size": 300})
    ways, amount = scoring_ways(str(data), size.config())
    assert amount == 16 * len(Store(data).rows("train"))
    assert set(timed("scoring", ways, amount, 1)) == {"forward pass", "score"}
    assert not (data / "scores").exists()


def test_missing_peers_name_their_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.benchmark_peers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"--peers: .*torch.*pip install -e '.\[peers\]'"):
        benchmark.peer_module()
