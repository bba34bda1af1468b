"""Texts and token ids: `POST /v1/models/{model}/tokens`, and `/v1/embeddings` with the unmodified OpenAI client."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.codecs.classify import probabilities
from service.codecs.tokens import TokenCodec, pool
from service.model_config import Pooling, TokensConfig
from service.workers.messages import TensorInfo
from tests.service.conftest import Running, Start, add_model, add_tokenizer, error_of
from tests.service.fakes import HIDDEN, KINDS, VOCABULARY, FakeEngine


def post(server: Running, body: Any, model: str = "encoder", query: str = "") -> Any:
    return server.client.post(f"/v1/models/{model}/tokens{query}", json=body)


def expected_vector(ids: list[int], kind: str = "encoder") -> np.ndarray:
    """The mean of the model's token vectors, normalised, in float64."""
    row = np.array([ids], np.int64)
    hidden = KINDS[kind][2]({"input_ids": row, "attention_mask": np.ones_like(row)})["last_hidden_state"]
    mean = hidden.astype(np.float64)[0].mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_ids_of_different_lengths_each_get_their_own_vector(shared: Running) -> None:
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 0]]
    answer = post(shared, {"ids": rows}).json()
    assert answer["usage"] == {"tokens": 13}
    for row, vector in zip(rows, answer["embeddings"], strict=True):
        np.testing.assert_allclose(vector, expected_vector(row), rtol=1e-5, atol=1e-6)


def test_text_is_tokenized_as_the_model_wants(shared: Running) -> None:
    answer = post(shared, {"text": ["a man is eating", "unheard words"]}).json()
    np.testing.assert_allclose(answer["embeddings"][0], expected_vector([2, 4, 5, 6, 7, 3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer["embeddings"][1], expected_vector([2, 1, 1, 3]), rtol=1e-5, atol=1e-6)
    assert answer["usage"] == {"tokens": 10}
    assert post(shared, {"text": "a man is eating"}).json()["embeddings"] == [answer["embeddings"][0]]


def test_long_text_is_cut_at_max_length(shared: Running) -> None:
    long = post(shared, {"text": ["a man " * 1000]}).json()
    assert long["usage"] == {"tokens": 16}


def test_ids_over_max_length_are_refused_not_cut(shared: Running) -> None:
    assert post(shared, {"ids": [[1] * 16]}).status_code == 200
    response = post(shared, {"ids": [[1] * 17]})
    assert response.status_code == 400
    assert "17 tokens" in error_of(response)


def test_raw_gives_per_token_outputs_of_each_row(shared: Running) -> None:
    outputs = post(shared, {"ids": [[1, 2, 3], [4]]}, query="?raw=true").json()["outputs"]["last_hidden_state"]
    assert [np.shape(row) for row in outputs] == [(3, HIDDEN), (1, HIDDEN)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=16), min_size=1, max_size=8))
def test_any_rows_give_what_each_gives_alone(shared: Running, rows: list[list[int]]) -> None:
    together = post(shared, {"ids": rows}).json()["embeddings"]
    for row, vector in zip(rows, together, strict=True):
        np.testing.assert_allclose(vector, expected_vector(row), rtol=1e-4, atol=1e-5)


