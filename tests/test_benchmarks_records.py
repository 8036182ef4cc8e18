"""Records of benchmarks: appended one by one, read back after a kill, the latest of each row."""

import json

import pytest

from base.errors import DataError
from benchmarks import records

HERE = {"machine": "a machine", "commit": "abc", "load": 0.1}


def record(row: str, benchmark: str = "loader", **columns) -> dict:
    return {"benchmark": benchmark, "row": row} | HERE | columns


def test_records_come_back_with_the_latest_of_each_row(tmp_path):
    out = tmp_path / "new"
    records.append(out, record("a", us=1))
    records.append(out, record("b", us=float("nan")))
    records.append(out, record("a", "step", ms=3))
    records.append(out, record("a", us=2))
    assert records.load(out) == [record("a", us=2), record("b", us=None), record("a", "step", ms=3)]
    assert records.load(out, "step") == [record("a", "step", ms=3)]
    assert len((out / "loader.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("left", ['{"benchmark": "loader", "ro', "5\n", '{"row": "x"}', "\n"])
def test_a_line_that_a_kill_cut_short_costs_only_itself(tmp_path, left):
    records.append(tmp_path, record("a"))
    with (tmp_path / "loader.jsonl").open("a") as file:
        file.write(left)
    records.append(tmp_path, record("b"))
    assert [found["row"] for found in records.load(tmp_path)] == ["a", "b"]


def test_only_rows_of_this_commit_are_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(records.process, "commit", lambda: "abc")
    assert records.finished(tmp_path / "none", "loader") == set()
    records.append(tmp_path, record("a"))
    records.append(tmp_path, record("b") | {"commit": "older"})
    records.append(tmp_path, record("c", "step"))
    assert records.finished(tmp_path, "loader") == {"a"}


def test_a_record_is_flat_and_complete(tmp_path):
    with pytest.raises(AssertionError, match="machine"):
        records.append(tmp_path, {"benchmark": "x", "row": "a", "commit": "", "load": 0})
    with pytest.raises(AssertionError, match="times"):
        records.append(tmp_path, record("a", times=[1, 2]))
    with pytest.raises(DataError, match="no directory"):
        records.load(tmp_path / "none")


def test_the_environment_is_what_a_record_needs():
    found = records.environment()
    assert set(records.REQUIRED) - {"benchmark", "row"} <= found.keys()
    assert "cores" in found["machine"] and json.dumps(found)
