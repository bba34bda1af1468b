"""The suite of encoders on packed tokens, as far as it needs neither a GPU nor PyTorch: lengths, figures, the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cases, hashes, packed
from benchmarks.cases.attention import VarlenCase
from benchmarks.cases.lengths import Corpus, corpora, counted
from benchmarks.cases.models import BERT, MINILM
from benchmarks.cases.packed import PackedCase
from benchmarks.hashes import kernel_hash, tree_hash
from benchmarks.measure import Measurement
from benchmarks.recorder import line
from benchmarks.results import Device, Results, Row, Run
from benchmarks.tables import check_rows, regenerated

GPU = Device("Some GPU", "sm_90a", 132)
RUN = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {"torch": "2.11"}, None)
CASE = PackedCase(BERT, 128, 128)


def test_a_batch_has_the_distribution_of_the_corpus_and_its_longest() -> None:
    corpus = Corpus(tuple(range(1, 11)))
    assert corpus.batch(5, 100).tolist() == [2, 4, 6, 8, 10]
    assert corpus.batch(3, 100).tolist() == [4, 7, 10]
    assert corpus.batch(10, 7).tolist() == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    assert corpus.batch(1, 100).tolist() == [10]


def test_lengths_are_counted_in_word_pieces_by_pair_and_by_story(model_repository: Path) -> None:
    stories = ["Fires burn. They are big! Are they? No.", "One sentence. Two sentences. A third, alone."]
    found = counted(stories, model_repository / MINILM / "tokenizer.json")
    # [CLS] fires burn . [SEP] they are big ! [SEP], [CLS] are they ? [SEP] no . [SEP], [CLS] one sentence . [SEP] …
    assert found["pairs"].lengths == (8, 9, 10)
    assert found["stories"].lengths == (13, 14)


def test_the_committed_lengths_are_a_real_distribution() -> None:
    found = corpora()
    assert {name: len(corpus.lengths) for name, corpus in found.items()} == {"pairs": 1231, "stories": 300}
    for corpus in found.values():
        assert list(corpus.lengths) == sorted(corpus.lengths)


@pytest.mark.parametrize("case", cases.PACKED, ids=lambda case: case.name)
def test_batches_are_half_padding_and_as_wide_as_their_longest_row(case: PackedCase) -> None:
    assert 0.4 <= case.lengths.mean() / case.sequence <= 0.5
    feeds = case.feeds()
    lengths = feeds["attention_mask"].sum(1)
    assert lengths.max() == case.sequence
    assert sorted(lengths) == list(case.lengths) != list(lengths), "in random order"
    assert all(np.array_equal(array, case.feeds()[name]) for name, array in feeds.items())
    assert feeds["input_ids"].shape == (case.batch, case.sequence)


@pytest.mark.parametrize("case", cases.KERNELS["varlen"], ids=lambda case: case.name)
def test_packed_attention_has_the_lengths_of_a_corpus_too(case: VarlenCase) -> None:
    lengths = case.lengths
    assert lengths.shape == (case.batch,)
    assert lengths.max() == case.longest
    assert lengths.min() > 0
    assert 0.4 <= lengths.mean() / case.longest <= 0.6
    assert list(lengths) != sorted(lengths)
    assert np.array_equal(lengths, case.lengths)


def test_the_cases_are_two_encoders_at_two_widths_and_two_batches() -> None:
    assert {(case.model, case.batch, case.sequence) for case in cases.PACKED} == {
        (model, batch, sequence) for model in (BERT, MINILM) for batch in (32, 128) for sequence in (128, 512)
    }


def test_the_packer_is_part_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_hash(GPU, CASE)
    assert before != tree_hash("targets/cuda")
    monkeypatch.setattr(hashes, "_packer", lambda: "another packer")
    assert kernel_hash(GPU, CASE) != before


def test_figures_compare_with_the_best_of_either_kind() -> None:
    peers = {packed.EAGER: 5000.0, packed.COMPILE: 4000.0, packed.JAGGED: None, packed.JAGGED_CALLED: 3000.0}
    found = packed.figures(CASE, Measurement(1000.0, peers))
    mean = CASE.lengths.mean()
    assert found == pytest.approx(
        {
            "mean": mean, "max": 128, "sequences_s": 128_000, "padded_ratio": 4.0, "over_lengths": 4 * mean / 128,
            "jagged_ratio": 3.0,
        }
    )  # fmt: skip
    alone = packed.figures(CASE, Measurement(1000.0, dict.fromkeys(peers)))
    assert set(alone) == {"mean", "max", "sequences_s"}
    assert set(packed.figures(CASE, Measurement(failure="wrong"))) == {"mean", "max"}


def row(case: PackedCase, ours_us: float | None, **fields: object) -> Row:
    peers = {packed.EAGER: 8000.0, packed.COMPILE: 7000.0, packed.JAGGED: None, packed.JAGGED_CALLED: 3300.0}
    figures = packed.figures(case, Measurement(ours_us, peers)) | {"worst_token": 2e-3, "ours_padded_us": 6400.0}
    empty = Row(
        "packed", case.name, ours_us, peers, 1.1, 2000.0, 1.1e-3, "abc1234", "2026-01-01", "", RUN.id, run_us=6000.0,
        figures={**figures, "run_padded_us": 13000.0},
    )  # fmt: skip
    return replace(empty, **fields)  # type: ignore[arg-type]


def test_the_table_has_lengths_and_ratios_and_says_what_is_behind(tmp_path: Path) -> None:
    first, second, third, fourth = cases.PACKED[:4]
    slow = row(second, 3300.0)
    rows = [row(first, 2500.0), slow, row(fourth, None, peers={}, rel_err=None, failure="wrong", run_us=None)]
    saved = Results(GPU, [RUN], rows).save(tmp_path)
    assert Results.load(saved).rows[slow.key] == slow
    lines = regenerated("<!-- table: some-gpu packed -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[1] == (
        "| case | sequences/s | mean | max | × padded | × padded ÷ (max ÷ mean) | × jagged | ours | ours padded | "
        "eager | compile in a graph | jagged | jagged, called | `Model.run` | the same padded | floor | error | "
        "worst token |"
    )
    assert lines[3] == (
        f"| {first.name} | 12,800 | 60.3 | 128 | 2.80 | 1.32 | 1.32 | 2,500 | 6,400 | 8,000 | 7,000 | – | 3,300 | "
        "6,000 | 13,000 | 2,000 | 1.1e-03 | 2.0e-03 |"
    )
    assert next(packed.cells([replace(rows[0], figures={**rows[0].figures, "worst_token_padded": 3e-3})]))[-1] == (
        "2.0e-03 (padded 3.0e-03)"
    )
    assert lines[5].startswith(f"| {fourth.name} **failed** | – | 242.4 | 512 | – | – | – | – | 6,400 | – | – |")
    behind = f"{second.name} (÷ (max ÷ mean) 0.98), {second.name} (jagged 1.00)"
    assert f"Under 1.2 × max ÷ mean or under 1.1 × jagged: 2: {behind}." in lines[7]
    problems = list(check_rows(Results.load(saved), "some-gpu"))
    assert f"some-gpu: packed: {len(cases.PACKED) - 3} of {len(cases.PACKED)} rows are missing" in problems
    assert f"some-gpu: packed {third.name}: missing" in problems
    assert f"some-gpu: packed {fourth.name}: failed: wrong" in problems
    assert f"some-gpu: packed {first.name}: stale: measured at abc1234, the sources have changed since" in problems


def test_the_terminal_has_times_and_figures() -> None:
    said = line(row(CASE, 2500.0))
    assert "ours 2500.0" in said and "jagged, called 3300.0" in said
    assert "sequences_s 51200" in said and "over_lengths 1.2884" in said
    failed = line(row(CASE, None, failure="wrong"))
    assert "FAILED wrong" in failed and "worst_token 0.002" in failed
