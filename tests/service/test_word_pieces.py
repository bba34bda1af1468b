"""Short ASCII texts get the very ids that the tokenizers library gives them, or are left to it."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from service.codecs.word_pieces import WordPieces

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "an", "man", "is", "eat", "##ing", "##s", "##a", "7", "1953", "Don", "don", "t", *string.punctuation)
VOCABULARY = {piece: id for id, piece in enumerate((*SPECIAL, *WORDS, "x" * 12))}
MAX_LENGTH = 24


def bert(lowercase: bool = True, template: str = "[CLS] $A [SEP]", added: tuple[str, ...] = ()) -> Any:
    """A tokenizer of BERT's kind, as `TokenCodec` sets one up."""
    made = tokenizers.Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]", max_input_chars_per_word=10))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")]
    )
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens(list(added))
    made.enable_truncation(MAX_LENGTH)
    return made


def word_pieces(tokenizer: Any) -> WordPieces:
    found = WordPieces.of(tokenizer, MAX_LENGTH)
    assert found is not None
    return found


TOKENIZERS = {
    "uncased": bert(),
    "cased": bert(lowercase=False),
    "without special tokens": bert(template="$A"),
    "nothing before": bert(template="$A [SEP] [SEP]"),
}
MADE = {name: word_pieces(tokenizer) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.lists(
    st.one_of(st.sampled_from((*WORDS, *SPECIAL, "EATING", "mans", "x" * 10, "x" * 12)), st.text(max_size=6)),
    max_size=40,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(parts=TEXTS, between=st.sampled_from((" ", "", "-", "\n", "\t ", "\r\n")))
def test_ids_are_the_librarys(name: str, parts: list[str], between: str) -> None:
    text = between.join(parts)
    found = MADE[name].encode(text)
    assert found is None or found == TOKENIZERS[name].encode_batch_fast([text])[0].ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_printable_ascii_is_not_left_to_the_library(name: str) -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(string.ascii_letters + string.digits + " .,-'!?\n\t", k=draw.randint(0, 120)))
        assert MADE[name].encode(text) == TOKENIZERS[name].encode_batch_fast([text])[0].ids


@pytest.mark.parametrize(
    "text", ["a\x00man", "a\x0bman", "a\x1fman", "a\x7fman", "caf\u00e9", "a\u00a0man", "\u7537", "a " * 1001]
)
def test_other_characters_and_long_texts_are_left_to_the_library(text: str) -> None:
    assert MADE["uncased"].encode(text) is None


def test_texts_with_added_tokens_are_left_to_the_library() -> None:
    made = word_pieces(bert(added=("Eat Man",)))
    for text in ("a [SEP] man", "a [sep] man", "eat man", "EAT MAN"):
        assert made.encode(text) is None
    assert made.encode("eat a man") is not None


def test_tokenizers_of_another_kind_are_left_to_the_library() -> None:
    bare = bert()
    bare.normalizer = normalizers.Lowercase()
    split = bert()
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = bert()
    letters.model = models.BPE()
    twice, crowded = bert(template="$A [SEP] $A"), bert(added=tuple(f"<{i}>" for i in range(65)))
    for other in (bare, split, letters, twice, crowded):
        assert WordPieces.of(other, MAX_LENGTH) is None


def test_no_room_beside_the_special_tokens_is_left_to_the_library() -> None:
    short = bert()
    short.enable_truncation(2)
    assert WordPieces.of(short, 2) is None
