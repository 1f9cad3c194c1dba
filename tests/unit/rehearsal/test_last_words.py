"""What is told of a process of a rehearsal that has failed."""

from megatron_rb.rehearsal.run import last_words


def test_the_sentence_of_a_process_is_told_alone():
    log = "kernels: layers local\nrb: tp_size 3 does not divide 4; use 2\n(rb --debug shows where this came from)\n"
    assert last_words(log) == ": tp_size 3 does not divide 4; use 2"


def test_an_error_that_was_not_foreseen_keeps_the_end_of_its_traceback():
    log = "\n".join(f"line {number}" for number in range(9)) + "\nKeyError: 'x'\n"
    assert last_words(log).splitlines() == [":", *(f"line {number}" for number in range(4, 9)), "KeyError: 'x'"]


def test_a_process_that_says_nothing_is_said_to():
    assert last_words("\n") == ", and its process says nothing"