BAD_BODIES: list[tuple[Any, str]] = [
    ({}, "send either"),
    ({"ids": [[1]], "text": ["a"]}, "send either"),
    ({"idz": [[1]]}, "idz"),
    ([], "object"),
    (3, "object"),
    ({"ids": []}, "empty"),
    ({"ids": [[]]}, "ids[0] is empty"),
    ({"ids": [1, 2]}, "ids[0] is 1; send a list of token ids"),
    ({"ids": "1 2"}, "'ids' is the string '1 2'"),
    ({"ids": None}, "'ids' is null"),
    ({"ids": [[1, 2.5]]}, "ids[0][1] is 2.5; token ids are integers from 0 to 2147483647"),
    ({"ids": [[1, 2.0]]}, "ids[0][1] is 2.0; token ids are integers"),
    ({"ids": [[1, "2"]]}, "ids[0][1] is the string '2'"),
    ({"ids": [[1], [[2]]]}, "ids[1][0] is a list"),
    ({"ids": [[True]]}, "ids[0][0] is true"),
    ({"ids": [[None]]}, "ids[0][0] is null"),
    ({"ids": [[1, -7]]}, "ids[0][1] is -7; token ids are integers from 0 to 2147483647"),
    ({"ids": [[1, 10**18]]}, f"ids[0][1] is {10**18}; token ids"),
    ({"ids": [[1, 1e23]]}, "ids[0][1] is 1e+23; token ids"),
    ({"ids": [[1, 2], [1, 13]]}, "token id 13 at position 1 of row 1 is out of range; the vocabulary has 13 tokens"),
    ({"ids": [[1 << 40]]}, str(1 << 40)),
    ({"ids": [[1e30]]}, "ids[0][0]"),
    ({"text": []}, "empty"),
    ({"text": [""]}, "text[0] is empty"),
    ({"text": ""}, "text[0] is empty"),
    ({"text": [3]}, "text[0] is 3; send a string"),
    ({"text": {"a": 1}}, "'text' is an object"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=[str(body)[:40] for body, _ in BAD_BODIES])
def test_bad_bodies(shared: Running, body: Any, words: str) -> None:
    response = post(shared, body)
    assert response.status_code == 400
    assert words in error_of(response)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"ids": [[NaN]]}',
        b'{"ids": [[Infinity]]}',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"ids": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a":' * 100_000,
        b'{"text": ["\\ud800"]}',
    ],
    ids=["empty", "cut", "nan", "infinity", "bytes", "bomb", "deep", "deep objects", "lone surrogate"],
)
def test_bad_json(shared: Running, body: bytes) -> None:
    response = shared.client.post("/v1/models/encoder/tokens", content=body)
    assert response.status_code == 400
    assert error_of(response)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "9" * 5000, "1" * 400 + "e9"]
)
def test_numbers_that_json_does_not_have_are_named_where_they_are(shared: Running, value: str) -> None:
    response = shared.client.post("/v1/models/encoder/tokens", content=f'{{"ids": [[1, 2], [3, {value}]]}}')
    said = value if len(value) <= 40 else f"{value[:40]}…"
    assert response.status_code == 400
    assert error_of(response) == f"ids[1][1] is {said}; token ids are integers from 0 to 2147483647"
    response = shared.client.post("/v1/embeddings", content=f'{{"model": "encoder", "input": [[1], [{value}]]}}')
    assert response.status_code == 400
    assert error_of(response) == f"input[1][0] is {said}; token ids are integers from 0 to 2147483647"
    response = shared.client.post("/v1/models/encoder/tokens", content=f'{{"text": ["a", {value}]}}')
    assert f"text[1] is {said}; send a string" in error_of(response)
    response = shared.client.post("/v1/embeddings", content=f'{{"model": "encoder", "input": "a", "user": {value}}}')
    assert response.status_code == 400
    assert "neither NaN nor infinity" in error_of(response)


def test_ten_megabytes_of_text_are_too_large(shared: Running) -> None:
    response = post(shared, {"text": ["man " * 2_500_000]})
    assert response.status_code == 413
    assert "1048576 bytes" in error_of(response)


def test_too_many_entries_are_too_large(start: Start, repository: Path) -> None:
    server = start(repository, max_inputs=3)
    assert post(server, {"ids": [[1]] * 3}).status_code == 200
    assert post(server, {"ids": [[1]] * 4}).status_code == 413
    assert post(server, {"text": ["a"] * 4}).status_code == 413


def test_an_id_that_only_the_engine_refuses_is_the_clients_error(start: Start, tmp_path: Path) -> None:
    """Without a tokenizer the service does not know the vocabulary; the engine names the id."""
    add_model(tmp_path, "m", "encoder")
    server = start(tmp_path)
    response = post(server, {"ids": [[1, VOCABULARY]]}, model="m")
    assert response.status_code == 400
    assert str(VOCABULARY) in error_of(response)
    response = post(server, {"text": ["a"]}, model="m")
    assert response.status_code == 400
    assert "tokenizer.json" in error_of(response)


