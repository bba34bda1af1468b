"""Tables come from the results, and what is missing, stale or failed is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases, convolutions, hashes, tables
from benchmarks.__main__ import main
from benchmarks.hashes import kernel_hash, tree_hash
from benchmarks.results import FOLDER, Device, Results, Row, Run
from benchmarks.tables import DOCUMENTS, check, check_rows, named, regenerated

CPU = Device("Some CPU, 2 threads")
GPU = Device("Some GPU", "sm_90a", 132)
RUN = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {"torch": "2.11", "numpy": "2"}, None)


def row(case: cases.Case, kernel_hash: str) -> Row:
    return Row(
        case.suite, case.name, 1234.5, {"ONNX Runtime": 2469.0}, 2.0, 99.06, 2.4e-6, "abc1234", "2026-01-01",
        kernel_hash, RUN.id,
    )  # fmt: skip


@pytest.fixture
def complete() -> Results:
    """Every row of a CPU, measured with the present sources."""
    return Results(CPU, [RUN], [row(case, kernel_hash(CPU, case)) for suite in cases.CPU.values() for case in suite])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_committed_tables_are_those_of_the_committed_results(document: Path) -> None:
    text = document.read_text()
    assert named(text)
    assert regenerated(text, FOLDER) == text


def test_every_suite_of_a_committed_device_has_a_table() -> None:
    texts = [document.read_text() for document in DOCUMENTS]
    for stem in {path.stem for path in FOLDER.glob("*.json")}:
        for suite in cases.suites_of(stem):
            assert any(f"<!-- table: {stem} {suite} -->" in text for text in texts), (stem, suite)


def test_a_table_holds_the_rows_in_the_order_of_the_list(complete: Results, tmp_path: Path) -> None:
    complete.rows = dict(reversed(complete.rows.items()))
    complete.save(tmp_path)
    text = f"before\n<!-- table: {CPU.stem} models -->\nold\n<!-- end -->\nafter\n"
    lines = regenerated(text, tmp_path).splitlines()
    assert lines[:4] == [
        "before",
        f"<!-- table: {CPU.stem} models -->",
        "| case | ours | ONNX Runtime | ratio | floor | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = lines[4:-6]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == [case.name for case in cases.CPU_MODELS]
    assert rows[0] == "| efficientnet-lite0 batch=1 | 1,234 | 2,469 | 2.00 | 99.1 | 2e-06 |"
    assert lines[-6:] == [
        "",
        "Ratio: 2.00 in the geometric mean of 7, 2.00 at least.",
        "",
        "µs a run. Some CPU, 2 threads; driver 580.1; torch 2.11; commit abc1234; 2026-01-01.",
        "<!-- end -->",
        "after",
    ]


def test_a_table_shows_what_did_not_count(tmp_path: Path) -> None:
    first, second, *_ = cases.GPU_MODELS
    bare = replace(row(first, ""), peers={"eager": 3000.0, "compile": None}, ratio=2.43, run_us=2000.0)
    failed = replace(row(second, ""), peers={}, ours_us=None, ratio=None, rel_err=None, failure="wrong")
    Results(GPU, [RUN], [bare, failed]).save(tmp_path)
    text = regenerated("<!-- table: some-gpu models -->\n<!-- end -->\n", tmp_path)
    assert "| case | ours | eager | compile | ratio | floor | `Model.run` | error |" in text
    assert f"| {first.name} | 1,234 | 3,000 | – | 2.43 | 99.1 | 2,000 | 2e-06 |" in text
    assert f"| {second.name} | **failed** | – | – | – | 99.1 | – | – |" in text


def test_a_table_has_what_was_predicted_and_sums_up(tmp_path: Path) -> None:
    first, second, *_ = cases.KERNELS["random"]
    rows = [
        replace(row(first, ""), ours_us=20.0, ratio=0.5, predicted_us=10.0),
        replace(row(second, ""), ours_us=5.0, ratio=2.0, predicted_us=10.0),
    ]
    saved = Results(GPU, [RUN], rows).save(tmp_path)
    assert Results.load(saved).rows[rows[0].key] == rows[0]
    text = regenerated("<!-- table: some-gpu random -->\n<!-- end -->\n", tmp_path)
    assert "| case | ours | ONNX Runtime | ratio | floor | predicted | error |" in text
    assert f"| {first.name} | 20 | 2,469 | 0.50 | 99.1 | 10 | 2e-06 |" in text
    assert (
        "Ratio: 1.00 in the geometric mean of 2, 0.50 at least; "
        "ours over predicted: 1.00 in the geometric mean, 0.50 to 2.00.\n" in text
    )


def convolution(name: str, ours: float, fused: float | None, alone: float, floor: float) -> Row:
    (case,) = (case for case in cases.KERNELS["conv"] if case.name == name)
    peers = {"eager": 4 * ours, "cuDNN fused": fused}
    return replace(row(case, ""), ours_us=ours, peers=peers, parts={"cuDNN alone": alone}, ratio=1.0, floor_us=floor)


def test_the_table_of_convolutions_compares_with_cudnn_pytorch_and_the_floor(tmp_path: Path) -> None:
    rows = [
        convolution("b1 64->64@56 3x3/1 relu", 10.0, 20.0, 5.0, 1.0),  # cuDNN's fused call counts
        convolution("b1 128->128@28 3x3/1 relu", 10.0, None, 5.0, 1.0),  # there is none that is right
        convolution("b128 144->24@56 1x1/1 residual", 10.0, None, 9.0, 9.5),  # slower, but at the floor
    ]
    slow = convolution("b1 64->64@56 3x3/1 relu", 10.0, 90.0, 5.0, 1.0)
    assert convolutions.cudnn_ratio(slow) == convolutions.eager_ratio(slow) == 4, "a fused call that nobody would take"
    Results(GPU, [RUN], rows).save(tmp_path)
    lines = regenerated("<!-- table: some-gpu conv -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[1:16] == [
        "| case | ours | eager | cuDNN fused | cuDNN alone | × eager | × cuDNN | floor | of floor | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| b1 64->64@56 3x3/1 relu | 10 | 40 | 20 | 5 | 4.00 | 2.00 | 1 | 0.10 | 2e-06 |",
        "| b1 128->128@28 3x3/1 relu | 10 | 40 | – | 5 | 4.00 | 0.50 | 1 | 0.10 | 2e-06 |",
        "| b128 144->24@56 1x1/1 residual | 10 | 40 | – | 9 | 4.00 | 0.90 | 9.5 | 0.95 | 2e-06 |",
        "",
        "| kind | batch | rows | × cuDNN | least | × eager | of floor | behind |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 3×3 | 1 | 2 | 1.00 | 0.50 | 4.00 | 0.10 | 1 |",
        "| 1×1 | 128 | 1 | 0.90 | 0.90 | 4.00 | 0.95 | 0 |",
        "| all | 1 | 2 | 1.00 | 0.50 | 4.00 | 0.10 | 1 |",
        "| all | 128 | 1 | 0.90 | 0.90 | 4.00 | 0.95 | 0 |",
        "| all | all | 3 | 0.97 | 0.50 | 4.00 | 0.21 | 1 |",
        "",
        "Geometric means. Behind, that is under 0.97 of cuDNN's best and under 0.9 of the floor: 1: "
        "b1 128->128@28 3x3/1 relu (0.50).",
    ]


def test_the_table_of_attention_has_rates_and_what_was_published(tmp_path: Path) -> None:
    long, masked = (
        next(case for case in cases.KERNELS["attention"] if case.name == name)
        for name in ("b2 h32 s8192 d64 causal", "b1 h12 s128 d64 padding")
    )
    rows = [replace(row(long, ""), ours_us=1000.0), replace(row(masked, ""), ours_us=3.5)]
    Results(GPU, [RUN], rows).save(tmp_path)
    text = regenerated(f"<!-- table: {GPU.stem} attention -->\n<!-- end -->\n", tmp_path)
    assert "| floor | TFLOP/s | FlashAttention-3's, published | error |" in text
    # 2 · 32 · 4 · 8192² · 64 / 2 FLOPs
    assert "| b2 h32 s8192 d64 causal | 1,000 | 2,469 | 2.00 | 99.1 | 550 | 460 | 2e-06 |" in text
    assert "| b1 h12 s128 d64 padding | 3.5 | 2,469 | 2.00 | 99.1 | – | – | 2e-06 |" in text


def test_a_table_has_the_hosts_part_of_a_run(tmp_path: Path) -> None:
    first = cases.GPU_MODELS[0]
    bare = replace(row(first, ""), run_us=2000.0, host_us={"Executable.launch": 4.25, "BoundModel.launch": 12.5})
    Results(GPU, [RUN], [bare]).save(tmp_path)
    text = regenerated("<!-- table: some-gpu models -->\n<!-- end -->\n", tmp_path)
    assert "| `Model.run` | host, `Executable.launch` | host, `BoundModel.launch` | error |" in text
    assert "| 2,000 | 4.25 | 12.5 | 2e-06 |" in text


def test_the_table_of_starts_has_seconds(tmp_path: Path) -> None:
    cold, warm = cases.ready.GPU_CASES
    empty = replace(row(cold, ""), ours_us=None, peers={}, ratio=None, floor_us=None, rel_err=None)
    rows = [
        replace(empty, seconds={"ready": 12.3, "a photo": 12.5}),
        replace(empty, case=warm.name, failure="not ready after 240 s"),
    ]
    Results(GPU, [RUN], rows).save(tmp_path)
    text = regenerated("<!-- table: some-gpu ready -->\n<!-- end -->\n", tmp_path)
    assert "| case | ready | a photo |\n| --- | ---: | ---: |\n" in text
    assert "| cuda, caches empty | 12.30 | 12.50 |\n| cuda, caches warm **failed** | – | – |\n" in text
    assert "Seconds from the start. Some GPU; driver 580.1" in text


def test_only_rows_that_are_missing_failed_or_stale_are_measured_again(
    complete: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import __main__ as program

    committed, written = tmp_path / "committed", tmp_path / "written"
    monkeypatch.setattr(program, "FOLDER", committed)
    names = [case.name for case in cases.CPU_LAYERS]
    stale, failed, missing = ("layers", names[3]), ("layers", names[5]), ("layers", names[7])
    complete.rows[stale] = replace(complete.rows[stale], kernel_hash="0000")
    complete.rows[failed] = replace(complete.rows[failed], failure="relative error nan")
    del complete.rows[missing]
    complete.save(committed)
    arguments = ["cpu", "--results", str(written), "--missing"]

    def chosen(*more: str) -> list[str]:
        options = program._parser().parse_args([*arguments, *more])
        return [case.name for case in program._chosen(options, cases.CPU_LAYERS, CPU)]

    assert chosen() == [names[3], names[5], names[7]]
    again = Results(CPU, [RUN], [row(cases.CPU_LAYERS[5], kernel_hash(CPU, cases.CPU_LAYERS[5]))])
    again.save(written)
    assert chosen() == [names[3], names[7]]
    assert chosen("--case", names[7]) == [names[7]]
    with pytest.raises(SystemExit) as ended:
        chosen("--case", names[5])
    assert ended.value.code == 0, "nothing is missing"


def test_a_table_without_rows_says_so(tmp_path: Path) -> None:
    text = regenerated("<!-- table: no-such-gpu models -->\n| old |\n<!-- end -->", tmp_path)
    assert text == "<!-- table: no-such-gpu models -->\nNot measured yet.\n<!-- end -->"


def test_nothing_is_wrong_with_a_complete_table(complete: Results) -> None:
    assert list(check_rows(complete, CPU.stem)) == []


def test_missing_stale_failed_and_unknown_rows_are_found(complete: Results) -> None:
    keys = list(complete.rows)
    missing, stale, failed = keys[0], keys[1], ("layers", cases.CPU_LAYERS[-1].name)
    del complete.rows[missing]
    complete.rows[stale] = replace(complete.rows[stale], kernel_hash="0000")
    complete.rows[failed] = replace(complete.rows[failed], failure="relative error nan")
    complete.rows["models", "of old"] = replace(complete.rows[stale], case="of old")
    assert list(check_rows(complete, CPU.stem)) == [
        f"{CPU.stem}: models: 1 of {len(cases.CPU_MODELS)} rows are missing",
        f"{CPU.stem}: {' '.join(missing)}: missing",
        f"{CPU.stem}: {' '.join(stale)}: stale: measured at abc1234, the sources have changed since",
        f"{CPU.stem}: {' '.join(failed)}: failed: relative error nan",
        f"{CPU.stem}: models of old: not in the committed list",
    ]


def test_check_exits_with_1_where_a_row_or_a_document_is_behind(
    complete: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"<!-- table: {CPU.stem} models -->\n<!-- end -->\n")
    complete.save(tmp_path)
    command = ["tables", str(document), "--results", str(tmp_path)]
    assert main([*command, "--check"]) == 1
    assert "page.md: its tables are not those of the results" in capsys.readouterr().out
    assert main(command) == 0
    assert "ONNX Runtime" in document.read_text()
    assert main([*command, "--check"]) == 0
    del complete.rows["models", cases.CPU_MODELS[0].name]
    complete.save(tmp_path)
    assert main(command) == 0
    assert main([*command, "--check"]) == 1
    assert "models efficientnet-lite0 batch=1: missing" in capsys.readouterr().out
    assert f"**Missing**, of {len(cases.CPU_MODELS)} cases: efficientnet-lite0 batch=1." in document.read_text()


def test_a_device_that_a_document_names_needs_a_file(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- table: no-such-gpu models -->\nNot measured yet.\n<!-- end -->\n")
    assert list(check(tmp_path, [document])) == ["no-such-gpu: no results file"]


def test_a_changed_source_changes_the_hash(tmp_path: Path) -> None:
    for folder in ("ir", "passes", "plan", "targets/cpu"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text(folder)
    before = tree_hash("targets/cpu", tmp_path)
    (tmp_path / "passes" / "a.py").write_text("another pass")
    tree_hash.cache_clear()
    assert tree_hash("targets/cpu", tmp_path) != before


class TestKernelHashes:
    """Those of single GPU kernels. Lowering needs NVRTC's bindings, and no GPU."""

    @pytest.fixture(autouse=True)
    def _bindings(self) -> None:
        pytest.importorskip("cuda.bindings.nvrtc")

    def test_every_case_has_kernels_and_they_depend_on_tile_and_expression(self) -> None:
        found = {case.name: kernel_hash(GPU, case) for suite in cases.KERNELS.values() for case in suite}
        assert all(found.values())
        assert found["4096x768x768 bias"] != found["4096x768x768 bias gelu"]
        assert found["4096x768x768"] != found["128x768x768"]
        assert kernel_hash(Device("Another", "sm_80", 108), cases.KERNELS["gemm"][0]) != found["8192x8192x8192"]

    def test_a_changed_kernel_makes_its_rows_stale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.gpu import steps

        gemm, light = cases.KERNELS["gemm"][0], cases.KERNELS["light"][0]
        results = Results(GPU, [RUN], [row(case, kernel_hash(GPU, case)) for case in (gemm, light)])

        def staleness() -> list[str]:
            return [line for line in check_rows(results, GPU.stem) if "stale" in line]

        assert staleness() == []
        expand = steps.expand
        monkeypatch.setattr(steps, "expand", lambda text: expand(text).replace("wgmma", "changed"))
        assert staleness() == [
            f"some-gpu: gemm {gemm.name}: stale: measured at abc1234, the sources have changed since"
        ]

    def test_without_the_bindings_rows_cannot_be_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(device: Device, case: cases.Case) -> str:
            raise ImportError("No module named 'cuda'")

        monkeypatch.setattr(tables, "kernel_hash", missing)
        case = cases.KERNELS["light"][0]
        (line,) = [line for line in check_rows(Results(GPU, [RUN], [row(case, "")]), GPU.stem) if "compared" in line]
        assert line.startswith(f"some-gpu: light {case.name}: cannot be compared")


def test_hashes_do_not_depend_on_order() -> None:
    assert hashes.hash_texts(["a", "b", "a"]) == hashes.hash_texts(["b", "a"]) != hashes.hash_texts(["ab"])


def test_comments_and_lines_of_kernels_count_for_nothing() -> None:
    code = hashes.code_of("// what it does\n#pragma once\nint a = b  // why\n    + c / d;\n\n")
    assert code == "#pragma once int a = b + c / d;"
    assert code != hashes.code_of("#pragma once\nint a = b + c * d;")
