import csv
import io
import json
import os
import stat

import pytest

from base import files
from base.errors import ResourceError, UsageError


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_is_a_formula(name):
    rows = list(csv.reader(io.StringIO(files.csv_text(("class", name), [(name, -1.5)]), newline="")))
    assert rows[0][1] == rows[1][0] == "'" + name.replace("\r", "\\r")
    assert rows[1][1] == "-1.5"  # numbers stay numbers


def test_other_text_comes_back_as_it_was():
    row = ["a, b", 'say "x"', "line\nbreak", "plain", "ünï"]
    assert list(csv.reader(io.StringIO(files.csv_text(("h",), [row]))))[1] == row


def test_json_has_no_nan():
    text = files.json_text({"a": [1.0, float("nan")], "b": (float("inf"), {"c": None})})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.0, None], "b": [None, {"c": None}]}


def test_a_name_that_is_not_unicode_is_written_escaped(tmp_path):
    assert files.write(tmp_path / "x" / "t.csv", "caf\udce9").read_text() == "caf\\udce9"
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["t.csv"]


def test_an_output_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        files.write(tmp_path / "file" / "t.csv", "")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write(tmp_path / "pipe", "text")
        assert os.read(reader, 99) == b"text" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    finally:
        os.close(reader)


def test_of_a_link_that_is_named_the_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there/old.csv", "there/new.csv"):
        link = tmp_path / "link.csv"
        link.symlink_to(name)
        files.check_output(str(link), "--csv")
        files.write(files.followed(str(link)), "text")
        assert link.is_symlink() and (tmp_path / name).read_text() == "text"
        link.unlink()
    assert files.followed("") == "" and files.followed("a.csv") == "a.csv"


def test_standard_output_that_leads_to_a_file_is_refused(tmp_path, monkeypatch):
    """As root, `--csv /dev/stdout > file` replaced /dev/stdout."""
    monkeypatch.setattr(files, "DESCRIPTORS", (str(tmp_path / "dev" / "std"),))
    (tmp_path / "dev").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dev" / "stdout").symlink_to(tmp_path / "file")
    with pytest.raises(UsageError, match="is a link to the file") as caught:
        files.check_output(str(tmp_path / "dev" / "stdout"), "--csv")
    assert caught.value.fix == "name that file with --csv, or '-' for standard output"
    (tmp_path / "dev" / "shm").touch()
    files.check_output(str(tmp_path / "dev" / "shm"), "--csv")