def test_tasks_shape_the_answer(start: Start, tmp_path: Path) -> None:
    (add_model(tmp_path, "sentiment", "text_classes") / "labels.txt").write_text("bad\ngood\n")
    (add_model(tmp_path, "entities", "token_classes") / "labels.txt").write_text("O\nNAME\n")
    add_model(tmp_path, "plain", "encoder", 'task = "tensors"')
    server = start(tmp_path)
    answer = post(server, {"ids": [[1, 2], [3]]}, model="sentiment").json()
    assert np.shape(answer["logits"]) == (2, 2)
    for prediction, logits in zip(answer["predictions"], answer["logits"], strict=True):
        labels = prediction["labels"]
        assert labels[0]["label"] == ("bad", "good")[int(np.argmax(logits))]
        assert sum(entry["probability"] for entry in labels) == pytest.approx(1, abs=1e-6)
    answer = post(server, {"ids": [[1, 2], [3]]}, model="entities").json()
    assert [len(row["tokens"]) for row in answer["predictions"]] == [2, 1]
    assert {token["label"] for row in answer["predictions"] for token in row["tokens"]} <= {"O", "NAME"}
    answer = post(server, {"ids": [[1, 2], [3]]}, model="plain").json()
    assert [np.shape(row) for row in answer["outputs"]["last_hidden_state"]] == [(2, HIDDEN), (1, HIDDEN)]


def test_a_model_with_strings_says_what_it_takes_instead(start: Start, repository: Path) -> None:
    add_model(repository, "words", "strings")
    add_tokenizer(add_model(repository, "meant", "strings"))
    server = start(repository)
    response = post(server, {"text": ["a"]}, model="words")
    assert response.status_code == 400
    assert error_of(response) == (
        "model 'words' takes no tokens: input 'input' is strings [n, 2], but tokens are numbers [batch, sequence]; "
        "POST its tensors to /v2/models/words/infer"
    )
    tensor = {"name": "input", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "ü"]}
    answer = server.client.post("/v2/models/words/infer", json={"inputs": [tensor]}).json()
    assert answer["outputs"][0]["data"] == ["a", "ü"]
    response = server.client.get("/v2/models/meant/ready")
    assert response.status_code == 503
    assert "tokenizer.json says that this is a model for tokens, but input 'input' is strings" in error_of(response)


@pytest.mark.parametrize("kind", ["maskless", "one_row", "unmasked"])
def test_models_that_cannot_be_padded_still_get_ragged_rows_right(start: Start, tmp_path: Path, kind: str) -> None:
    add_model(tmp_path, "m", kind, 'task = "sentence-embedding"', version=None)
    server = start(tmp_path)
    rows = [[1, 2, 3, 4], [5], [6, 7]]
    vectors = post(server, {"ids": rows}, model="m").json()["embeddings"]
    for row, vector in zip(rows, vectors, strict=True):
        np.testing.assert_allclose(vector, expected_vector(row, kind), rtol=1e-5, atol=1e-6)


def test_padding_never_reaches_past_a_models_positions(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "m", "short")
    server = start(tmp_path)
    row = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    vectors = post(server, {"ids": [row, row[:3]]}, model="m").json()["embeddings"]
    np.testing.assert_allclose(vectors[0], expected_vector(row), rtol=1e-5, atol=1e-6)
    response = post(server, {"ids": [row + row]}, model="m")
    assert response.status_code == 400
    assert "positions end" in error_of(response)


