"""Pictures: the codec by itself, then `POST /v1/models/{model}/images`."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from engine import DeviceError, images
from service.codecs.classify import top_labels
from service.codecs.images import ImageSpec, decode, make_image_spec
from service.errors import DeadlineExceeded, InvalidRequest, TooLarge
from service.model_config import ImagesConfig, Interpolation, Layout
from service.preprocess import PreprocessPool
from service.workers import resampling
from tests.service.conftest import Running, Start, add_model, error_of
from tests.service.fakes import FakeEngine

LIMITS = (1 << 20, 1 << 20)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(colour: Any, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def spec(channels: int = 3, dtype: str = "float32", **config: Any) -> ImageSpec:
    made = make_image_spec("input", np.dtype(dtype), ("n", channels, 8, 8), ImagesConfig(**config))
    assert made is not None
    return made


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_no_label_is_made_of_what_is_no_number(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "m", "colours", answers=float("nan"))
    server = start(tmp_path)
    response = server.client.post("/v1/models/m/images", content=file_of(plain("red")))
    assert response.status_code == 500
    assert "model 'm' answered with NaN or infinity in output 'logits' for row 0" in error_of(response)
    assert server.client.post("/v1/models/m/images?raw=true", content=file_of(plain("red"))).status_code == 200


def test_values_are_normalised_in_0_to_255_units() -> None:
    pixels = decode(file_of(plain((10, 20, 30))), spec(mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0)), *LIMITS)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0, 0], [4.5, 4.5, 27 / 8])
    assert pixels.flags.c_contiguous
    assert pixels.shape == (3, 8, 8)


def test_crop_is_the_centre_of_the_shorter_side() -> None:
    """Resizing the whole picture and cropping its centre gives the same values: the reference, in plain Pillow."""
    noise = np.random.default_rng(0).integers(0, 255, (92, 184, 3), np.uint8)
    image = Image.fromarray(noise).resize((368, 184), Image.Resampling.BICUBIC)
    whole = image.resize((92, 46), Image.Resampling.BICUBIC).crop((28, 5, 64, 41))
    made = make_image_spec("x", np.dtype("float32"), ("n", 3, 36, 36), ImagesConfig(resize=46, std=(1.0,)))
    assert made is not None
    got = decode(file_of(image), made, *LIMITS)
    expected = np.asarray(whole, np.float32).transpose(2, 0, 1)
    # At the crop's edge the reference filter sees pixels that ours leaves out.
    np.testing.assert_allclose(got[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1)


def plainly_decoded(data: bytes, made: ImageSpec) -> np.ndarray:
    """What `decode` has to give, bit for bit, in plain Pillow and NumPy."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB" if made.channels == 3 else "L")
    scale = min(image.size) / made.resize
    left, top = (
        round((size / scale - crop) / 2) * scale
        for size, crop in zip(image.size, (made.width, made.height), strict=True)
    )
    box = (left, top, min(left + made.width * scale, image.width), min(top + made.height * scale, image.height))
    levels = np.asarray(image.resize((made.width, made.height), made.filter, box=box))
    levels = levels.reshape(made.height, made.width, made.channels)
    if made.dtype.kind == "f":
        levels = ((levels.astype(np.float32) - made.mean) / made.std).astype(made.dtype)
    return levels.transpose(2, 0, 1) if made.layout is Layout.NCHW else levels


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "uint8"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", list(Layout))
def test_pixels_are_those_of_pillow_and_the_formula_to_the_bit(dtype: str, channels: int, layout: Layout) -> None:
    generator = np.random.default_rng(3)
    for width, height in ((61, 47), (40, 200), (300, 33), (17, 90)):
        noise = generator.integers(0, 256, (height, width, 3), np.uint8)
        data = file_of(Image.fromarray(noise), "JPEG", quality=90)
        for filter_ in Interpolation:
            shape = ("n", channels, 20, 24) if layout is Layout.NCHW else ("n", 20, 24, channels)
            config = ImagesConfig(
                layout=layout, resize=31, interpolation=filter_, mean=(127.0, 100.5, 3.0)[:channels], std=(58.4,)
            )
            made = make_image_spec("x", np.dtype(dtype), shape, config)
            assert made is not None
            found = decode(data, made, *LIMITS)
            assert found.dtype == made.dtype
            assert found.flags.c_contiguous
            np.testing.assert_array_equal(found, plainly_decoded(data, made))


