"""Norms count valid frames only, on one process or on several, and Unified Normalization is its paper's."""

import copy
import math
from collections import deque

import pytest
import torch
from torch import multiprocessing

from edgefuse.model import Encoder
from edgefuse.model.normalization import (
    FEWEST_FOR_COLUMNS,
    SMALLEST_VARIANCE,
    STATISTICS,
    BatchNorm,
    RepBatchNorm,
    StatisticsNorm,
    UnifiedNorm,
)
from edgefuse.model.reestimate import reestimate
from tests.conftest import a_config, lived_in

CHANNELS, ROWS = 5, 24
EPSILON = 1e-5
KINDS = {"batch": BatchNorm, "rep": RepBatchNorm, "unified": UnifiedNorm}
ALL = torch.ones(2, ROWS // 2, dtype=torch.bool)


def a_norm(kind: str, dtype: torch.dtype = torch.float64, **options) -> StatisticsNorm:
    """In training, its gain and shift as training leaves them."""
    norm = KINDS[kind](CHANNELS, **options).to(dtype).train()
    g = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3)
    return norm


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Of (2, ROWS / 2, CHANNELS), channels of different size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1, CHANNELS, dtype=torch.float64)
    return [torch.randn(2, ROWS // 2, CHANNELS, generator=g, dtype=torch.float64) * size + 0.5 for _ in range(count)]


def passed(norm, x, valid=ALL):
    """What comes out, and the gradients of a loss of it: of x, and of every parameter."""
    x = x.clone().requires_grad_()
    y = norm(x, valid)
    slopes = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    (slopes * y)[valid].sum().backward()
    gradients = [x.grad, *(p.grad for p in norm.parameters())]
    for parameter in norm.parameters():
        parameter.grad = None
    return y.detach(), gradients


class Told:
    """Unified Normalization told channel by channel, in plain numbers, with queues in place of buffers."""

    def __init__(self, gamma, beta, window, warm_up, filtering):
        self.gamma, self.beta, self.window, self.warm_up, self.filtering = gamma, beta, window, warm_up, filtering
        self.running, self.ema, self.iteration, self.skipped = [1.0] * len(gamma), [0.0] * len(gamma), 0, 0
        self.squares, self.slopes = (deque([[0.0] * len(gamma)] * window, maxlen=window) for _ in range(2))

    def step(self, x, slopes):
        """Rows of numbers, and the gradient of each output: outputs, gradients of inputs, of gamma, of beta."""
        channels, self.iteration = range(len(self.gamma)), self.iteration + 1
        own = [max(SMALLEST_VARIANCE, sum(row[c] ** 2 for row in x) / len(x)) for c in channels]
        roots = [math.sqrt(value) for line in self.squares for value in line]
        mean = sum(roots) / len(roots)
        recorded = sum((root - mean) ** 2 for root in roots) / (len(roots) - 1)
        self.squares.append(own)
        skip = False
        if self.filtering and self.iteration >= self.warm_up:
            gaps = [sum(line[c] for line in self.squares) / self.window - self._geometric(c) for c in channels]
            skip = any(gap > recorded * self.window for gap in gaps)
            if skip:
                self.squares[-1] = list(self.running)
                self.skipped += 1
        plain = skip or self.iteration <= self.window or self.iteration < self.warm_up
        var = own if plain else [self._geometric(c) for c in channels]
        ratio = [1.0 for _ in channels]
        if not skip and self.iteration > max(1000, self.warm_up):
            ratio = [
                min(5.0, max(0.2, math.sqrt(v + EPSILON) / math.sqrt(r + EPSILON)))
                for v, r in zip(var, self.running, strict=True)
            ]
        self.running = [0.9 * r + 0.1 * v for r, v in zip(self.running, var, strict=True)]
        deviation = [math.sqrt(v + EPSILON) for v in var]
        z = [[row[c] / deviation[c] for c in channels] for row in x]
        outputs = [[self.gamma[c] * row[c] + self.beta[c] for c in channels] for row in z]
        g = [[row[c] * self.gamma[c] * ratio[c] for c in channels] for row in slopes]
        gz = [sum(a[c] * b[c] for a, b in zip(g, z, strict=True)) / len(z) for c in channels]
        self.slopes.append(list(self.ema) if skip else gz)
        mean_gz = gz if plain else [sum(line[c] for line in self.slopes) / self.window for c in channels]
        self.ema = [0.9 * e + 0.1 * m for e, m in zip(self.ema, mean_gz, strict=True)]
        psi = mean_gz if skip else self.ema
        inputs = [[(a[c] - psi[c] * b[c]) / deviation[c] for c in channels] for a, b in zip(g, z, strict=True)]
        of_gamma = [sum(a[c] * b[c] for a, b in zip(slopes, z, strict=True)) * ratio[c] for c in channels]
        return outputs, inputs, of_gamma, [sum(row[c] for row in slopes) for c in channels]

    def _geometric(self, c):
        product = math.prod(max(SMALLEST_VARIANCE, line[c]) for line in self.squares)
        return product ** (1 / self.window)


@pytest.mark.parametrize("filtering", [False, True], ids=["every batch counts", "outliers are filtered"])
@pytest.mark.parametrize(
    ("first", "warm_up", "outliers"), [(0, 1000, 0), (0, 6, 1), (997, 6, 6)], ids=["warm-up", "window", "window and ratio"]
)  # where the window is empty at first, what fills it is unlike it
def test_unified_normalization_is_what_the_paper_computes(first, warm_up, outliers, filtering):
    norm = a_norm("unified", warm_up=warm_up, outlier_filtration=filtering)
    told = Told(norm.weight.tolist(), norm.bias.tolist(), 4, warm_up, filtering)
    norm.num_batches_tracked.fill_(first)
    told.iteration = first
    for number, ordinary in enumerate(batches(14)):
        x = ordinary * (20.0 if number == 10 else 1.0)
        y, (of_x, of_gamma, of_beta) = passed(norm, x)
        slopes = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(-1, CHANNELS)
        wanted = told.step(x.reshape(-1, CHANNELS).tolist(), slopes.tolist())
        for mine, numbers in zip((y, of_x, of_gamma, of_beta), wanted, strict=True):
            theirs = torch.tensor(numbers, dtype=torch.float64)
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_var.tolist(), told.running)
    torch.testing.assert_close(norm.ema_gz.tolist(), told.ema)
    assert int(norm.skip_counter) == told.skipped == (outliers if filtering else 0)


def test_the_first_gradient_is_a_tenth_of_the_way_to_the_derivative_of_the_whole_norm():
    norm, (x,) = a_norm("unified"), batches(1)
    _, (of_x, of_gamma, of_beta) = passed(norm, x)

    def derived(constant):
        leaf = x.clone().requires_grad_()
        moment = (leaf.detach() if constant else leaf).square().mean((0, 1))
        y = leaf / (moment + EPSILON).sqrt() * norm.weight + norm.bias
        slopes = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
        return torch.autograd.grad((slopes * y).sum(), (leaf, norm.weight, norm.bias))

    (fixed, *_), (whole, of_weight, of_bias) = derived(True), derived(False)
    torch.testing.assert_close(of_x, 0.9 * fixed + 0.1 * whole)  # psi is 0.1 of the first batch's own statistic
    torch.testing.assert_close((of_gamma, of_beta), (of_weight, of_bias))


@pytest.mark.parametrize("kind", ["batch", "rep"])
def test_the_gradient_of_a_batch_norm_is_its_derivative_padding_and_all(kind):
    norm, valid = a_norm(kind), torch.arange(6) < torch.tensor([6, 3])[:, None]
    x = torch.randn(2, 6, CHANNELS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x, valid), (x, *norm.parameters()))


