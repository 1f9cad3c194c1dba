"""What a training process logs can be seen."""

import logging

import pytest

from megatron_rb.app.log_lines import show_log_lines


@pytest.fixture(autouse=True)
def as_before():
    loggers = [logging.getLogger(name) for name in ("megatron_rb", "megatron_rb.kernels")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers
        logger.manager._clear_cache()


def test_lines_of_a_run_are_shown_once_and_kernels_only_when_something_is_wrong(capfd):
    show_log_lines()
    show_log_lines()
    logging.getLogger("megatron_rb.checkpoint.manager").info("checkpoint %s is complete", "step_00000400")
    logging.getLogger("megatron_rb.kernels.dispatch").info("mrope runs torch")
    logging.getLogger("megatron_rb.kernels.dispatch").warning("mrope is slow here")
    shown = capfd.readouterr().err
    assert shown.count("checkpoint step_00000400 is complete") == 1
    assert "mrope runs torch" not in shown and "mrope is slow here" in shown