def crops(**config: Any) -> ImageSpec:
    """A spec for crops that the engine's kernels take."""
    made = make_image_spec("x", np.dtype("float32"), ("n", 3, 40, 40), ImagesConfig(**config))
    assert made is not None
    return made


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_those_of_pillow_to_the_bit(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(np.random.default_rng(4).integers(0, 256, (100, 140, 3), np.uint8))
    data = file_of(noise, "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(data, crops(), *LIMITS), plainly_decoded(data, crops()))


def test_a_photo_of_many_blocks_of_pillows_memory_is_resized_by_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "resize", None)
    wide = Image.fromarray(np.random.default_rng(5).integers(0, 256, (2100, 2200, 3), np.uint8))  # 18 MB of Pillow's
    data = file_of(wide, "JPEG")
    found = decode(data, crops(), 1 << 25, 1 << 25)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, plainly_decoded(data, crops()))


def test_where_the_system_forbids_code_pillow_resizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise DeviceError("no executable memory")

    data = file_of(Image.fromarray(np.random.default_rng(6).integers(0, 256, (100, 140, 3), np.uint8)))
    monkeypatch.setattr(images, "resize", refuse)
    resampling._engine_resize.cache_clear()
    try:
        for _ in range(2):
            np.testing.assert_array_equal(decode(data, crops(), *LIMITS), plainly_decoded(data, crops()))
    finally:
        resampling._engine_resize.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "photos are resized by Pillow, which takes longer: no executable memory"
    ]


