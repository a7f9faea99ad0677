"""Check the reductions of the LM head against full logits."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

from selfgen_ds import hashing
from selfgen_ds.model import cross_entropy
from selfgen_ds.model.head import LMHead, LogitTransform, Prediction, Reduction, draw, loss_sum, predict

ROWS, WIDTH, VOCABULARY = 600, 16, 50  # rows of two chunks and a part of a third

BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
BIAS_AND_SMOOTHING = pytest.mark.parametrize(("bias", "smoothing"), [(False, 0.1), (True, 0.0)])
PLAIN, SCALE, CAP, BOTH = (
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(cap=1.5),
    LogitTransform(scale=3.0, cap=2.0),
)
# every pair of a bias, a smoothing, and a transform; each of the three enters the loss on its own
LOSSES = [
    *((False, 0.0, PLAIN), (True, 0.1, PLAIN), (False, 0.1, SCALE), (True, 0.0, SCALE)),
    *((False, 0.0, CAP), (True, 0.1, CAP), (False, 0.1, BOTH), (True, 0.0, BOTH)),
]


def _linear(bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    return linear.requires_grad_()


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def _loss(linear: nn.Linear, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    loss = LMHead(linear)(hidden, loss_sum(targets, smoothing))
    assert isinstance(loss, Tensor)
    return loss


def _draw(linear: nn.Linear, hidden: Tensor, reduction: Reduction) -> Tensor:
    with torch.no_grad():
        tokens = LMHead(linear)(hidden, reduction)
    assert isinstance(tokens, Tensor)
    return tokens


@BIAS
def test_without_a_reduction_the_head_is_the_linear_layer(bias: bool) -> None:
    linear, (hidden, _) = _linear(bias, torch.float32), _inputs(torch.float32)
    assert torch.equal(LMHead(linear)(hidden), linear(hidden))


@BIAS
def test_the_head_shares_the_layers_parameters(bias: bool) -> None:
    linear = _linear(bias, torch.float32)
    head = LMHead(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias


@BIAS_AND_SMOOTHING
def test_a_scaled_loss_has_scaled_gradients(bias: bool, smoothing: float) -> None:
    linear, (hidden, targets) = _linear(bias, torch.float64), _inputs(torch.float64)
    leaves = [hidden, *linear.parameters()]
    plain = torch.autograd.grad(_loss(linear, hidden, targets, smoothing), leaves)
    scaled = torch.autograd.grad(_loss(linear, hidden, targets, smoothing) * 0.25, leaves)
    for a, e in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, e / 4, rtol=1e-12, atol=1e-12)


@BIAS_AND_SMOOTHING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_no_position_is_0_and_has_zero_gradients(bias: bool, smoothing: float, dtype: torch.dtype) -> None:
    linear, hidden = _linear(bias, dtype), torch.empty(0, WIDTH, dtype=dtype, requires_grad=True)
    loss = _loss(linear, hidden, torch.empty(0, dtype=torch.int64), smoothing)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    for parameter in linear.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@BIAS_AND_SMOOTHING
def test_the_loss_in_bfloat16_keeps_three_digits(bias: bool, smoothing: float) -> None:
    linear, (hidden, targets) = _linear(bias, torch.bfloat16), _inputs(torch.bfloat16)
    loss = _loss(linear, hidden, targets, smoothing)
    exact = F.cross_entropy(linear.double()(hidden.double()), targets, reduction="sum", label_smoothing=smoothing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


@BIAS_AND_SMOOTHING
def test_the_gradients_in_bfloat16_are_right_to_its_precision(bias: bool, smoothing: float) -> None:
    linear, (hidden, targets) = _linear(bias, torch.bfloat16), _inputs(torch.bfloat16)
    actual = torch.autograd.grad(_loss(linear, hidden, targets, smoothing), [hidden, *linear.parameters()])
    exact, inputs = linear.double(), hidden.detach().double().requires_grad_()
    reference = F.cross_entropy(exact(inputs), targets, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(reference, [inputs, *exact.parameters()])
    for a, e in zip(actual, expected, strict=True):
        assert float((a.double() - e).norm() / e.norm()) < 2e-2


def _full_logits(linear: nn.Linear, hidden: Tensor, transform: LogitTransform) -> Tensor:
    logits = linear(hidden) * transform.scale
    return logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)


@pytest.mark.parametrize(("bias", "smoothing", "transform"), LOSSES)
def test_the_loss_is_the_summed_cross_entropy_of_the_models_logits_and_has_its_gradients(
    bias: bool, smoothing: float, transform: LogitTransform
) -> None:
    linear, (hidden, targets) = _linear(bias, torch.float64), _inputs(torch.float64)
    leaves = [hidden, *linear.parameters()]
    logits = _full_logits(linear, hidden, transform)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    loss = LMHead(linear, transform)(hidden, loss_sum(targets, smoothing))
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for a, e in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


ANY_TRANSFORM = pytest.mark.parametrize("transform", [PLAIN, SCALE, BOTH], ids=["plain", "scale", "scale and cap"])


@pytest.mark.parametrize(("bias", "smoothing", "transform"), [case for case in LOSSES if case[2] != CAP])
def test_weights_scale_the_loss_of_each_position_and_its_gradients(
    bias: bool, smoothing: float, transform: LogitTransform
) -> None:
    linear, (hidden, targets) = _linear(bias, torch.float64), _inputs(torch.float64)
    leaves = [hidden, *linear.parameters()]
    weights = torch.tensor([0.0, 0.25, 1.0, 3.0]).repeat(ROWS // 4)
    logits = _full_logits(linear, hidden, transform)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = (losses * weights).sum()
    loss = LMHead(linear, transform)(hidden, loss_sum(targets, smoothing, weights))
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for a, e in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("smoothing", "transform", "dtype"),
    [
        *((0.0, PLAIN, torch.float32), (0.1, PLAIN, torch.bfloat16), (0.1, SCALE, torch.float32)),
        *((0.0, SCALE, torch.bfloat16), (0.0, BOTH, torch.float32), (0.1, BOTH, torch.bfloat16)),
    ],
)
def test_a_weighted_loss_is_float32_and_keeps_the_digits_of_the_others(
    smoothing: float, transform: LogitTransform, dtype: torch.dtype
) -> None:
    linear, (hidden, targets) = _linear(True, dtype), _inputs(dtype)
    head = LMHead(linear, transform)
    plain, ones = (head(hidden, loss_sum(targets, smoothing, w)) for w in (None, torch.ones(ROWS)))
    assert isinstance(plain, Tensor)
    assert isinstance(ones, Tensor)
    assert ones.dtype == torch.float32
    assert ones.item() == pytest.approx(plain.item(), rel=1e-6 if dtype == torch.float32 else 1e-3)


@ANY_TRANSFORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_loss_of_no_position_is_0_and_has_zero_gradients(
    transform: LogitTransform, dtype: torch.dtype
) -> None:
    linear, hidden = _linear(True, dtype), torch.empty(0, WIDTH, dtype=dtype, requires_grad=True)
    loss = LMHead(linear, transform)(hidden, loss_sum(torch.empty(0, dtype=torch.int64), 0.1, torch.empty(0)))
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in linear.parameters())


@pytest.mark.parametrize(("bias", "transform"), [(True, SCALE), (False, CAP), (True, BOTH)])
def test_the_loss_of_no_position_is_0_for_scaled_and_capped_logits_too(bias: bool, transform: LogitTransform) -> None:
    linear, hidden = _linear(bias, torch.float32), torch.empty(0, WIDTH, requires_grad=True)
    loss = LMHead(linear, transform)(hidden, loss_sum(torch.empty(0, dtype=torch.int64), 0.1))
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in linear.parameters())


@pytest.mark.parametrize(("bias", "transform"), [(True, SCALE), (False, CAP), (True, BOTH)])
def test_draws_and_predictions_come_from_scaled_and_capped_logits(bias: bool, transform: LogitTransform) -> None:
    linear, (hidden, targets) = _linear(bias, torch.float64), _inputs(torch.float64)
    uniforms = hashing.uniform(hashing.DRAW, 0, torch.arange(ROWS))
    with torch.no_grad():
        logits = _full_logits(linear, hidden, transform)
        tokens = LMHead(linear, transform)(hidden, draw(uniforms, 1.0, 1.0, 0))
        best, _, log_probabilities, *_ = LMHead(linear, transform)(hidden, predict(targets))
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    assert torch.equal(tokens, torch.searchsorted(cumulative, uniforms[:, None]).squeeze(1))
    assert torch.equal(best, logits.argmax(-1))
    expected = logits.log_softmax(-1)[torch.arange(ROWS), targets]
    torch.testing.assert_close(log_probabilities.double(), expected, rtol=1e-5, atol=1e-5)


def _draw_from(logits: list[float], uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Draw one token per uniform, each from the same logits."""
    linear = nn.Linear(1, len(logits), bias=False)
    linear.weight.data = torch.tensor(logits)[:, None]
    return _draw(linear, torch.ones(len(uniforms), 1), draw(uniforms, temperature, top_p, top_k))


