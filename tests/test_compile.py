"""--compile: the numbers of the eager run at every size, with one compilation per phase. Slow.

--cuda-graphs: where it is refused. tests/test_gpu.py shows that it works.
"""

import pytest
import torch
from inprocess import config_of, tiny_run
from runs import TINY, cli

import loop
from base.device import seed_everything
from base.errors import UsageError
from harness import preflight
from train_utils import train_step

SIZES = ["--resize-schedule", "16,24,32"]


def losses(run) -> list[float]:
    """Return a trace of two steps in each phase."""
    found = []
    run.state.model.train()
    for phase in run.phases:
        loader, how = loop.start_phase(run, phase)
        loader.order.seek(phase.first_epoch)
        for _, (images, labels) in zip(range(2), loader, strict=False):
            found.append(train_step(run.state, how, images, labels).result().loss)
    return found


@pytest.mark.slow
def test_compiled_training_follows_the_eager_trace_with_one_compilation_per_phase(tmp_path):
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = [*SIZES, "--drop-path-rate", "0"]  # compiled code draws from a random stream of its own
    run = tiny_run(tmp_path, *options, "--compile")
    preflight.check_resources(run)
    assert counters["stats"]["unique_graphs"] == 1  # the first phase is compiled before anything is written
    compiled = losses(run)
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    assert compiled == pytest.approx(losses(tiny_run(tmp_path, *options)), rel=1e-4)


@pytest.mark.slow
def test_no_number_of_phases_is_too_many_to_compile(tmp_path):
    """Beyond its limit, torch.compile goes on in eager mode."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    sizes = [str(size) for size in range(8, 13)]
    many = ["--resize-schedule", ",".join(sizes), "--phase-batch-sizes", "5,5,5,5,5", "--epochs", "5"]
    losses(tiny_run(tmp_path, *many, "--compile", "--accumulate", "2", "--subset-size", "40"))
    assert counters["stats"]["unique_graphs"] == 10  # pieces of 3 and 2 images


@pytest.mark.slow
def test_a_missing_compiler_is_an_error_before_anything_is_written(tmp_path):
    caches = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = cli(*TINY, "--dataset", "digits", "--compile", "--save-dir", tmp_path / "run", **caches)
    assert done.returncode == 6 and "error: torch.compile failed: " in done.stderr
    assert "fix: use --no-compile" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu"], "needs an NVIDIA GPU"),
        (["--device", "mps"], "needs an NVIDIA GPU"),
        (["--device", "cuda", "--accumulate", "2"], "cannot accumulate"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_work(arguments, words):
    with pytest.raises(UsageError, match=f"--cuda-graphs {words}"):
        config_of("--cuda-graphs", *arguments)


def test_cuda_graphs_are_refused_on_several_ranks(monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--cuda-graphs works in one process only"):
        config_of("--cuda-graphs", "--device", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_graphs_are_refused_where_no_gpu_is_found(tmp_path):
    with pytest.raises(UsageError, match="--cuda-graphs needs an NVIDIA GPU; this is cpu"):
        tiny_run(tmp_path, "--cuda-graphs", "--device", "auto")


@pytest.mark.slow
def test_compiled_drop_path_reads_its_seed_anew(tmp_path):
    run = tiny_run(tmp_path, *SIZES, "--drop-path-rate", "0.5", "--compile")
    for name, value in run.state.model.named_parameters():
        if "bn" in name and name.endswith("weight"):
            value.data.fill_(1.0)  # a branch that starts as zero would hide that it is dropped
    forward = loop.start_phase(run, run.phases[0])[1].forward
    images = torch.randn(16, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    run.state.model.train()

    def logits(seed: int) -> torch.Tensor:
        seed_everything(seed)
        return forward(images).detach().clone()

    first, again, other = logits(1), logits(1), logits(2)
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)
