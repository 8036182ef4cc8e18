"""benchmarks.step: the loops train as described and take turns, and the rows hold what was measured."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from base.device import Runtime
from benchmarks import records, step, step_counts, step_loops
from models import build_model

CPU = Runtime(torch.device("cpu"))
TINY = step_loops.Setting("resnet_tiny", 16, 8, CPU)


@pytest.mark.parametrize("name", [name for name in step_loops.LOOPS if name != "timm"])
def test_every_loop_takes_optimizer_steps(name, monkeypatch):
    stepped = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: stepped.append(len(self.param_groups[0]["params"]))
    )
    loop = step_loops.LOOPS[name](TINY)
    loop()
    loop()
    count = sum(p.ndim > 1 for p in build_model("resnet_tiny", num_classes=1000).parameters())
    assert stepped == [count, count]


def test_a_variant_changes_one_choice():
    found = step_loops.variants(replace(TINY, runtime=Runtime(torch.device("cpu"), torch.bfloat16)))
    assert list(found) == ["fp32", "nchw", "compile", "blurpool", "batch 4", "batch 16", "batch 32"]
    assert found["fp32"].runtime == CPU and found["compile"].config().compile
    assert found["blurpool"].config().use_blurpool and found["batch 32"].config().batch_size == 32


def test_the_loops_take_turns_and_every_other_round_goes_backwards():
    calls = []
    loops = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = step.in_turns(loops, rounds=4, steps=2, device=CPU.device)
    assert "".join(calls) == "aabbccccbbaaaabbccccbbaa"
    assert [len(times) for times in seconds.values()] == [4, 4, 4]


ARGUMENTS = "--arch resnet_tiny --rounds 2 --steps 1 --device cpu --amp off"


def test_the_command_writes_rows_a_table_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(step_loops.LOOPS, "timm", absent)
    out = ["--out", str(tmp_path / "new")]
    sizes = ["--sizes", "16", "24", "--batch-sizes", "8", "4"]
    assert step.main([*ARGUMENTS.split(), *sizes, *out]) == 0
    rows = records.load(out[1], "step")
    settings = [(True, 64, "fp32"), (True, 64, "bf16"), (False, 16, "fp32"), (False, 24, "fp32")]
    assert [(row["narrow"], row["size"], row["precision"], row["loop"]) for row in rows] == [
        (*setting, loop) for setting in settings for loop in step_loops.LOOPS if loop != "timm"
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["milliseconds"])
        assert row["cpu_milliseconds"] <= row["cpu_milliseconds_median"] and row["aten_calls"] > 50
        assert row["mixed_foreach_calls"] == 0 and row.get("host_reads", 0) == 0
    assert "host_reads" in rows[1] and "times_bare" in rows[1] and "times_bare" not in rows[0]
    printed = capsys.readouterr().out
    assert printed.count("timm: skipped (No module named 'timm')") == 4
    assert printed.count(records.line(rows[1], step.COLUMNS)) == 2  # when it was measured, and in the table

    monkeypatch.setattr(step, "compare", None)  # nothing is measured again
    assert step.main([*ARGUMENTS.split(), *sizes, *out]) == 0
    assert records.table(rows, step.COLUMNS) in capsys.readouterr().out
    assert step.main(["--table", *out]) == 0


def test_an_unavailable_variant_is_skipped_and_rows_are_written_one_by_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_loops, "LOOPS", {"bare": step_loops.bare, "project": step_loops.project})
    monkeypatch.setitem(sys.modules, "antialiased_cnns", None)
    changed = {
        "nchw": replace(TINY, memory_format=torch.contiguous_format),
        "blurpool": replace(TINY, arch="resnet18", options=("--use-blurpool",)),
        "batch 4": replace(TINY, batch_size=4),
    }
    monkeypatch.setattr(step_loops, "variants", lambda setting: changed)
    compared = []
    compare = step.compare

    def counting(*args, **options):
        compared.append(len(records.load(tmp_path)) if compared else 0)
        return compare(*args, **options)

    monkeypatch.setattr(step, "compare", counting)
    sizes = ["--sizes", "16", "--batch-sizes", "8", "--variants", "--out", str(tmp_path)]
    assert step.main([*ARGUMENTS.split(), *sizes]) == 0
    rows = records.load(tmp_path, "step")[6:]
    assert [row["variant"] for row in rows] == ["nchw", "batch 4"] and compared == [0, 2, 4, 6, 7, 7]
    assert rows[1]["base_batch_size"] == 8 and rows[1]["times_faster_than_default"] > 0
    faster = 0.5 / rows[1]["times_project"]  # half the batch in so many times the time
    assert rows[1]["times_faster_than_default"] == faster and rows[1]["default_images_per_second"] > 0
    assert "blurpool: skipped (--use-blurpool needs the antialiased_cnns package)" in capsys.readouterr().out


def test_the_ratios_are_medians_over_the_rounds():
    timings = {
        "bare": [(1.0, 2.0), (2.0, 2.0), (10.0, 4.0)],
        "project": [(3.0, 3.0), (2.0, 8.0), (20.0, 4.0)],
    }
    row = step.row_of("project", TINY, timings, None)
    assert (row["milliseconds"], row["cpu_milliseconds"], row["images_per_second"]) == (3000, 3000, 8 / 3)
    assert row["times_bare"] == 2 and row["cpu_times_bare"] == 1.5 and "times_timm" not in row
    assert row["row"] == "resnet_tiny, 16 px, batch 8, fp32, project"
    assert step.row_of("bare", TINY, timings, None)["times_project"] == 0.5


def test_calls_are_counted_without_views_and_mixed_lists_are_found():
    one, two = torch.ones(3), torch.ones(3, dtype=torch.int64)
    lists = [[one, one], [one, one]], [[one, two], [one, two]]
    empty = torch.empty(2, 3)
    found = [step_counts.calls(lambda pair=pair: torch._foreach_copy_(*pair)) for pair in lists]
    assert [count["mixed_foreach_calls"] for count in found] == [0, 1]
    assert step_counts.calls(lambda: empty.view(6).mul(2))["aten_calls"] == 1
    assert step_counts.calls(lambda: torch.empty(5).fill_(1).sum().item())["aten_calls"] == 2


def test_a_read_in_the_step_is_found(monkeypatch):
    assert step_counts.host_reads(TINY) == 0
    backward = step_counts.train_utils.backward
    monkeypatch.setattr(step_counts.train_utils, "backward", lambda *args: backward(*args) + 0 * read(*args))

    def read(state, options, images, targets):
        return images.sum().item()

    assert step_counts.host_reads(TINY) == 1


def test_a_narrow_model_has_all_layers_and_one_channel():
    wide = build_model("resnet50", num_classes=9)
    config = replace(TINY, arch="resnet50", narrow=True).config()
    narrow = build_model("resnet50", num_classes=9, width=config.width)
    assert narrow.conv1.weight.shape == (1, 3, 7, 7)
    assert narrow.state_dict().keys() == wide.state_dict().keys()
    assert replace(TINY, arch="resnet50").config().width is None


def test_the_activity_of_a_gpu_is_summed_over_its_kernels():
    def event(name, kind, us, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

    gpu, cpu = step_counts.DeviceType.CUDA, step_counts.DeviceType.CPU
    events = [
        event("implicit_convolve_sgemm", gpu, 3000),
        event("Memcpy DtoH (Device -> Pinned)", gpu, 1000),
        event("Optimizer.step#AdamW.step", gpu, 9000, annotation=True),
        event("cudaLaunchKernel", cpu, 10),
        event("cuLaunchKernelEx", cpu, 10),
        event("cudaStreamSynchronize", cpu, 5000),
        event("cudaDeviceSynchronize", cpu, 7000),
    ]
    assert step_counts.activity(events * 2, seconds_per_step=0.005, steps=2) == {
        "kernels": 1,
        "launches": 2,
        "copies": 1,
        "busy_percent": pytest.approx(80),
        "waits": 1,
        "wait_milliseconds": 5,
    }


def absent(setting):
    raise ImportError("No module named 'timm'")


def test_a_wrong_number_of_batch_sizes_is_refused():
    with pytest.raises(step.UsageError, match="1 --batch-sizes for 2 --sizes"):
        step.main(["--sizes", "16", "24", "--batch-sizes", "8"])
