"""The training step against a plain loop in float64, and what it must never do."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data_utils
import ema
from base.device import Runtime, seed_everything
from base.errors import DivergedError
from harness import checkpoint
from models import build_model
from optim import OPTIMIZERS, build_optimizer, param_groups
from optim.schedule import Schedule
from optim.undo import BatchNormBuffers
from train_utils import StepOptions, TrainState, evaluate, train_step, update

CPU = Runtime(torch.device("cpu"))
STEPS, CLASSES = 20, 5


def make(
    dtype=torch.float64,
    accumulate=1,
    scaler=False,
    alphas=(0.2, 1.0),
    clip=("norm", 0.5),
    drop_path=0.0,
    lr=1e-2,
):
    torch.manual_seed(0)
    model = build_model("resnet_tiny", num_classes=CLASSES, drop_path_rate=drop_path).to(dtype)
    optimizer = build_optimizer("adamw", model, lr=lr, momentum=0.9, nesterov=False, weight_decay=0.05)
    schedule = Schedule(optimizer, "onecycle", peak_lr=lr, total_steps=100)
    state = TrainState(
        model,
        optimizer,
        schedule,
        torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler),
        ema.EMA(model, 0.99),
    )
    mixer = data_utils.BatchMixer(CLASSES, *alphas, 0.1)
    how = StepOptions(
        model,
        mixer,
        data_utils.LOSSES["ce"],
        CPU,
        BatchNormBuffers(model),
        seed=7,
        clip=clip,
        accumulate=accumulate,
    )
    return state, how


def batches(n=STEPS, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(n)
    ]


class PlainLoop:
    """AdamW, OneCycle, clipping and EMA from their papers' formulas, one tensor at a time."""

    def __init__(self, model, peak):
        self.model, self.peak, self.t = copy.deepcopy(model), peak, 0
        self.m = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        self.v = copy.deepcopy(self.m)
        self.shadow = {k: v.clone() for k, v in self.model.state_dict().items()}

    def lr(self):
        top, low, end = self.peak, self.peak / 25, self.peak / 25e4
        up, last = 0.3 * 100 - 1, 99
        if self.t <= up:
            return top + (low - top) / 2 * (1 + math.cos(math.pi * self.t / up))
        return end + (top - end) / 2 * (1 + math.cos(math.pi * (self.t - up) / (last - up)))

    def step(self, images, targets):
        logits = self.model(images)
        loss = -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
        grads = dict(zip(self.m, torch.autograd.grad(loss, list(self.model.parameters())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor, lr = min(1.0, 0.5 / (norm + 1e-6)), self.lr()
        self.t += 1
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                g = grads[name] * factor
                self.m[name] = 0.9 * self.m[name] + 0.1 * g
                self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
                p *= 1 - lr * (0.05 if p.ndim > 1 else 0.0)
                p -= (
                    lr
                    * (self.m[name] / (1 - 0.9**self.t))
                    / ((self.v[name] / (1 - 0.999**self.t)).sqrt() + 1e-8)
                )
            decay = min(0.99, (1 + self.t) / (10 + self.t))
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.shadow[name] = decay * self.shadow[name] + (1 - decay) * value
        return loss.item()


def test_twenty_steps_equal_a_plain_float64_loop():
    state, how = make()
    reference = PlainLoop(state.model, 1e-2)
    for step, (images, labels) in enumerate(batches()):
        seed_everything(
            7, step, 0
        )  # the same draw as in the step; mixing itself is tested against torchvision
        mixed = how.mixer(images, labels)
        expected = reference.step(*mixed)
        step = train_step(state, how, images, labels).result()
        assert step.finite
        assert abs(step.loss - expected) < 1e-10
    for name, p in state.model.named_parameters():
        assert (p - dict(reference.model.named_parameters())[name]).abs().max() < 1e-10, name
    for name, value in state.ema.module.state_dict().items():
        if value.is_floating_point():
            assert (value - reference.shadow[name]).abs().max() < 1e-10, name


def test_a_scaler_changes_nothing_about_clipping():
    models = []
    for enabled in (False, True):
        state, how = make(torch.float32, scaler=enabled, clip=("norm", 0.01))
        for images, labels in batches(5, dtype=torch.float32):
            train_step(state, how, images, labels)
        models.append(state.model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class NoNorm(nn.Module):
    """A model without batch statistics: splitting a batch must then change nothing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))

    def forward(self, x):
        return self.layers(x)


def test_l1_is_of_the_parameters_that_decay():
    gradients = []
    for l1 in (0.0, 0.5):
        torch.manual_seed(0)
        model = NoNorm().double()
        model.pos_embedding = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))  # as that of ViT
        optimizer = torch.optim.SGD(param_groups(model, 0.1), 0.0)
        schedule = Schedule(optimizer, "constant", peak_lr=0.1, total_steps=9)
        state = TrainState(
            model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), ema.NoEMA()
        )
        mixer, loss = data_utils.BatchMixer(CLASSES, 0.0, 0.0, 0.1), data_utils.LOSSES["ce"]
        buffers, signs = BatchNormBuffers(model), model.layers[1].weight.detach().sign()
        how = StepOptions(model, mixer, loss, CPU, buffers, seed=7, clip=("norm", 0.0), l1=l1)
        train_step(state, how, *batches(1)[0])
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, penalized = gradients
    weight, bias = "layers.1.weight", "layers.1.bias"
    torch.testing.assert_close(penalized[weight], plain[weight] + 0.5 * signs)
    assert torch.equal(penalized[bias], plain[bias]) and penalized["pos_embedding"] is None


@pytest.mark.parametrize("pieces, cut", [
    (2, [4, 4]), (3, [3, 3, 2]), (5, [2, 2, 2, 1, 1]), (8, [1] * 8), (9, [1] * 8),
])  # fmt: skip
def test_accumulation_splits_the_batch_and_changes_no_gradient(pieces, cut):
    grads = []
    for accumulate in (1, pieces):
        torch.manual_seed(0)
        model, seen = NoNorm().double(), []
        model.register_forward_pre_hook(lambda model, args, seen=seen: seen.append(len(args[0])))
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        state = TrainState(
            model,
            optimizer,
            Schedule(optimizer, "constant", peak_lr=0.1, total_steps=9),
            torch.amp.GradScaler("cpu", enabled=False),
            ema.NoEMA(),
        )
        how = StepOptions(
            model,
            data_utils.BatchMixer(CLASSES, 0.2, 1.0, 0.1),
            data_utils.LOSSES["ce"],
            CPU,
            BatchNormBuffers(model),
            7,
            ("norm", 0.0),
            accumulate,
        )
        train_step(state, how, *batches(1)[0])
        grads.append([p.grad.clone() for p in model.parameters()])
    assert seen == cut
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("poison", ["pixel", "loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_but_the_plan(poison):
    state, how = make(torch.float32)
    data = batches(3, dtype=torch.float32)
    train_step(state, how, *data[0])
    before = bits(state)
    images = data[1][0].clone()
    if poison == "pixel":
        images[0, 0, 0, 0] = float("nan")
    elif poison == "loss":
        how.loss = lambda logits, targets: data_utils.LOSSES["ce"](logits, targets) * float("inf")
    else:
        state.model.fc.weight.register_hook(lambda g: g * float("nan"))
    result = train_step(state, how, images, data[1][1]).result()
    state.count(result)
    assert not result.finite
    assert (state.step, state.schedule.position, state.bad_in_a_row) == (2, 2, 1)
    assert bits(state) == before


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return {k: flat(v) for k, v in value.items()} if isinstance(value, dict) else value


def train_on(state, how, data) -> list[bool]:
    """Take steps as loop.py does; return which of them were finite."""
    seen = []
    for images, labels in data:
        result = train_step(state, how, images, labels).result()
        state.count(result)
        seen.append(result.finite)
    return seen


def test_too_many_bad_steps_in_a_row_end_the_run():
    state, how = make(torch.float32)
    poisoned = [(images * float("nan"), labels) for images, labels in batches(12, dtype=torch.float32)]
    with pytest.raises(DivergedError, match="10 steps in a row"):
        train_on(state, how, poisoned)
    assert all(torch.isfinite(v).all() for v in state.model.state_dict().values() if v.is_floating_point())


# fp16's scaler, on a CPU


def scaled(name: str, scale: float = 1024.0):
    """Return a state and step options with fp16's scaler, for an optimizer of --optimizer."""
    state, how = make(torch.float32, alphas=(0.0, 0.0), drop_path=0.3)
    state.optimizer = build_optimizer(
        name, state.model, lr=1e-2, momentum=0.9, nesterov=False, weight_decay=0.01
    )
    state.schedule = Schedule(state.optimizer, "onecycle", peak_lr=1e-2, total_steps=400)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    return state, how


def bits(state) -> dict:
    """Return all that a step may change, except for the scale and counters of steps."""
    moving = {
        f"{k} {name}": value if value is not None and value.any() else "zero"  # as before the first step
        for k, entries in state.optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    moving = {name: value for name, value in moving.items() if not isinstance(value, str)}
    weights = {
        f"{kind} {name}": value
        for kind, model in (("raw", state.model), ("ema", state.ema.module))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    return flat(weights | moving)


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("poison", ["overflow", "pixel"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_under_fp16_a_bad_step_leaves_the_bits_of_a_run_that_never_saw_it(name, poison, bad):
    """Fused SGD would initialize its momentum with garbage if it were called for a skipped first step."""
    ends, scalers = [], []
    for spoiled in (False, True):
        state, how = scaled(name)
        for step, (images, labels) in enumerate(batches(6, dtype=torch.float32)):
            if step != bad:
                assert train_step(state, how, images, labels).result().finite
            elif not spoiled:
                state.schedule.step()
                state.step += 1
                state.ema.num_updates += 1
            else:
                before = bits(state)
                result = spoiled_step(state, how, images, labels, poison)
                assert not result.finite and math.isfinite(result.loss) == (poison == "overflow")
                assert bits(state) == before
                assert bool(result.overflowed) == (poison == "overflow")
                assert result.scale == (512.0 if poison == "overflow" else 1024.0)  # not caused by the scale
        ends.append(bits(state))
        scalers.append(state.scaler.state_dict())
    assert (scalers[0] == scalers[1]) == (poison == "pixel")
    if name not in ("lamb", "muon"):  # their bias correction counts the steps of the plan
        assert ends[0] == ends[1]


def spoiled_step(state, how, images, labels, poison: str):
    hook = state.model.fc.weight.register_hook(lambda g: g * float("inf" if poison == "overflow" else 1))
    step = train_step(state, how, images * float("nan" if poison == "pixel" else 1), labels)
    hook.remove()
    return step.result()


def overflowing_above(state, limit: float) -> None:
    """Let the gradients overflow as long as fp16's scale is above `limit`."""
    state.model.fc.weight.register_hook(lambda g: g * (math.inf if state.scaler.get_scale() > limit else 1.0))


def test_a_scale_that_is_too_large_is_halved_until_it_fits():
    state, how = scaled("sgd", scale=65536.0)
    overflowing_above(state, 4.0)
    assert train_on(state, how, batches(20, dtype=torch.float32)) == [False] * 14 + [True] * 6
    assert state.scaler.get_scale() == 4.0 and state.bad_in_a_row == 0


@pytest.mark.parametrize("scale, steps", [(65536.0, 16 + 10), (2.0**40, 40 + 10), (1.0, 10), (0.0, 10)])
def test_gradients_that_overflow_at_every_scale_end_the_run(scale, steps):
    state, how = scaled("sgd", scale=scale)
    overflowing_above(state, -1.0)
    before = bits(state)
    with pytest.raises(DivergedError, match=r"10 steps in a row were not finite.*fp16 scale 1"):
        train_on(state, how, batches(190, dtype=torch.float32))
    assert state.step == steps
    assert bits(state) == before


@pytest.mark.parametrize(
    "name, scaler, average, clip, accumulate",
    [(name, scaler, True, ("norm", 1.0), 2) for name in OPTIMIZERS for scaler in (True, False)]
    + [("sgd", False, False, ("norm", 0.0), 1), ("adamw", True, False, ("value", 0.1), 1)],
)
def test_a_step_reads_nothing_on_the_host(name, scaler, average, clip, accumulate):
    """Fake tensors have no values: whatever would wait for a GPU raises an error."""
    state, how = scaled(name)
    state.scaler = torch.amp.GradScaler("cpu", enabled=scaler)
    state.ema = state.ema if average else ema.NoEMA()
    how.clip, how.accumulate = clip, accumulate
    images, labels = batches(1, dtype=torch.float32)[0]
    targets = data_utils.soft_targets(labels, CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):  # the first creates the optimizer's state
            values = update(state, how, images, targets)
        with pytest.raises(DataDependentOutputException):
            values["loss"].item()


def test_statistics_in_one_buffer_are_tensors_like_any_other(tmp_path):
    """In files and in copies each has memory of its own; a model that was moved is noticed."""
    plain = build_model("resnet_tiny", num_classes=CLASSES)
    model = copy.deepcopy(plain)
    buffers = BatchNormBuffers(model)
    checkpoint.write(tmp_path / "flat.pt", model.state_dict())
    checkpoint.write(tmp_path / "plain.pt", plain.state_dict())
    saved = torch.load(tmp_path / "flat.pt", weights_only=True)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in saved.values())
    assert (tmp_path / "flat.pt").stat().st_size == (tmp_path / "plain.pt").stat().st_size
    twin = copy.deepcopy(model)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(model(images), plain(images))
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert torch.equal(twin.bn1.running_mean, torch.zeros_like(twin.bn1.running_mean))
    buffers.check()
    model.double()
    with pytest.raises(RuntimeError, match="moved"):
        buffers.check()


def test_32_images_are_memorized_in_60_steps():
    state, how = make(torch.float32, alphas=(0.0, 0.0), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    images, labels = (
        torch.randn(32, 3, 32, 32, generator=generator),
        torch.randint(0, CLASSES, (32,), generator=generator),
    )
    for _ in range(60):
        train_step(state, how, images, labels)
    assert evaluate({"m": state.model}, [(images, labels)], CPU)["m"].top1 == 100.0


def test_with_no_learning_rate_no_weight_moves_and_every_parameter_has_a_gradient():
    state, how = make(torch.float32, lr=1e-2)
    for (
        module
    ) in state.model.modules():  # the zero-initialized gammas close their branches' gradients at first
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    before = copy.deepcopy(list(state.model.parameters()))
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    train_step(state, how, *batches(1, dtype=torch.float32)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert all(p.grad.abs().sum() > 0 for p in state.model.parameters())


def test_evaluation_reads_nothing_before_its_last_batch():
    model, read = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), []

    def batches():
        for n in (4, 4, 2):
            read.append(n)
            yield torch.randn(n, 3, 2, 2), torch.zeros(n, dtype=torch.long)

    # Fake tensors have no values: they raise when one is read.
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        evaluate({"m": model}, batches(), CPU)
    assert read == [4, 4, 2]


def test_skipped_images_are_not_in_the_score():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    wanted = evaluate({"m": model}, [(images, labels)], CPU)["m"]
    assert evaluate({"m": model}, [(images, labels), (images[:0], labels[:0])], CPU)["m"] == wanted
    nothing = evaluate({"m": nn.BatchNorm1d(7)}, [(images[:0], labels[:0])], CPU)["m"]  # it is never called
    assert nothing.num_samples == 0 and math.isnan(nothing.top1)


def test_with_shuffled_labels_validation_stays_at_chance():
    """A leak of the labels (a wrong split, an augmentation that depends on the class) would show here."""
    from sources.generated import digits

    data, rng = digits(), np.random.default_rng(0)
    state, how = make(torch.float32, alphas=(0.0, 0.0))
    how.mixer = data_utils.BatchMixer(10, 0.0, 0.0, 0.0)
    state.model.fc = nn.Conv2d(64, 10, 1)
    optimizer = torch.optim.SGD(state.model.parameters(), 0.05, momentum=0.9)
    state.optimizer, state.ema = optimizer, ema.NoEMA()
    state.schedule = Schedule(optimizer, "constant", peak_lr=0.05, total_steps=100)
    how.buffers = BatchNormBuffers(state.model)
    pixels = (
        torch.stack([torch.from_numpy(np.asarray(x)) for x in data.train.read(range(256))]).permute(
            0, 3, 1, 2
        )
        / 255
    )
    wrong = torch.from_numpy(rng.permutation(data.train.labels[:256]))
    for step in range(60):
        part = slice(32 * (step % 8), 32 * (step % 8) + 32)
        train_step(state, how, pixels[part], wrong[part])
    other = (
        torch.stack([torch.from_numpy(np.asarray(x)) for x in data.val.read(range(300))]).permute(0, 3, 1, 2)
        / 255
    )
    score = evaluate({"m": state.model}, [(other, torch.from_numpy(data.val.labels[:300]))], CPU)["m"].top1
    assert score < 25  # chance is 10