def test_scaling_in_the_decoder_is_for_large_jpegs_only() -> None:
    """Waves of 20 pixels of a picture that becomes a sixth as large: both ways see nearly the same."""
    y, x = np.mgrid[:400, :400]
    waves = np.stack([128 + 90 * np.sin((x + turn * y) / 20) for turn in (0, 1, 2)], -1).astype(np.uint8)
    exact, scaled = (crops(std=(1.0,), size=40, dct_scaling=on) for on in (False, True))
    large, small = Image.fromarray(waves), Image.fromarray(waves[:170, :170])
    for data, same in (
        (file_of(large, "JPEG", quality=95), False),
        (file_of(small, "JPEG", quality=95), True),  # less than four times the size it is resized to
        (file_of(large, "PNG"), True),
    ):
        one, other = (decode(data, made, *LIMITS) for made in (exact, scaled))
        assert np.array_equal(one, other) is same
        np.testing.assert_allclose(one, other, atol=6)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain((255, 0, 0, 255), mode="RGBA"), (255, 0, 0)),
        (plain((0, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (plain(100, mode="L"), (100, 100, 100)),
        (plain((100, 255), mode="LA"), (100, 100, 100)),
        (plain((10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 200, 30)),
        (plain(1, mode="1"), (255, 255, 255)),
        (Image.fromarray(np.full((12, 20), 32896, np.uint16)), (128, 128, 128)),
    ],
    ids=["rgba", "transparent", "grey", "grey-alpha", "palette", "bilevel", "16-bit"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    pixels = decode(file_of(image), spec(std=(1.0,)), *LIMITS)
    np.testing.assert_allclose(pixels[:, 4, 4], expected, atol=1)


def test_cmyk_jpeg_becomes_rgb() -> None:
    pixels = decode(file_of(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95), spec(std=(1.0,)), *LIMITS)
    np.testing.assert_allclose(pixels[:, 4, 4], (255, 0, 0), atol=6)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_formats(form: str) -> None:
    pixels = decode(file_of(plain((200, 100, 50)), form), spec(std=(1.0,)), *LIMITS)
    np.testing.assert_allclose(pixels[:, 4, 4], (200, 100, 50), atol=6)


def test_exif_orientation_is_respected() -> None:
    """The left half is red; turned by EXIF 6 (90 degrees clockwise) the top half is."""
    image = plain((0, 0, 255), (40, 40))
    image.paste((255, 0, 0), (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(file_of(image, "JPEG", exif=exif, quality=95), spec(std=(1.0,), resize=8), *LIMITS)
    red, blue = pixels[0], pixels[2]
    assert (red[:3] > 200).all()
    assert (blue[5:] > 200).all()
    assert (red[5:] < 50).all()


def test_broken_exif_does_not_matter() -> None:
    data = file_of(plain((0, 255, 0)), "JPEG", exif=b"Exif\x00\x00garbage")
    assert decode(data, spec(std=(1.0,)), *LIMITS)[1, 4, 4] > 240


def test_one_channel_models_get_grey() -> None:
    made = make_image_spec("x", np.dtype("float32"), ("n", 8, 8, 1), ImagesConfig(std=(1.0,)))
    assert made is not None
    assert decode(file_of(plain((90, 90, 90))), made, *LIMITS).shape == (8, 8, 1)


def test_integer_inputs_get_the_plain_values() -> None:
    pixels = decode(file_of(plain((9, 8, 7))), spec(dtype="uint8"), *LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels[:, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": 9}, "images.size"),
        ({"mean": (1.0, 2.0)}, "images.mean"),
        ({"std": (1.0, 2.0)}, "images.std"),
        ({"resize": 7}, "images.resize"),
    ],
)
def test_a_config_that_contradicts_the_model_names_the_key(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec(**config)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_files_are_refused_or_decoded_never_worse(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    original = bytearray(file_of(plain((1, 2, 3), (30, 30)), form))
    for _ in range(data.draw(st.integers(1, 8))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(original)))
    try:
        pixels = decode(bytes(original[:cut]), spec(), *LIMITS)
    except (InvalidRequest, TooLarge):
        return
    assert pixels.shape == (3, 8, 8)


# ---- over HTTP


def post(server: Running, data: bytes, model: str = "colours", query: str = "", **kwargs: Any) -> Any:
    return server.client.post(f"/v1/models/{model}/images{query}", content=data, **kwargs)


def test_a_picture_gets_labels_most_probable_first(shared: Running) -> None:
    answer = post(shared, file_of(plain((0, 255, 0)))).json()
    assert (answer["model"], answer["version"]) == ("colours", "1")
    (prediction,) = answer["predictions"]
    labels = prediction["labels"]
    assert [(entry["label"], entry["index"]) for entry in labels] == [("green", 1), ("red", 0), ("blue", 2)]
    # (0, 1, 0) is a distribution already, and is left as it is.
    assert labels[0]["probability"] == 1.0


def test_scores_become_probabilities_by_softmax(shared: Running) -> None:
    labels = post(shared, file_of(plain((255, 255, 0)))).json()["predictions"][0]["labels"]
    weights = np.exp([1, 1, 0]) / np.exp([1, 1, 0]).sum()
    np.testing.assert_allclose([entry["probability"] for entry in labels], weights, rtol=1e-5)


def test_top_k_bounds_the_labels(shared: Running) -> None:
    answer = post(shared, file_of(plain("red")), query="?top_k=1").json()
    assert [entry["label"] for entry in answer["predictions"][0]["labels"]] == ["red"]
    assert len(post(shared, file_of(plain("red")), query="?top_k=900").json()["predictions"][0]["labels"]) == 3


def test_ties_for_the_last_label_keep_the_order_of_the_classes() -> None:
    row = np.array([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], np.float32)
    labels = [entry["index"] for entry in top_labels(row, [], 4)]
    assert labels == [1, 3, 0, 2]
    drawn = np.random.default_rng(1).integers(0, 20, 1000).astype(np.float32)
    assert [entry["index"] for entry in top_labels(drawn, [], 60)] == np.argsort(-drawn, kind="stable")[:60].tolist()


@pytest.mark.parametrize("body", [file_of(plain("red")), b"", b"hello"], ids=["picture", "empty", "text"])
@pytest.mark.parametrize("model", ["colours", "encoder", "nobody"])
def test_with_and_without_a_query_the_answer_is_the_same(shared: Running, body: bytes, model: str) -> None:
    """The one goes through FastAPI's routing, the other past it."""
    plain_, routed = post(shared, body, model), post(shared, body, model, "?top_k=5")
    assert plain_.status_code == routed.status_code
    assert plain_.json() == routed.json()
    changing = {"server-timing", "date", "x-request-id"}
    assert {k: v for k, v in plain_.headers.items() if k not in changing} == {
        k: v for k, v in routed.headers.items() if k not in changing
    }


@pytest.mark.parametrize("value", ["0", "-1", "1001", "x", "1.5", ""])
def test_top_k_out_of_range_is_refused(shared: Running, value: str) -> None:
    response = post(shared, file_of(plain("red")), query=f"?top_k={value}")
    assert response.status_code == 400
    assert "top_k" in error_of(response)


def test_raw_answers_with_the_outputs(shared: Running) -> None:
    answer = post(shared, file_of(plain((255, 0, 0))), query="?raw=true").json()
    assert answer["outputs"] == {"logits": [[1.0, 0.0, 0.0]]}


def test_several_pictures_in_one_form_are_answered_in_order(server: Running) -> None:
    colours = ["red", "lime", "blue", "red"]
    files = [("file", (f"{i}.png", file_of(plain(colour)))) for i, colour in enumerate(colours)]
    answer = server.client.post("/v1/models/colours/images", files=files).json()
    first = [prediction["labels"][0]["label"] for prediction in answer["predictions"]]
    assert first == ["red", "green", "blue", "red"]
    assert (("colours", (4, 3, 8, 8))) in server.engine.calls


def test_a_model_of_one_row_gets_pictures_one_by_one(start: Start, tmp_path: Any) -> None:
    add_model(tmp_path, "one", "one_image", version=None)
    server = start(tmp_path)
    files = [("f", ("x.png", file_of(plain(colour)))) for colour in ("blue", "red")]
    answer = server.client.post("/v1/models/one/images?top_k=1", files=files).json()
    assert [p["labels"][0]["index"] for p in answer["predictions"]] == [2, 0]


def test_content_type_does_not_matter_for_a_plain_body(shared: Running) -> None:
    for kind in ("application/json", "text/plain", "image/gif", ""):
        assert post(shared, file_of(plain("red")), headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"hello", 400, "not a JPEG, PNG or WebP"),
        (file_of(plain("red"), "BMP"), 400, "not a JPEG, PNG or WebP"),
        (file_of(plain("red", (200, 200)), "JPEG")[:400], 400, "decoded"),
        (file_of(plain("red", (200, 200)))[:90], 400, "decoded"),
        (huge_png(40_000, 40_000), 413, "40000 x 40000"),
        (huge_png(0, 5), 400, ""),
    ],
    ids=["empty", "text", "bmp", "truncated jpeg", "truncated png", "40,000 px", "no width"],
)
def test_bad_pictures(shared: Running, data: bytes, status: int, words: str) -> None:
    response = post(shared, data)
    assert response.status_code == status
    assert words in error_of(response)
    assert post(shared, file_of(plain("red"))).status_code == 200


def test_limits_are_settings(start: Start, repository: Any) -> None:
    server = start(repository, max_image_bytes=500, max_images=2, max_image_pixels=1000)
    picture = file_of(plain("red"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    assert post(server, picture).status_code == 200
    assert "500" in error_of(post(server, file_of(noise)))
    assert post(server, file_of(plain("red", (101, 10)))).status_code == 413
    assert post(server, file_of(plain("red", (100, 10)))).status_code == 200
    response = server.client.post("/v1/models/colours/images", files=[("f", ("x", picture))] * 3)
    assert response.status_code == 413
    assert "2 images" in error_of(response)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nvalue\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x--\r\n", "multipart/form-data; boundary=x"),
        (b"nothing like a form", "multipart/form-data; boundary=x"),
        (b"--x", "multipart/form-data"),
        (b"--x\r\n\r\n\r\n--x--", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data; boundary=x"),
    ],
)
def test_bad_forms(shared: Running, body: bytes, kind: str) -> None:
    response = post(shared, body, headers={"content-type": kind})
    assert response.status_code == 400
    assert error_of(response)


def test_one_bad_picture_in_a_form_is_an_error_of_the_form(shared: Running) -> None:
    files = [("f", ("a", file_of(plain("red")))), ("f", ("b", b"junk"))]
    assert shared.client.post("/v1/models/colours/images", files=files).status_code == 400


def test_a_model_that_takes_no_pictures_says_so(shared: Running) -> None:
    response = post(shared, file_of(plain("red")), model="encoder")
    assert response.status_code == 400
    assert "sentence-embedding" in error_of(response)


def test_overload_of_the_decoder_is_refused_at_once(start: Start, repository: Any) -> None:
    server = start(repository, FakeEngine(), max_preprocess=2, max_images=8)
    files = [("f", ("a", file_of(plain("red"))))] * 5
    assert server.client.post("/v1/models/colours/images", files=files).status_code == 200
    pool = server.serving.preprocess
    pool._jobs += 2
    response = post(server, file_of(plain("red")))
    pool._jobs -= 2
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_request_of_many_images_leaves_room_for_others_and_ends_at_its_deadline(threads: int) -> None:
    running = most = begun = 0
    lock = threading.Lock()

    def slow() -> None:
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    async def work() -> int:
        pool = PreprocessPool(threads, 256)
        large = asyncio.ensure_future(pool.run([slow] * 64, time.monotonic() + 1.2))  # of 1.6 s at least
        await asyncio.sleep(0.01)
        assert await pool.run([lambda: 7]) == [7]
        assert not large.done(), "the small request waited for the large one"
        with pytest.raises(DeadlineExceeded):
            await large
        before = begun
        assert before < 64
        await asyncio.sleep(0.2)
        assert begun == before, "decoding went on after the deadline"
        pool.close()
        return most

    assert asyncio.run(work()) == min(2, max(1, threads - 1))
