"""Models as their exporters write them, the files of tests/fixtures: which attentions are recognised, whether the model
runs on packed tokens, and how far its numbers are from PyTorch's and ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ExportCase:
    """A file by its name without the suffix, and the number of attentions that its model has."""

    name: str
    attentions: int = 2
    suite: ClassVar[str] = "exports"


_ATTENTIONS: Mapping[str, int] = {"modernbert": 3, "swin": 3}
_FILES = """
    bert_legacy bert_dynamo
    bert-eager-legacy-11 bert-eager-legacy-13 bert-sdpa-legacy-14 bert-eager-legacy-17
    bert-eager-dynamo-18 bert-sdpa-dynamo-18 bert-eager-dynamo-23 bert-sdpa-dynamo-23
    bert_segments-sdpa-legacy-14 bert_segments-sdpa-legacy-18 bert_segments-sdpa-optimum-18
    bert_sentence-sdpa-legacy-14 bert_sentence-sdpa-dynamo-18 bert_sentence-sdpa-optimum-14
    bert_classifier-sdpa-legacy-14 bert_classifier-sdpa-optimum-14 bert_tagger-sdpa-legacy-14
    bert_segments-eager-legacy-13-ort bert_segments-sdpa-legacy-14-ort
    bert_segments-eager-legacy-17-ort_raw_mask bert_segments-eager-legacy-17-ort_heads
    bert-eager-legacy-17-ort_fast_gelu bert-eager-legacy-17-ort_level_2
    distilbert_legacy distilbert_dynamo
    distilbert-eager-legacy-14 distilbert-sdpa-optimum-14 distilbert-eager-legacy-14-ort
    roberta_legacy roberta_dynamo roberta-eager-legacy-13 roberta-eager-legacy-13-ort xlm_roberta-sdpa-dynamo-23
    albert-sdpa-legacy-14 albert-eager-dynamo-18 electra-eager-legacy-13 electra-sdpa-dynamo-18
    torch_encoder-eager-dynamo-18
    gpt2_legacy gpt2_dynamo gpt2-eager-legacy-13 gpt2-sdpa-dynamo-23 gpt2-eager-legacy-13-ort
    llama-eager-legacy-17 llama-sdpa-dynamo-18 llama-sdpa-dynamo-23
    clip_text-eager-legacy-14 clip_text-sdpa-dynamo-18 clip_text_pooled-sdpa-legacy-14 clip_text-eager-legacy-14-ort
    t5_encoder-eager-legacy-13 t5_encoder-eager-dynamo-18 mpnet-eager-legacy-14 mpnet-eager-dynamo-18
    modernbert-sdpa-legacy-17 modernbert-sdpa-dynamo-18 deberta-eager-legacy-17
    vit_legacy vit_dynamo vit-eager-legacy-11 vit-sdpa-dynamo-23 vit-eager-legacy-17-ort deit-sdpa-legacy-14
    clip_vision-sdpa-dynamo-18 swin-eager-legacy-17 swin-eager-dynamo-18
"""
CASES = tuple(ExportCase(name, _ATTENTIONS.get(name.partition("-")[0], 2)) for name in _FILES.split())
