"""How `precision="auto"` decides on a GPU, and that it decides once. The GPU is a fake (fake_gpu.py)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

import engine
from engine import DeviceError, Model, UnsupportedOp, loading
from engine.ir.dtype import DType
from engine.passes.traits import PackedAttention, Traits
from engine.precision import BOUNDS, Precision, Verdict, Verdicts, distance, fingerprint, probe_sizes
from engine.targets.cuda import probe
from engine.targets.cuda.probe import Gpu, Survey
from tests.engine.fake_gpu import FakeGpu
from tests.engine.passes.encoders import encoder, in_float32

F16, BF16, F32 = DType.F16, DType.BF16, DType.F32


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A machine with one fake GPU and an empty cache."""
    fake = FakeGpu()
    monkeypatch.setattr(probe, "survey", lambda: Survey((Gpu(0, "fake", (9, 0)),), (13, 0)))
    monkeypatch.setattr(probe, "missing_packages", list)
    monkeypatch.setattr(loading, "cuda_target", lambda *_: fake.target())
    monkeypatch.setattr(loading, "toolchain", lambda: ("driver 580.1", "NVRTC 13.0"))
    monkeypatch.setenv("TILEWAVE_CACHE_DIR", str(tmp_path))
    return fake


def model_bytes(scale: float = 0.1, op: str = "Relu") -> bytes:
    body = f"h = MatMul(x, w) r = {op}(h) y = MatMul(r, v)"
    graph = onnx.parser.parse_graph(f"g (float[n,8] x) => (float[n,4] y) {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (8, 8)), ("v", (8, 4))):
        array = (rng.standard_normal(shape) * scale).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString()


def load(gpu: FakeGpu, precision: str = "auto", device: str = "cuda", data: bytes | None = None) -> Model:
    return engine.load(data or model_bytes(), device=device, precision=precision)


def test_auto_takes_fp16_where_it_holds(gpu: FakeGpu) -> None:
    with load(gpu) as model:
        assert model.precision == "fp16"
        y = model.run({"x": np.ones((3, 8), np.float32)})["y"]
        assert y.dtype == np.float32 and y.shape == (3, 4)
    assert set(gpu.runs) == {F16}
    assert gpu.open == 0


def test_auto_takes_bf16_where_fp16_overflows(gpu: FakeGpu) -> None:
    with load(gpu, data=model_bytes(scale=1e6)) as model:
        assert model.precision == "bf16"
    assert gpu.runs == [F16, BF16]
    assert gpu.open == 0, "the target of the precision that was refused stays open"


def test_auto_goes_on_where_a_precision_is_too_far_off(gpu: FakeGpu) -> None:
    gpu.noise = {F16: 2 * BOUNDS[Precision.FP16], BF16: 2 * BOUNDS[Precision.BF16]}
    with load(gpu) as model:
        assert model.precision == "tf32"


def test_auto_passes_over_precisions_without_kernels(gpu: FakeGpu) -> None:
    gpu.kernels = frozenset({BF16})
    with load(gpu) as model:
        assert model.precision == "bf16"
    gpu.kernels = frozenset()
    with pytest.raises(UnsupportedOp, match="no product of f16"):
        load(gpu, data=model_bytes(op="Tanh"))
    assert gpu.open == 0


def test_auto_refuses_a_device_that_is_wrong_in_every_precision(gpu: FakeGpu) -> None:
    gpu.noise = dict.fromkeys((F16, BF16, F32), 0.5)
    with pytest.raises(DeviceError, match="close enough"):
        load(gpu)
    assert gpu.open == 0


def test_device_auto_falls_back_to_the_cpu_and_says_so(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.kernels = frozenset()
    with load(gpu, device="auto") as model:
        assert model.device_info.device == "cpu" and model.precision == "fp32"
    assert "no product of f16" in caplog.text
    with pytest.raises(UnsupportedOp):
        load(gpu, "fp16", device="auto")


def test_a_gpu_on_which_nothing_can_be_made_is_told_or_passed_over(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("compute capability 11.0")

    monkeypatch.setattr(loading, "cuda_target", fail)
    with pytest.raises(DeviceError, match="capability 11"):
        load(gpu)
    with load(gpu, device="auto") as model:
        assert model.device_info.device == "cpu"
    assert "compute capability 11.0" in caplog.text


@pytest.mark.parametrize(("name", "storage"), [("fp16", F16), ("bf16", BF16), ("tf32", F32), ("fp32", F32)])
def test_a_precision_asked_for_is_the_one_that_runs(gpu: FakeGpu, name: str, storage: DType) -> None:
    gpu.noise = {storage: 0.5}  # nobody compares
    with load(gpu, name) as model:
        assert model.precision == name
        model.run({"x": np.ones((1, 8), np.float32)})
    assert gpu.runs == [storage]
    gpu.kernels = frozenset({F16, BF16, F32} - {storage})
    with pytest.raises(UnsupportedOp):
        load(gpu, name)


@pytest.mark.parametrize("packed", ["auto", True])
def test_what_is_decided_on_has_padding(gpu: FakeGpu, packed: bool | str) -> None:
    """Of an encoder: on packed tokens where they will be used, else padded, and then real tokens count."""
    kernel = PackedAttention(frozenset({F16, BF16}), multiple=4, by_default=False)
    gpu.traits = Traits(packed=kernel)
    data = in_float32(encoder())
    with engine.load(data, device="cuda", packed=packed) as model:
        assert model.precision == "fp16"
        assert (model.packed_mask is None) == (packed == "auto")
        assert [sizes.get("tokens") for sizes in gpu.sizes] == [None if packed == "auto" else 24]
    with engine.load(data, device="cuda", packed=packed):
        assert len(gpu.runs) == 1, "the probe ran again"
    with engine.load(data, device="cuda", packed=False):
        assert len(gpu.runs) == 2, "a verdict on other plans was taken"


def test_a_verdict_is_found_again(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    with load(gpu, data=model_bytes(scale=1e6)):
        pass
    gpu.runs.clear()
    with caplog.at_level(logging.INFO), load(gpu, data=model_bytes(scale=1e6)) as model:
        assert model.precision == "bf16"
    assert gpu.runs == [], "the probe ran again"
    assert "as found before" in caplog.text and "inf" in caplog.text


def test_whatever_a_verdict_depends_on_is_judged_anew(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    load(gpu).close()
    changes = (
        lambda: model_bytes(scale=0.2),
        lambda: monkeypatch.setattr(probe, "survey", lambda: Survey((Gpu(0, "other", (9, 0)),), (13, 0))),
        lambda: monkeypatch.setattr(loading, "source_hash", lambda: "other kernels"),
        lambda: monkeypatch.setattr(loading, "toolchain", lambda: ("driver 580.2", "NVRTC 13.0")),
        lambda: monkeypatch.setattr(loading, "toolchain", lambda: ("driver 580.2", "NVRTC 13.1")),
    )
    for change in changes:
        gpu.runs.clear()
        load(gpu, data=change()).close()
        assert gpu.runs == [F16]


def test_a_damaged_or_unwritable_cache_is_no_verdict(gpu: FakeGpu, tmp_path: Path) -> None:
    load(gpu).close()
    (file,) = (tmp_path / "precision").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    unknown = [f'{{"precision": "{name}", "error": 0.0, "rejected": []}}'.encode() for name in ("fp8", "auto")]
    for content in (b"", b"{", b"[]", b"\xff", b'{"precision": "fp16"}', *unknown):
        file.write_bytes(content)
        gpu.runs.clear()
        load(gpu).close()
        assert gpu.runs == [F16]
    (tmp_path / "file").write_text("")
    for nowhere in (Verdicts(tmp_path / "file" / "below"), Verdicts(None)):
        nowhere.write(Verdict(Precision.FP16, 0.0), "a")
        assert nowhere.read("a") is None


def test_a_verdict_that_was_not_measured_is_found_again_by_nobody(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_fits(*_: object) -> None:
        raise engine.ShapeError("no sizes")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "probe_sizes", none_fits)
        load(gpu, data=model_bytes(scale=1e6)).close()
    assert not list(tmp_path.rglob("*.json"))
    verdicts = Verdicts(tmp_path / "precision")
    verdicts.write(Verdict(Precision.FP16, 1e-3, ("why",)), "a")
    verdicts.write(Verdict(Precision.FP16, None), "b")
    assert verdicts.read("a") == Verdict(Precision.FP16, 1e-3, ("why",)) and verdicts.read("b") is None
    with load(gpu, data=model_bytes(scale=1e6)) as model:  # sizes can be guessed now
        assert model.precision == "bf16"


def test_a_fingerprint_tells_weights_operators_and_outputs() -> None:
    def of(data: bytes) -> str:
        from engine import frontend

        return fingerprint(frontend.read(data))

    same = of(model_bytes())
    assert of(model_bytes()) == same
    proto = onnx.load_from_string(model_bytes())
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["n", 8]))
    assert len({same, of(model_bytes(0.2)), of(model_bytes(op="Tanh")), of(proto.SerializeToString())}) == 4


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([np.inf, 2.0], [1.0, 2.0], np.inf),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([-np.inf, 2.0], [-np.inf, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.01, 0.0], [1.0, 0.0], 0.01),
    ],
)
def test_distance(got: list[float], expected: list[float], error: float) -> None:
    outputs, reference = ({"y": np.array(values, np.float32)} for values in (got, expected))
    assert distance(outputs, reference) == pytest.approx(error, rel=1e-4)


def test_integer_outputs_are_not_judged() -> None:
    assert distance({"y": np.array([1])}, {"y": np.array([2])}) == 0


def test_probe_sizes_are_the_first_the_model_accepts() -> None:
    def accepts(sizes: dict[str, int]) -> None:
        if sizes["side"] < 64:
            raise engine.ShapeError("too small")

    assert probe_sizes([("n", True), ("side", False)], accepts) == {"n": 2, "side": 64}  # type: ignore[arg-type]
    with pytest.raises(engine.ShapeError):
        probe_sizes([("side", False)], lambda _: accepts({"side": 1}))
