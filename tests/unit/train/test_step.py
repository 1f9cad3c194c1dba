"""A pass over the micro-batches of a step, and the update behind it."""

from functools import partial

import pytest
import torch

from megatron_rb.models.inputs import to_device
from megatron_rb.models.language.blocks import HeadOutput
from megatron_rb.train.build import build_trainable
from megatron_rb.train.gradients import main_grad
from megatron_rb.train.schedule import LearningRateSchedule
from megatron_rb.train.step import (
    Runner,
    accumulate,
    apply_gradients,
    logits_pass,
    loss_pass,
    train_pass,
    update,
)


@pytest.fixture
def runner(trainable, session):
    return Runner(trainable.chunks, session)


def direct(runner, batches) -> tuple[torch.Tensor, int]:
    """Summed loss and labels by plain autograd, without any schedule."""
    stage = runner.chunks[0].module
    total = sum(stage(to_device(batch, runner.shape, torch.device("cpu"))) for batch in batches)
    return total, sum(batch.num_labels for batch in batches)


def test_a_pass_gives_the_sums_of_every_micro_batch(runner, batches):
    results = train_pass(runner, batches)
    for batch, result in zip(batches, results, strict=True):
        loss, labels = direct(runner, [batch])
        assert int(result["num_labels"]) == labels
        torch.testing.assert_close(result["loss_sum"], loss.detach())


def test_gradients_are_those_of_the_mean_over_all_labels_of_the_step(runner, batches):
    """Not of the mean of means: the micro-batches have different numbers of labels."""
    stage = runner.chunks[0].module
    parameters = list(stage.parameters())
    loss, labels = direct(runner, batches)
    expected = torch.autograd.grad(loss / labels, parameters)
    runner.chunks[0].zero_grad_buffer()
    train_pass(runner, batches)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(main_grad(parameter), gradient, rtol=1e-4, atol=1e-7)


def test_a_loss_pass_gives_the_same_sums_and_no_gradient(runner, batches):
    trained = train_pass(runner, batches)
    runner.chunks[0].zero_grad_buffer()
    found = loss_pass(runner, batches)
    assert [float(one["loss_sum"]) for one in found] == [float(one["loss_sum"]) for one in trained]
    assert not any(main_grad(parameter).any() for parameter in runner.chunks[0].parameters())


def test_logits_are_in_fp32_for_every_token(runner, batches):
    for batch, found in zip(batches, logits_pass(runner, batches), strict=True):
        with torch.no_grad():
            there = to_device(batch, runner.shape, torch.device("cpu"))
            expected = runner.chunks[0].module(there, HeadOutput.ALL_LOGITS)
        assert found.dtype is torch.float32 and found.shape == (batch.text.num_tokens, runner.shape.text.vocab_size)
        torch.testing.assert_close(found, expected)


def test_accumulating_starts_from_gradients_of_zero(trainable, runner, batches):
    for parameter in runner.chunks[0].parameters():
        main_grad(parameter).fill_(1e3)
    _, first = accumulate(trainable.chunks, trainable.optimizer, lambda: train_pass(runner, batches))
    _, second = accumulate(trainable.chunks, trainable.optimizer, lambda: train_pass(runner, batches))
    squares = [main_grad(parameter).square().sum() for parameter in runner.chunks[0].parameters()]
    assert first == second == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


def weights(runner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in runner.chunks[0].parameters()]


def test_weights_stay_until_the_gradients_are_applied(trainable, runner, batches):
    before = weights(runner)
    _, norm = accumulate(trainable.chunks, trainable.optimizer, lambda: train_pass(runner, batches))
    assert all(torch.equal(one, other) for one, other in zip(before, weights(runner), strict=True))
    apply_gradients(trainable.optimizer, norm)
    assert not any(torch.equal(one, other) for one, other in zip(before, weights(runner), strict=True))


@pytest.mark.parametrize(("name", "clip"), [("adamw", 0.0), ("adamw", 0.5), ("sgd", 0.0), ("sgd", 0.5)])
def test_an_update_is_that_of_torch_on_clipped_gradients(session, config, batches, name, clip):
    """A small eps would hide the scale of the gradients in AdamW's first step."""
    settings = config.optimizer
    settings.name, settings.clip_grad, settings.lr = name, clip, 1e-2
    settings.eps = 1e-3
    config.parallel.distributed_optimizer = name == "adamw"
    config.schedule.decay, config.schedule.warmup_ratio = "constant", 0.0
    trainable = build_trainable(session, config, "random")
    LearningRateSchedule(trainable.optimizer, settings, config.schedule, train_steps=1)  # sets rate and decay of groups
    runner = Runner(trainable.chunks, session)
    theirs, groups = copies_with_gradients(runner, batches, settings.weight_decay)
    if clip:
        torch.nn.utils.clip_grad_norm_(theirs, clip)
    optimizers = {
        "adamw": partial(torch.optim.AdamW, eps=1e-3),
        "sgd": partial(torch.optim.SGD, momentum=settings.momentum),
    }
    optimizers[name](groups, lr=settings.lr).step()
    update(trainable.chunks, trainable.optimizer, lambda: train_pass(runner, batches))
    for copy, found in zip(theirs, weights(runner), strict=True):
        torch.testing.assert_close(found, copy.detach(), rtol=1e-4, atol=1e-6)


def copies_with_gradients(runner, batches, weight_decay):
    """The weights with the gradients of plain autograd, and a group of torch's optimizers for each."""
    loss, labels = direct(runner, batches)
    named = list(runner.chunks[0].named_parameters())
    gradients = torch.autograd.grad(loss / labels, [parameter for _, parameter in named])
    copies = [torch.nn.Parameter(parameter.detach().clone()) for _, parameter in named]
    groups = []
    for (name, parameter), copy, gradient in zip(named, copies, gradients, strict=True):
        copy.grad = gradient
        decayed = parameter.dim() > 1 and not name.endswith(".bias")
        groups.append({"params": [copy], "weight_decay": weight_decay if decayed else 0.0})
    return copies, groups
