"""Check the cross entropies that are computed for a block of the vocabulary at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfgen_ds.model import cross_entropy
from selfgen_ds.model.cross_entropy import Projection, cross_entropies
from selfgen_ds.model.head import loss_sum

POSITIONS, WIDTH, VOCABULARY = 40, 16, 50


@pytest.fixture(params=[1, 3, 7], ids=lambda blocks: f"{blocks} blocks")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Split the vocabulary into so many blocks, of which the last one may be narrower."""
    monkeypatch.setitem(cross_entropy._ELEMENTS, "cpu", POSITIONS * -(-VOCABULARY // request.param))
    return request.param


def _inputs(dtype: torch.dtype, size: tuple[int, int, int] = (POSITIONS, WIDTH, VOCABULARY)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    positions, width, vocabulary = size
    hidden = torch.randn(positions, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / width**0.5
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)), targets


def _whole(hidden: Tensor, project: Projection, targets: Tensor, smoothing: float) -> Tensor:
    """Compute the cross entropies from whole logits."""
    logits = project.logits(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize(("biased", "cap", "smoothing"), [(False, None, 0.0), (True, 2.0, 0.1), (True, None, 0.3)])
def test_blocks_give_the_losses_and_gradients_of_whole_logits(
    blocks: int, biased: bool, cap: float | None, smoothing: float
) -> None:
    hidden, weight, bias, targets = _inputs(torch.float64)
    project = Projection(weight=weight, bias=bias if biased else None, cap=cap)
    leaves, scales = [hidden, weight, *([bias] if biased else [])], torch.rand(POSITIONS, dtype=torch.float64)
    assert len(list(cross_entropy._blocks(hidden, project, targets))) == blocks
    found, expected = (losses(hidden, project, targets, smoothing) for losses in (cross_entropies, _whole))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(losses @ scales, leaves) for losses in (found, expected)]
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [1, 4, 32, 128])
def test_in_bfloat16_they_are_no_less_exact_than_a_float32_loss_of_whole_logits(
    split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (512, 64, 4096)
    hidden, weight, _, targets = _inputs(torch.bfloat16, size)
    monkeypatch.setitem(cross_entropy._ELEMENTS, "cpu", size[0] * size[2] // split)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    wanted = expected.detach(), *torch.autograd.grad(expected, exact)
    errors = []
    for losses in (cross_entropies, _whole):
        loss = losses(hidden, Projection(weight=weight, bias=None, cap=None), targets, 0.0).sum()
        values = loss.detach(), *torch.autograd.grad(loss, [hidden, weight])
        assert loss.dtype == torch.float32
        errors.append([float((v.double() - w).norm() / w.norm()) for v, w in zip(values, wanted, strict=True)])
    for ours, whole in zip(*errors, strict=True):
        assert ours <= 1.05 * whole + 1e-7  # the sums of float32 differ in their order


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, _, targets = _inputs(torch.float32)
    for frozen, trained in ((hidden, weight), (weight, hidden)):
        frozen.requires_grad_(False)
        cross_entropies(hidden, Projection(weight=weight, bias=None, cap=None), targets, 0.0).sum().backward()
        assert frozen.grad is None
        assert trained.grad is not None
        frozen.requires_grad_(True)
        trained.grad = None


def test_the_losses_of_a_position_that_is_not_finite_are_not_finite() -> None:
    hidden, weight, _, targets = _inputs(torch.float32)
    broken = hidden.detach().clone()
    broken[3, 0] = torch.nan
    losses = cross_entropies(broken, Projection(weight=weight.detach(), bias=None, cap=None), targets, 0.0)
    assert losses.isfinite().tolist() == [position != 3 for position in range(POSITIONS)]


@pytest.mark.parametrize("weighted", [False, True])
def test_without_torchs_chunked_loss_the_loss_in_float32_is_the_same(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = _inputs(torch.float32)
    project, leaves = Projection(weight=weight, bias=bias, cap=None), [hidden, weight, bias]
    reduction = loss_sum(targets, 0.1, torch.rand(POSITIONS) if weighted else None)
    results = []
    for _ in range(2):
        loss = reduction(hidden, project)
        assert isinstance(loss, Tensor)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert not hasattr(F, "linear_cross_entropy")
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
