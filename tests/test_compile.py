"""--compile: the numbers of the eager run at every size, with one compilation per phase. Slow."""

import pytest
import torch
from inprocess import tiny_run

import loop
from base.device import seed_everything
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
def test_compiled_training_follows_the_eager_trace_at_three_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)  # one graph per phase
    torch._dynamo.utils.counters.clear()
    options = [*SIZES, "--drop-path-rate", "0"]  # compiled code draws from a random stream of its own
    compiled = losses(tiny_run(tmp_path, *options, "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled == pytest.approx(losses(tiny_run(tmp_path, *options)), rel=1e-4)


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
