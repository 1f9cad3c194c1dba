"""The ledger of refused samples."""

from megatron_rb.data.ledger import Ledger, read_ledger


def test_records_of_two_ranks_and_two_runs_stay(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    with Ledger(path) as first, Ledger(path, rank=1) as second:
        first.record("rejected", "a.jsonl", "no assistant turn", line=3, id="x")
        second.record("unreadable", "b.jsonl", "broken image")
    with Ledger(path) as later:
        later.record("rejected", "a.jsonl", "größer")
    records = read_ledger(path)
    assert [(record["rank"], record["reason"]) for record in records] == [
        (0, "no assistant turn"),
        (1, "broken image"),
        (0, "größer"),
    ]
    assert records[0]["line"] == 3 and records[0]["id"] == "x"


def test_a_record_is_on_disk_at_once(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record("rejected", "a.jsonl", "too long")
    assert len(read_ledger(ledger.path)) == 1
    ledger.close()
    ledger.close()


def test_no_file_means_no_records(tmp_path):
    assert read_ledger(tmp_path / "ledger.jsonl") == []
