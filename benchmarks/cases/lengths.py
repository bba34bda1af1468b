"""Lengths in tokens of a real corpus, for batches whose rows differ: lengths.json, which this program writes.

The corpus is Lee's background corpus (Lee, Pincombe & Welsh 2005), 300 news stories of the Australian Broadcasting
Corporation, a story a line, as the pip package gensim ships it (4.4.0: gensim/test/test_data/lee_background.cor).
Tokens are word pieces of BERT's uncased vocabulary (that of all-minilm-l6-v2), with [CLS] and [SEP]. ``pairs``: two
sentences of a story that follow each other, together, as BERT was trained on, of each story the first and second, the
third and fourth and so on; a sentence ends at `.`, `!` or `?` before a space. ``stories``: whole stories. Of both, what
is longer than a model takes is cut off there: `Corpus.batch`.

    python -m benchmarks.cases.lengths lee_background.cor models/all-minilm-l6-v2/tokenizer.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("lengths.json")
CORPUS_OF: Mapping[int, str] = {128: "pairs", 512: "stories"}
"""What the rows are, by the width of the batch: the mean is 0.46 and 0.47 of it."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Corpus:
    """Lengths in tokens, from the shortest to the longest."""

    lengths: tuple[int, ...]

    def batch(self, rows: int, most: int) -> np.ndarray:
        """int64 [rows]: the distribution in so many lengths, none above `most`, from the shortest to the longest. Of
        the sorted corpus cut into `rows` equal parts, the last of each: the longest of all is among them."""
        last = -(-np.arange(1, rows + 1) * len(self.lengths) // rows) - 1
        return np.minimum(np.array(self.lengths, np.int64)[last], most)


def corpora() -> dict[str, Corpus]:
    """Those of lengths.json: ``pairs`` and ``stories``."""
    return {name: Corpus(tuple(lengths)) for name, lengths in json.loads(FILE.read_text(encoding="utf-8")).items()}


def counted(stories: Sequence[str], tokenizer: Path) -> dict[str, Corpus]:
    """The corpora of some stories. `tokenizer`: a file of the tokenizers library."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_truncation()
    encoder.no_padding()
    found: dict[str, list[int]] = {"pairs": [], "stories": []}
    for story in stories:
        sentences = _SENTENCE_END.split(story.strip())
        found["stories"].append(len(encoder.encode(story).ids))
        found["pairs"] += [
            len(encoder.encode(*pair).ids) for pair in zip(sentences[::2], sentences[1::2], strict=False)
        ]
    return {name: Corpus(tuple(sorted(lengths))) for name, lengths in found.items()}


def main(corpus: str, tokenizer: str) -> None:
    """Write lengths.json."""
    stories = [line for line in Path(corpus).read_text(encoding="utf-8").splitlines() if line.strip()]
    found = {name: list(one.lengths) for name, one in counted(stories, Path(tokenizer)).items()}
    FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