def test_the_gain_of_unified_normalization_has_its_derivative():
    (x,) = batches(1)

    def fresh(weight, bias):
        return torch.func.functional_call(a_norm("unified"), {"weight": weight, "bias": bias}, (x, ALL))

    weight, bias = (torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fresh, (weight, bias))


def test_rep_batch_norm_is_a_batch_norm_and_a_way_around_it():
    (x,) = batches(1)
    rep, plain = RepBatchNorm(CHANNELS).double(), BatchNorm(CHANNELS).double()
    torch.testing.assert_close(rep(x, ALL), plain(x, ALL) + x)
    with torch.no_grad():
        rep.alpha.fill_(0.25)
    torch.testing.assert_close(rep.eval()(x, ALL), plain.eval()(x, ALL) + 0.25 * x)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_good_as_absent_in_both_passes(kind):
    (x,) = batches(1)
    valid = torch.arange(ROWS // 2) < torch.tensor([ROWS // 2, 5])[:, None]
    padded, alone = a_norm(kind), a_norm(kind)
    garbage = torch.where(valid[..., None], x, 1e6)
    for _ in range(3):
        y, (of_x, *others) = passed(padded, garbage, valid)
        rows = x[valid][None]
        leaf = rows.clone().requires_grad_()
        wanted = alone(leaf, torch.ones(1, rows.shape[1], dtype=torch.bool))
        slopes = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)[valid]
        gradients = torch.autograd.grad((slopes * wanted[0]).sum(), (leaf, *alone.parameters()))
        torch.testing.assert_close(y[valid], wanted[0])
        assert not y[~valid].any()
        torch.testing.assert_close(of_x[valid], gradients[0][0])
        assert not of_x[~valid].any()
        torch.testing.assert_close(others, [*gradients[1:]])
    torch.testing.assert_close(padded.state_dict(), alone.state_dict())


