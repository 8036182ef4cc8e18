"""The table of targets finds the row that measured each of them, and says whether it is met."""

import pytest

from benchmarks import targets

ROW = {"machine": "a machine", "commit": "abc", "load": 0.1, "cuda": None}
STEP = ROW | {"benchmark": "step", "arch": "resnet50", "loop": "project", "variant": "", "narrow": True}
LOADER = ROW | {"benchmark": "loader", "workers": 1}


def line(what: str, rows: list) -> tuple[str, str]:
    """Return (measured, met) of the target that begins with `what`."""
    table, _ = targets.targets(rows)
    (found,) = [cells for cells in table[1:] if cells[0].startswith(what)]
    return found[2], found[3]


@pytest.mark.parametrize(("calls", "met"), [(604, "yes"), (605, "yes"), (606, "no")])
def test_a_target_at_most(calls, met):
    rows = [STEP | {"precision": "bf16", "aten_calls": calls}]
    others = [rows[0] | {"loop": "bare", "aten_calls": 1}, rows[0] | {"precision": "fp32", "aten_calls": 2}]
    assert line("ATen calls", rows + others) == (str(calls), met)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((10.0, 4.5, 2.3), ("10.0 / 4.5 / 2.3", "yes")),
        ((10.0, 4.4, 2.3), ("10.0 / 4.4 / 2.3", "no")),
        ((10.0, None, 2.3), ("10.0 / - / 2.3", "")),
    ],
)
def test_a_target_at_least_at_each_size(ratios, expected):
    name = {"augmentation": "basic", "loader": "torchvision, PIL"}
    rows = [
        LOADER | name | {"size": size, "packed_saves_cpu": ratio, "row": str(size)}
        for size, ratio in zip(targets.SIZES, ratios, strict=True)
        if ratio is not None
    ]
    assert (
        line("crop + flip at 64 / 128 / 224 px: torchvision", [*rows, rows[0] | {"workers": 2}]) == expected
    )
    assert targets.targets(rows)[1] == rows


def test_a_step_on_a_cpu_does_not_count_for_a_gpu():
    row = STEP | {"narrow": False, "size": 64, "times_bare": 1.01}
    what = "step at 64 / 128 / 224 px on a GPU, x the bare loop"
    assert line(what, [row]) == ("- / - / -", "")
    assert line(what, [row | {"cuda": "13.0"}]) == ("1.010 / - / -", "")