def test_a_model_that_takes_no_tokens_says_so(shared: Running) -> None:
    for model in ("colours", "identity"):
        response = post(shared, {"ids": [[1]]}, model=model)
        assert response.status_code == 400
        assert "takes no tokens" in error_of(response)


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
@pytest.mark.parametrize("width", [5, "sequence"])
@pytest.mark.parametrize("rows", [[[7, 8, 9]], [[7, 8, 9], [4]], [[1, 2, 3, 4, 5]]], ids=str)
def test_every_role_gets_its_values(dtype: str, width: int | str, rows: list[list[int]]) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    specs = [TensorInfo(name, np.dtype(dtype), ("batch", width)) for name in names]
    batch = TokenCodec(specs, TokensConfig(), None).batch(rows)
    longest = width if isinstance(width, int) else max(map(len, rows))
    zeros = [[0] * (longest - len(row)) for row in rows]
    found = {name: handle.view() for name, handle in batch.inputs}
    assert {array.dtype for array in found.values()} == {np.dtype(dtype)}
    assert {name: array.tolist() for name, array in found.items()} == {
        "input_ids": [row + rest for row, rest in zip(rows, zeros, strict=True)],
        "attention_mask": [[1] * len(row) + rest for row, rest in zip(rows, zeros, strict=True)],
        "token_type_ids": [[0] * longest for _ in rows],
        "position_ids": [[*range(len(row)), *rest] for row, rest in zip(rows, zeros, strict=True)],
    }
    assert batch.lengths == tuple(map(len, rows))


def test_pooling() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    np.testing.assert_allclose(pool(vectors, (2, 3), Pooling.MEAN, False), [[1, 2], [8, 9]])
    np.testing.assert_allclose(pool(vectors, (3, 3), Pooling.MEAN, False), [[2, 3], [8, 9]])
    np.testing.assert_allclose(pool(vectors, (1, 2), Pooling.MEAN, False), [[0, 1], [7, 8]])  # padded to a fixed length
    np.testing.assert_allclose(pool(vectors, (2, 3), Pooling.CLS, False), [[0, 1], [6, 7]])
    lengths = np.linalg.norm(pool(vectors, (2, 3), Pooling.MEAN, True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    zero = pool(np.zeros((1, 2), np.float32), (2,), Pooling.NONE, True)
    np.testing.assert_array_equal(zero, [[0, 0]])


# ---- the OpenAI shape


@pytest.fixture
def client(shared: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ("a man", [[2, 4, 5, 3]]),
        (["a man", "food"], [[2, 4, 5, 3], [2, 8, 3]]),
        ([4, 5], [[4, 5]]),
        ([[4, 5], [6]], [[4, 5], [6]]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_openai_client_gets_embeddings(
    client: openai.OpenAI, value: Any, rows: list[list[int]], encoding: Any
) -> None:
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="encoder", input=value, **options)
    assert (answer.object, answer.model) == ("list", "encoder")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, rows))
    assert [entry.index for entry in answer.data] == list(range(len(rows)))
    for row, entry in zip(rows, answer.data, strict=True):
        vector: Any = entry.embedding
        if isinstance(vector, str):
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        np.testing.assert_allclose(vector, expected_vector(row), rtol=1e-5, atol=1e-6)


def test_the_openai_client_reads_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'") as missing:
        client.embeddings.create(model="nobody", input="a")
    assert (missing.value.type, missing.value.code) == ("invalid_request_error", "not_found")
    with pytest.raises(openai.BadRequestError, match="input\\[0\\] is empty"):
        client.embeddings.create(model="encoder", input="")
    with pytest.raises(openai.NotFoundError, match="nothing at /v1/chat/completions"):
        client.chat.completions.create(model="encoder", messages=[])


def test_the_openai_client_reads_that_a_model_is_not_ready(start: Start, repository: Path) -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    server = start(repository, engine, ready=False)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError, match="is not ready") as refused:
        client.embeddings.create(model="encoder", input="a")
    assert (refused.value.type, refused.value.code) == ("server_error", "unavailable")
    engine.load_gate.set()


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["colours", "encoder", "identity"]