def test_unified_normalization_forgets_the_padding_in_evaluation_too():
    norm, (x,) = a_norm("unified"), batches(1)
    passed(norm, x)
    wanted = norm.weight * x / (norm.running_var + EPSILON).sqrt() + norm.bias
    torch.testing.assert_close(norm.eval()(x, ALL), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_stay_in_float32_under_an_autocast(kind):
    norm, alone = a_norm(kind, torch.float32), a_norm(kind, torch.float32)
    for x in batches(6):
        low = x.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y, (of_x, *_) = passed(norm, low)
        passed(alone, low.float())
        assert y.dtype == of_x.dtype == torch.bfloat16
    for name, tensor in alone.state_dict().items():
        held = norm.state_dict()[name]
        assert held.dtype == tensor.dtype
        if name.startswith("running"):
            torch.testing.assert_close(held, tensor, rtol=1e-5, atol=1e-6)


def test_a_training_that_is_resumed_goes_on_to_the_last_bit():
    whole = a_norm("unified", torch.float32, warm_up=3, outlier_filtration=True)
    first, rest = batches(5), batches(7, seed=1)
    for x in first:
        passed(whole, x.float())
    resumed = UnifiedNorm(CHANNELS, warm_up=3, outlier_filtration=True).train()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for x in rest:
        one, other = passed(whole, x.float()), passed(resumed, x.float())
        assert torch.equal(one[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_a_backward_pass_ends_the_iteration_of_its_own_forward_pass():
    """As where the gradients of two batches are added before a step."""
    turns, together = a_norm("unified", warm_up=2), a_norm("unified", warm_up=2)
    for one, two in zip(batches(5), batches(5, seed=1), strict=True):
        passed(turns, one)
        passed(turns, two)
        outputs = [together(x.clone().requires_grad_(), ALL) for x in (one, two)]
        for y in outputs:
            (torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape) * y).sum().backward()
    torch.testing.assert_close(turns.state_dict(), together.state_dict())


def test_a_channel_that_says_nothing_does_not_blow_up_when_it_speaks_again():
    norm = a_norm("unified", warm_up=2)
    for number, x in enumerate(batches(12)):
        silent = x.clone()
        if number < 9:
            silent[..., 0] = 0.0
        y, gradients = passed(norm, silent)
        assert y.isfinite().all()
        assert all(each.isfinite().all() for each in gradients)
    assert y.abs().max() < 100


def test_trained_weights_warm_up_again_and_keep_their_statistics():
    norm = a_norm("unified", warm_up=2)
    for x in batches(5):
        passed(norm, x)
    running = norm.running_var.clone()
    norm.restart()
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_var, running)


@pytest.mark.parametrize("norm", ["batch-in-place", "none"])
def test_the_naive_variants_build_and_take_a_step(norm, padded_batch):
    encoder = Encoder(a_config(norm, activation="relu")).train()
    logits, _ = encoder(*padded_batch)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert any(isinstance(module, StatisticsNorm) for module in encoder.modules()) == (norm != "none")


@pytest.mark.parametrize("kind", ["rep", "unified"])
def test_reestimated_statistics_are_those_of_all_the_speech(kind, padded_batch):
    features, lengths = padded_batch[0], padded_batch[1] // 4 * 4  # a batch weighs as much as it has feature frames
    encoder = lived_in(Encoder(a_config(kind, norm_residual="block")))
    site = encoder.blocks[0].macaron.norm
    before = {name: tensor.clone() for name, tensor in site.state_dict().items() if name not in STATISTICS}
    reestimate(encoder, [(features[:1], lengths[:1]), (features[1:], lengths[1:])])
    with torch.no_grad():
        frames = encoder.subsampling(features, lengths)
    frames = frames[torch.arange(frames.shape[1]) < (lengths // 4)[:, None]]
    wanted = frames.square().mean(0) if kind == "unified" else None
    if wanted is not None:
        torch.testing.assert_close(site.running_var, wanted)
    else:
        torch.testing.assert_close(site.running_mean, frames.mean(0))
    assert {name: tensor.tolist() for name, tensor in site.state_dict().items() if name in before} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    assert not site.estimating
    assert not encoder.training


PARTS = ((slice(0, 1), 12), (slice(1, 2), 5))  # what each process holds: an utterance, and how much of it is valid


def one_of_two(rank: int, folder: str) -> None:
    """A process with one utterance of each batch, which writes down what it computed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    made = {(kind, dtype): run_through(kind, dtype, rank) for kind in KINDS for dtype in (torch.float32, torch.float64)}
    torch.save(made, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run_through(kind: str, dtype: torch.dtype, rank: int | None):
    """Six batches, of which a process has its own part: outputs and gradients of x, sums of parameters' gradients, state."""
    norm = a_norm(kind, dtype, **({"warm_up": 2} if kind == "unified" else {}))
    valid = torch.arange(ROWS // 2) < torch.tensor([count for _, count in PARTS])[:, None]
    own = slice(None) if rank is None else PARTS[rank][0]
    outputs, of_x, of_parameters = [], [], []
    for x in batches(6):
        leaf = x.to(dtype)[own].clone().requires_grad_()
        y = norm(leaf, valid[own])
        slopes = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape).to(dtype)[own]
        grads = torch.autograd.grad((slopes * y)[valid[own]].sum(), (leaf, *norm.parameters()))
        outputs.append(y.detach())
        of_x.append(grads[0])
        of_parameters.append(grads[1:])
    return outputs, of_x, of_parameters, norm.state_dict()


def test_two_processes_have_the_statistics_and_gradients_of_one_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, (outputs, of_x, of_parameters, state) in one.items():
        bound = {"rtol": 1e-5, "atol": 1e-5} if key[1] == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        wanted = run_through(*key, None)
        for both, whole in ((outputs, wanted[0]), (of_x, wanted[1])):
            theirs = other[key][0] if both is outputs else other[key][1]
            torch.testing.assert_close([torch.cat(pair) for pair in zip(both, theirs, strict=True)], whole, **bound)
        sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(of_parameters, other[key][2], strict=True)]
        torch.testing.assert_close(sums, [list(each) for each in wanted[2]], rtol=bound["rtol"], atol=20 * bound["atol"])
        torch.testing.assert_close(state, wanted[3], **bound)
        torch.testing.assert_close(state, other[key][3], rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
def test_many_rows_on_a_gpu_are_normalized_as_a_cpu_does_it() -> None:
    rows = torch.randn(FEWEST_FOR_COLUMNS + 1, CHANNELS, generator=torch.Generator().manual_seed(0))
    here, there = BatchNorm(CHANNELS), BatchNorm(CHANNELS).cuda()
    assert torch.allclose(here.normalize(rows), there.normalize(rows.cuda()).cpu(), atol=1e-5)
    assert here.running_var is not None
    assert there.running_var is not None
    assert torch.allclose(here.running_var, there.running_var.cpu(), atol=1e-5)
