"""The report: what it contains, that it links to nothing outside, and that text never becomes markup."""

from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser

import pytest

from analysis import figures, learning_curves, markdown, page, report, runs
from base import flags
from base.errors import DataError, ResourceError, UsageError
from harness import rundir

EVIL = """<script>alert('x')</script>"><img src=http://evil.example/x onerror=alert(1)>&amp;"""
VOID = {"meta", "img", "br", "input"}


def row(epoch: int, **values) -> dict:
    place = {"epoch": epoch, "image_size": 32 if epoch < 3 else 48, "batch_size": 64, "lr": 1e-3}
    raw = {"train_loss": 2.0, "train_top1": 51.0, "val_loss": 1.5, "val_top1": 40.0 + epoch, "val_top5": 80.0}
    averaged = {"ema_val_loss": 1.4, "ema_val_top1": 41.25 + epoch, "ema_val_top5": 81.0}
    speed = {"images_per_second": 1234.0, "data_wait_percent": 1.0, "seconds": 1800.0, "bad_steps": 0}
    return {**place, **raw, **averaged, **speed, "best": False, **values}


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "first")


def make_run(folder, *, name: str = "owl", lr: float = 0.1):
    (folder / "plots").mkdir(parents=True)
    (folder / "validation").mkdir()
    rows = [row(1), row(2, val_top1=None, val_loss=None), row(3, best=True), row(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.json").write_text(
        json.dumps({"arch": "resnet18", "dataset": name, "lr": lr, "epochs": 4})
    )
    (folder / "env.json").write_text(
        json.dumps({"torch": "2.x", "device": name, "command": f"train.py {name}"})
    )
    result = {"image_size": 48, "weights": "ema", "bn": "trained", "tta": "none", "top1": 44.25, "top5": 81.0}
    result |= {"loss": 1.4, "macro_f1": 43.9, "ece": 2.5}
    one_class = {"class": "n1", "name": name, "precision": 0.5, "recall": 0.25, "f1": 0.3, "support": 4}
    pair = {"truth_name": name, "guess_name": "dog", "times": 3, "share": 0.75}
    scores = {"results": [result], "per_class": [one_class], "confused_pairs": [pair]}
    (folder / "validation" / "scores.json").write_text(json.dumps(scores))
    for path in (
        folder / "validation" / "confusion.png",
        folder / "plots" / "gradcam.png",
        folder / "plots" / "curves.png",
    ):
        figures.save(figures.figure(1, 1), path)
    return folder


class Reader(HTMLParser):
    """Every tag and attribute, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def written(*arguments, out) -> str:
    assert report.main([*map(str, arguments), "--no-pictures", "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_report_of_one_run_holds_what_is_known_about_it(run_dir, tmp_path):
    text = written(run_dir, out=tmp_path / "r.html")
    reader = Reader(text)
    words = " ".join(" ".join(reader.text).split())
    for expected in (
        "44.25 %",
        "best top-1, EMA weights",
        "2h00m",
        "32 px → 48 px",
        "resnet18",
        "Most confused pairs",
        "75.0",
        "train.py owl",
        "2.x",
    ):
        assert expected in words, expected
    pictures = [value[:15] for name, value in reader.attributes if name == "src"]
    assert sorted(pictures) == ["data:image/png;"] * 2 + ["data:image/svg+"] * 4  # curves.png is a chart here
    charts = [json.loads(value) for name, value in reader.attributes if name == "data-chart"]
    assert len(charts) == 4 and charts[0]["points"] == ["epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    raw = next(s for s in charts[0]["series"] if s["name"] == "validation, raw weights")
    assert raw["text"] == ["41", None, "43", "44"]


def add_steps(folder) -> None:
    """Give a run a row for every tenth step."""
    row = {"epoch": 1, "image_size": 32, "batch_size": 64, "lr": 0.1, "train_loss": 2.0, "grad_norm": 0.5}
    row |= {"grad_norm_max": 2.5, "images_per_second": 100.0, "data_wait_percent": 3.0, "bad_steps": 0}
    lines = [json.dumps(row | {"step": step}) + "\n" for step in (10, 20, 1030)]
    (folder / "steps.jsonl").write_text("".join(lines))


def test_the_report_draws_the_steps_of_a_run_and_compares_those_of_several(run_dir, tmp_path):
    other, old = make_run(tmp_path / "second"), make_run(tmp_path / "old")
    for folder in (run_dir, other):
        add_steps(folder)
    for arguments, names in (
        ([run_dir], ["mean of 10 steps"]), ([run_dir, other, old], ["first", "second"])
    ):  # fmt: skip
        reader = Reader(written(*arguments, out=tmp_path / "r.html"))
        charts = [json.loads(value) for name, value in reader.attributes if name == "data-chart"]
        assert len(charts) == (9 if len(arguments) == 1 else 6) and "Steps" in reader.text
        norm = charts[5]
        assert norm["points"] == ["step 10", "step 20", "step 1,030"]
        assert [(line["name"], line["text"]) for line in norm["series"]] == [(n, ["0.5"] * 3) for n in names]
        assert 0 < norm["x"][0] < norm["x"][1] < norm["x"][2] < 100
    assert "Steps" not in Reader(written(old, out=tmp_path / "r.html")).text


def test_the_page_links_to_nothing_outside(run_dir, tmp_path):
    text = written(run_dir, out=tmp_path / "r.html")
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|<link|<iframe|<base", re.sub(r"base64,[^\"]+", "", text)
    )
    links = [value for name, value in Reader(text).attributes if name in ("src", "href", "action")]
    assert links and all(
        value.startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,")) for value in links
    )
    assert (
        f"sha256-{base64.b64encode(__import__('hashlib').sha256(page.SCRIPT.encode()).digest()).decode()}"
        in text
    )


def test_no_name_becomes_markup(tmp_path):
    runs = [make_run(tmp_path / "a", name=EVIL), make_run(tmp_path / "b&<b>", name=EVIL, lr=0.2)]
    for arguments in (runs[:1], runs):
        text = written(*arguments, out=tmp_path / "r.html")
        reader = Reader(text)
        assert reader.tags.count("script") == 1 and "onerror" not in dict(reader.attributes)
        assert EVIL in "".join(reader.text)  # shown as it is
    assert "b" not in [tag for tag in reader.tags if tag == "b"]


def test_several_runs_are_set_side_by_side_with_the_flags_that_differ(run_dir, tmp_path):
    other = make_run(tmp_path / "second", lr=0.5)
    reader = Reader(written(run_dir, other, out=tmp_path / "r.html"))
    words = " ".join(" ".join(reader.text).split())
    assert "What differs" in words and "--lr 0.1 0.5" in words and "--arch" in words
    charts = [json.loads(value) for name, value in reader.attributes if name == "data-chart"]
    assert [s["name"] for s in charts[0]["series"]] == ["first (best 44.25 %)", "second (best 44.25 %)"]


def test_runs_on_other_data_are_not_called_the_same(run_dir, tmp_path, capsys):
    other = make_run(tmp_path / "second")
    for path, images in ((run_dir, 20), (other, 19)):
        env = json.loads((path / "env.json").read_text()) if (path / "env.json").exists() else {}
        (path / "env.json").write_text(json.dumps(env | {"num_train": images}))
    words = " ".join(" ".join(Reader(written(run_dir, other, out=tmp_path / "r.html")).text).split())
    assert "num_train 20 19" in words and "are the same" not in words
    assert report.main(["--list", str(tmp_path)]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "num_train=20",
        "num_train=19",
    ]


def test_a_run_with_empty_columns_is_still_reported(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    nothing = {key: None for key in row(1) if key not in ("epoch", "image_size", "batch_size", "lr", "best")}
    (folder / "metrics.jsonl").write_text(json.dumps(row(1, **nothing)) + "\n")
    Reader(written(folder, out=tmp_path / "r.html"))


def test_a_studys_directory_is_reported_from_its_files(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    figures.save(figures.figure(1, 1), folder / "curves.png")
    table = "| v | top-1 |\n|---|---|\n| **a** | `--lr 1` |"
    text = f"# A <b>study\n\nWhat?\n\n{table}\n\n![curves](curves.png)\n\n- one\n- two **bold**\n"
    (folder / "summary.md").write_text(text)
    (folder / "summary.csv").write_text("variant,seed\na,0\n")
    reader = Reader(written(folder, out=tmp_path / "r.html"))
    assert reader.tags.count("img") == 1 and reader.tags.count("li") == 2 and reader.tags.count("table") == 2
    assert "A <b>study" in reader.text and "--lr 1" in reader.text


def test_markdown_takes_pictures_from_its_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    figures.save(figures.figure(1, 1), tmp_path / "secret.png")
    found = markdown.to_html("![x](../secret.png)\n\n![y](http://evil.example/y.png)", tmp_path / "in")
    assert "<img" not in found and "no picture" in found


def test_usage_and_data_errors(run_dir, tmp_path):
    for arguments in ([], [str(run_dir), "--list", "."], [str(run_dir), str(tmp_path)]):
        with pytest.raises(UsageError):
            report.main(arguments)
    with pytest.raises(UsageError, match="once"):
        report.main(["--list", ".", "--watch"])
    with pytest.raises(DataError, match="neither a run nor a study") as caught:
        report.main([str(tmp_path), "--no-pictures"])
    assert caught.value.fix.endswith("holds first")
    with pytest.raises(DataError, match="no run below"):
        (tmp_path / "empty").mkdir()
        report.main(["--list", str(tmp_path / "empty")])
    with pytest.raises(ResourceError):
        written(run_dir, out=run_dir / "metrics.jsonl" / "r.html")


def test_an_output_is_checked_before_pictures_are_made_and_a_link_is_followed(run_dir, tmp_path, monkeypatch):
    (run_dir / "best_x.pt").touch()
    monkeypatch.setattr(report, "call", lambda command: pytest.fail("a picture is made"))
    with pytest.raises(ResourceError, match="cannot write"):
        report.main([str(run_dir), "--out", str(run_dir / "best_x.pt" / "r.html")])
    (tmp_path / "r.html").symlink_to("linked.html")
    assert report.main([str(run_dir), "--no-pictures", "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").is_symlink() and (tmp_path / "linked.html").is_file()


def test_the_list_names_each_runs_score_and_distinguishing_flags(run_dir, tmp_path, capsys):
    make_run(tmp_path / "second", lr=0.5)
    make_run(tmp_path / "third")
    assert report.main(["--list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["first", "4/4", "44.25", "3", "2.00"]
    assert lines[2].split() == ["second", "4/4", "44.25", "3", "2.00", "--lr=0.5"]


def test_only_missing_or_outdated_pictures_are_made(run_dir, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(report, "call", lambda command: commands.append(command) or "it failed")
    assert report.main([str(run_dir)]) == 0 and not commands  # no checkpoint
    checkpoint = run_dir / "best_x.pt"
    checkpoint.touch()
    os.utime(run_dir / "plots" / "gradcam.png", (1, 1))
    os.utime(run_dir / "validation" / "scores.json", (2**33, 2**33))
    assert report.main([str(run_dir), "--data-dir", str(tmp_path), "--device", "cpu"]) == 0
    common = [str(checkpoint), "--device", "cpu", "--data-dir", str(tmp_path)]
    assert commands == [["-m", "analysis.misclassified", *common], ["-m", "analysis.gradcam", *common]]
    assert "No gradcam.png: it failed." in (run_dir / "report.html").read_text()


def test_scores_of_other_data_are_announced(run_dir, monkeypatch, capsys):
    (run_dir / "best_x.pt").touch()
    for path in run_dir.rglob("*.*"):
        os.utime(path, (1, 1) if path.name in ("scores.json", "misclassified.png") else (2**33, 2**33))
    monkeypatch.setattr(report, "call", lambda command: "")
    assert report.main([str(run_dir), "--data-dir", "other"]) == 0
    note = f"The data are not those of the run; their scores are in {run_dir}/validation_other_data."
    assert (run_dir / "report.html").read_text().count(note) == capsys.readouterr().err.count(note) == 1


@pytest.mark.slow
def test_pictures_that_cannot_be_made_are_explained_and_cost_nothing(run_dir, tmp_path):
    (run_dir / "best_x.pt").write_bytes(b"no checkpoint")
    for path in run_dir.rglob("*.*"):
        path.touch()
    (run_dir / "plots" / "gradcam.png").unlink()
    (run_dir / "plots" / "misclassified.png").write_bytes((run_dir / "plots" / "curves.png").read_bytes())
    assert report.main([str(run_dir), "--device", "cpu"]) == 0
    text = (run_dir / "report.html").read_text()
    assert "No gradcam.png: damaged or incomplete checkpoint" in text and "No scores.json" not in text


def test_a_chart_knows_where_its_epochs_are_and_is_the_same_file_every_time(run_dir):
    run, panel = runs.read_run(run_dir, "a"), learning_curves.TOP1
    first, second = (page.chart(learning_curves.single(run, panel)) for _ in range(2))
    assert first == second
    data = json.loads(dict(Reader(first).attributes)["data-chart"])
    assert 0 < data["x"][0] < data["x"][-1] < 100
    gaps = [b - a for a, b in zip(data["x"], data["x"][1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.02)


def test_a_loss_with_an_axis_of_its_own_is_in_the_page(run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text()) | {"loss": "bce"}
    (run_dir / "config.json").write_text(json.dumps(config))
    run = runs.read_run(run_dir, "a")
    page_of_loss = page.chart(learning_curves.single(run, learning_curves.LOSS))
    assert "training batches" in page_of_loss and "validation, raw weights" in page_of_loss
    assert report.main([str(run_dir), "--no-pictures", "--out", str(tmp_path / "r.html")]) == 0


def test_scores_of_another_run_are_not_shown(run_dir):
    assert runs.read_run(run_dir, "a").validation
    env = json.loads((run_dir / "env.json").read_text()) | {"run": "abcd"}
    (run_dir / "env.json").write_text(json.dumps(env))
    scores = json.loads((run_dir / "validation" / "scores.json").read_text())
    for other, known in (("abcd", True), ("ef01", False)):
        (run_dir / "validation" / "scores.json").write_text(json.dumps(scores | {"run": other}))
        assert bool(runs.read_run(run_dir, "a").validation) is known


def test_an_empty_chart_is_left_out(run_dir):
    run = runs.read_run(run_dir, "a")
    nothing = learning_curves.Panel("t", "u", {"unknown": "unknown"})
    assert page.chart(learning_curves.single(run, nothing)) == ""


def test_a_missing_run_lists_those_beside_it(run_dir):
    with pytest.raises(DataError, match="first"):
        report.main([str(run_dir.parent / "frist"), "--no-pictures"])


def test_watch_writes_the_page_after_each_epoch_and_ends_with_the_last(
    run_dir, tmp_path, monkeypatch, capsys
):
    metrics, out = run_dir / "metrics.jsonl", tmp_path / "page.html"
    lines = metrics.read_text().splitlines(keepends=True)
    reloads = []

    def next_epoch(_seconds: float) -> None:
        if out.exists():
            reloads.append('http-equiv="refresh"' in out.read_text())
        time = 10**9 * (1 + metrics.read_text().count("\n"))
        metrics.write_text("".join(lines[: metrics.read_text().count("\n") + 1]))
        os.utime(metrics, ns=(time, time))

    metrics.write_text("")
    monkeypatch.setattr(report.time, "sleep", next_epoch)
    assert report.main([str(run_dir), "--watch", "--out", str(out)]) == 0
    assert reloads == [True] * 3
    assert 'http-equiv="refresh"' not in out.read_text()  # complete: four of four epochs
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" * 4 and "no epoch yet" in printed.err


def test_watch_ends_when_the_run_was_stopped(run_dir, tmp_path, monkeypatch, capsys):
    metrics, out, looks = run_dir / "metrics.jsonl", tmp_path / "page.html", []
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    lock = rundir._lock(run_dir)  # as train.py holds it

    def next_look(_seconds: float) -> None:
        looks.append('http-equiv="refresh"' in out.read_text())
        if len(looks) == 3:
            lock.release()  # as when train.py ends, however it does

    monkeypatch.setattr(report, "QUIET", -1)
    monkeypatch.setattr(report.time, "sleep", next_look)
    assert report.main([str(run_dir), "--watch", "--out", str(out)]) == 0
    assert looks == [True] * 3 and 'http-equiv="refresh"' not in out.read_text()
    assert "--resume auto" in capsys.readouterr().err


def test_numbers_with_an_error_or_an_interval_are_not_broken(tmp_path):
    text = "| a | b | c |\n| - | - | - |\n| x | 15.6 ± 0.5 | +0.8 [-5.2, +6.9]: in the noise |"
    found = markdown.to_html(text, tmp_path)
    assert '<td class="n">15.6\xa0±\xa00.5</td>' in found
    assert "+0.8 [-5.2,\xa0+6.9]: in the noise" in found


def test_the_table_of_runs_shows_flags_that_train_py_accepts(tmp_path):
    for k, values in enumerate(({"subset": False}, {"subset": True}, {"subset": True})):
        config = make_run(tmp_path / str(k)) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))
    first = runs.listing(runs.read_runs(runs.find_runs(tmp_path))).splitlines()[1]
    assert first.split()[-1] == "--no-subset"
    flags.train_parser().parse_args([first.split()[-1]])