def test_the_openai_client_retrieves_a_model(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert client.models.retrieve("encoder") == listed["encoder"]
    assert (listed["encoder"].object, listed["encoder"].owned_by) == ("model", "tilewave")
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'") as missing:
        client.models.retrieve("nobody")
    assert (missing.value.type, missing.value.code) == ("invalid_request_error", "not_found")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "'model'"),
        ({"model": 3}, "'model'"),
        ({"model": "colours"}, "takes no tokens"),
        ({"input": None}, "'input' is null"),
        ({"input": []}, "empty"),
        ({"input": [[]]}, "input[0] is empty"),
        ({"input": [1, "a"]}, "input[0][1] is the string 'a'"),
        ({"input": ["a", 1]}, "input[1] is 1"),
        ({"input": [1.5]}, "input[0][0] is 1.5"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": {}}, "encoding_format"),
        ({"dimensions": 2}, "'dimensions'"),
    ],
)
def test_bad_embedding_requests(shared: Running, changes: dict[str, Any], words: str) -> None:
    body = {"model": "encoder", "input": "a", **changes}
    response = shared.client.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert words in error_of(response)


def test_dimensions_may_name_what_the_model_has(shared: Running) -> None:
    body = {"model": "encoder", "input": "a", "dimensions": HIDDEN}
    assert shared.client.post("/v1/embeddings", json=body).status_code == 200


def test_a_tokenizer_that_cannot_be_read_makes_only_its_model_unavailable(start: Start, repository: Path) -> None:
    (repository / "encoder" / "tokenizer.json").write_text('{"model": 3}')
    add_tokenizer(add_model(repository, "other", "encoder"))
    server = start(repository)
    response = post(server, {"text": ["a"]})
    assert response.status_code == 503
    assert "tokenizer.json" in error_of(response)
    assert post(server, {"text": ["a"]}, model="other").status_code == 200


# ---- masks, and numbers that are none


def masked(mask: list[int], model: str = "encoder") -> dict[str, Any]:
    shape = [1, len(mask)]
    ids = {"name": "input_ids", "datatype": "INT64", "shape": shape, "data": [1] * len(mask)}
    return {"inputs": [ids, {"name": "attention_mask", "datatype": "INT64", "shape": shape, "data": mask}]}


@pytest.mark.parametrize(("mask", "place"), [([-5, 7], "[0, 0] is -5"), ([1, 0, 2], "[0, 2] is 2")])
def test_a_mask_of_other_than_ones_and_zeros_is_named(shared: Running, mask: list[int], place: str) -> None:
    response = shared.client.post("/v2/models/encoder/infer", json=masked(mask))
    assert response.status_code == 400
    wanted = f"input 'attention_mask': the element at {place}; this mask has 1 for each token and 0 for padding"
    assert error_of(response) == wanted
    assert shared.client.post("/v2/models/encoder/infer", json=masked([1, 0])).status_code == 200


def test_a_model_of_bare_tensors_takes_any_mask(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "encoder", "encoder", 'task = "tensors"')
    server = start(tmp_path)
    assert server.client.post("/v2/models/encoder/infer", json=masked([-5, 7])).status_code == 200


@pytest.mark.parametrize("kind", ["encoder", "text_classes", "token_classes"])
@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_no_result_is_made_of_what_is_no_number(start: Start, tmp_path: Path, kind: str, value: str) -> None:
    add_model(tmp_path, "m", kind, answers=float(value))
    server = start(tmp_path)
    response = server.client.post("/v1/models/m/tokens", json={"ids": [[1, 2]]})
    assert response.status_code == 500
    assert "model 'm' answered with NaN or infinity in output" in error_of(response)
    raw = server.client.post("/v1/models/m/tokens?raw=true", json={"ids": [[1, 2]]})
    assert raw.status_code == 200 and "null" in raw.text and value not in raw.text
    if kind == "encoder":
        response = server.client.post("/v1/embeddings", json={"model": "m", "input": [1, 2]})
        assert response.status_code == 500 and "NaN or infinity" in error_of(response)


def test_a_score_of_minus_infinity_is_a_probability_of_zero() -> None:
    assert probabilities(np.array([[0.0, -np.inf]], np.float32)).tolist() == [[1.0, 0.0]]