def _sample(logits: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Count each token in 5000 draws."""
    uniforms = hashing.uniform(hashing.DRAW, 0, torch.arange(5000))
    return torch.bincount(_draw_from(logits, uniforms, temperature, top_p, top_k), minlength=len(logits))


def _assert_drawn_from(counts: Tensor, probabilities: Tensor) -> None:
    """Check that tokens of probability 0 are never drawn, and others about as often as expected.

    Chi-square may exceed its mean by 5 standard deviations.
    """
    support = probabilities > 0
    assert not counts[~support].any()
    expected = probabilities[support] * counts.sum()
    chi_square = float(((counts[support] - expected) ** 2 / expected).sum())
    freedom = int(support.sum()) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


LOGITS = [0.3, -1.0, 2.0, 1.1, -2.5, 0.0, 1.6]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature: float) -> None:
    probabilities = (torch.tensor(LOGITS, dtype=torch.float64) / temperature).softmax(0)
    _assert_drawn_from(_sample(LOGITS, temperature), probabilities)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (3, 1.0), (3, 2.0), (7, 1.0), (100, 1.0)])
def test_top_k_draws_from_the_k_most_probable_tokens(top_k: int, temperature: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    kept = sorted(LOGITS, reverse=True)[:top_k]
    probabilities = (logits / temperature).exp() * torch.tensor([x in kept for x in LOGITS])
    _assert_drawn_from(_sample(LOGITS, temperature, top_k=top_k), probabilities / probabilities.sum())


@pytest.mark.parametrize(("top_p", "size"), [(1e-6, 1), (0.4, 1), (0.42, 2), (0.67, 2), (0.7, 3), (0.9, 4), (0.999, 7)])
def test_top_p_draws_from_the_smallest_set_with_that_mass(top_p: float, size: int) -> None:
    # Cumulative probabilities, most probable token first: .407 .680 .846 .920 .975 .995 1
    probabilities = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    allowed = probabilities.sort(descending=True).indices[:size]
    kept = torch.zeros_like(probabilities)
    kept[allowed] = probabilities[allowed]
    assert float(kept.sum()) >= top_p
    assert float(kept.sum() - probabilities[allowed[-1]]) < top_p
    _assert_drawn_from(_sample(LOGITS, top_p=top_p), kept / kept.sum())


def test_top_p_counts_the_mass_at_the_temperature() -> None:
    # The first two tokens hold .68 of the mass at temperature 1, but .51 at temperature 2
    probabilities = (torch.tensor(LOGITS, dtype=torch.float64) / 2).softmax(0)
    allowed = probabilities.sort(descending=True).indices[:3]
    kept = torch.zeros_like(probabilities)
    kept[allowed] = probabilities[allowed]
    _assert_drawn_from(_sample(LOGITS, 2.0, top_p=0.6), kept / kept.sum())


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]
    uniforms = torch.tensor([0.05, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 0.999], dtype=torch.float64)
    assert _draw_from(logits, uniforms, 1.0, 1.0, 0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_draw_does_not_depend_on_the_chunk_that_it_is_in() -> None:
    linear, (hidden, _) = _linear(True, torch.float32), _inputs(torch.float32)
    uniforms = hashing.uniform(hashing.DRAW, 0, torch.arange(ROWS))
    together = _draw(linear, hidden, draw(uniforms, 1.0, 1.0, 0))
    apart = [_draw(linear, hidden[i : i + 100], draw(uniforms[i : i + 100], 1.0, 1.0, 0)) for i in range(0, ROWS, 100)]
    assert torch.equal(together, torch.cat(apart))


NEAREST_TO_0_AND_1 = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)


def test_a_token_without_probability_is_never_drawn() -> None:
    never = -1e9
    assert _draw_from([never, 0.0, never, 1.0, never], NEAREST_TO_0_AND_1, 1.0, 1.0, 0).tolist() == [1, 3]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, 3)])
def test_a_token_that_is_cut_off_is_never_drawn(top_p: float, top_k: int) -> None:
    assert _draw_from([0.0, 5.0, 5.2, 5.1, 0.0], NEAREST_TO_0_AND_1, 1.0, top_p, top_k).tolist() == [1, 3]


def test_a_draw_from_logits_that_are_not_finite_is_a_token_of_the_vocabulary() -> None:
    # The step is dropped later, for its loss. An id outside the vocabulary would crash the next forward before that.
    assert 0 <= _draw_from([math.nan] * 4, torch.tensor([0.5], dtype=torch.float64), 1.0, 1.0, 0).item() < 4


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (2.0, 0.9, 5)])
def test_no_position_draws_no_token(temperature: float, top_p: float, top_k: int) -> None:
    reduction = draw(torch.empty(0, dtype=torch.float64), temperature, top_p, top_k)
    tokens = _draw(_linear(True, torch.float32), torch.empty(0, WIDTH), reduction)
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)


@BIAS
def test_a_prediction_is_that_of_the_whole_distribution(bias: bool) -> None:
    linear, (hidden, targets) = _linear(bias, torch.float32), _inputs(torch.float32)
    found = Prediction(*LMHead(linear)(hidden, predict(targets)))
    exact = linear.double()(hidden.double()).log_softmax(-1)
    first, second = exact.topk(2, dim=-1).indices.T
    assert torch.equal(found.best, first)
    assert torch.equal(found.second, second)
    expected = exact[torch.arange(ROWS), targets], exact.amax(-1).exp(), -(exact.exp() * exact).sum(-1)
    for values, wanted in zip((found.log_probability, found.confidence, found.entropy), expected, strict=True):
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_position_has_no_prediction() -> None:
    targets = torch.empty(0, dtype=torch.int64)
    found = Prediction(*LMHead(_linear(True, torch.float32))(torch.empty(0, WIDTH), predict(targets)))
    assert (found.best.dtype, found.entropy.dtype) == (torch.int64, torch.float32)
    assert {tuple(values.shape) for values in found} == {(0,)}


def _largest_allocation(work: Callable[[], object]) -> int:
    """Return the size of the largest allocation in bytes."""
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=2.0, cap=3.0)], ids=["plain", "capped"])
def test_the_logits_of_all_positions_never_exist_at_once(
    transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, vocabulary = 2048, 32, 2000
    monkeypatch.setitem(cross_entropy._ELEMENTS, "cpu", rows * vocabulary // 8)
    logits_bytes = rows * vocabulary * 4
    head = LMHead(nn.Linear(width, vocabulary, bias=False), transform)
    hidden, targets = torch.randn(rows, width, requires_grad=True), torch.randint(vocabulary, (rows,))
    uniforms = hashing.uniform(hashing.DRAW, 0, torch.arange(rows))

    with torch.no_grad():
        assert _largest_allocation(lambda: head(hidden)) >= logits_bytes  # the measurement sees full logits
        assert _largest_allocation(lambda: head(hidden, draw(uniforms, 2.0, 1.0, 5))) < logits_bytes / 2
        assert _largest_allocation(lambda: head(hidden, predict(targets))) < logits_bytes / 2
    for weights in (None, torch.rand(rows)):
        loss = loss_sum(targets, 0.1, weights)
        assert _largest_allocation(lambda: head(hidden, loss).backward()) < logits_bytes / 2  # noqa: B023


@pytest.mark.parametrize("transform", [LogitTransform(), CAP], ids=["plain", "capped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_dft_weighs_each_loss_by_the_stopped_probability_of_its_target(
    transform: LogitTransform, weighted: bool
) -> None:
    linear, (hidden, targets) = _linear(True, torch.float64), _inputs(torch.float64)
    weights = torch.rand(ROWS, dtype=torch.float64) if weighted else None
    hidden = hidden.detach().requires_grad_()
    found = LMHead(linear, transform)(hidden, loss_sum(targets, 0.0, weights, dft=True))
    assert isinstance(found, Tensor)
    gradients = torch.autograd.grad(found, [hidden, linear.weight])
    losses = -_full_logits(linear, hidden, transform).log_softmax(-1)[torch.arange(ROWS), targets]
    expected = ((-losses).exp().detach() * losses * (1.0 if weights is None else weights)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, exact in zip(gradients, torch.autograd.grad(expected, [hidden, linear.weight]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)
