"""Which prompts are one request in several wordings: duplicates that differ by a few words.

Data sets copy from each other, so leaving a source out is not enough: its requests may stand, slightly
changed, in another one. Two prompts belong together when most of their words are the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from guard.data import Prompt

SAME = 0.7
"""Least share of common words, |a ∩ b| / |a ∪ b|, at which two texts count as one request."""
PLAIN = 4
"""Words from which on what a pair shares is taken for a request, and not for a number or a name."""
_WORD = re.compile(r"\w+")


def requests(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """Group number ``[n]``: prompts that their data set calls a pair, or whose last turns nearly agree.

    What rows of a pair share is a number in some data sets, which means nothing in another; in others it is
    the plain request behind an attack, and then it is compared with the prompts themselves.
    """
    pairs = [f"{p.source}\n{p.pair}" if p.pair is not None else None for p in prompts]
    plain = {
        key: p.pair for key, p in zip(pairs, prompts, strict=True) if key and len(_words(p.pair)) >= PLAIN
    }
    texts = [*(p.text for p in prompts), *(text or "" for text in plain.values())]
    return near_duplicates(texts, pairs=[*pairs, *plain])[: len(prompts)]


def near_duplicates(
    texts: Sequence[str], *, same: float = SAME, pairs: Sequence[str | None] | None = None
) -> NDArray[np.int64]:
    """Group number ``[n]``: texts whose sets of words overlap by ``same`` or more, directly or by a chain.

    Texts with equal ``pairs`` ``[n]`` belong together whatever their words.

    Exact: two such sets share a word among the rarest (1 − ``same``) of each, so that only texts with a rare
    word in common are compared (prefix filtering, Chaudhuri et al. 2006).
    """
    words = [_words(text) for text in texts]
    often = Counter(word for each in words for word in each)
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_of_pair: dict[str, int] = {}
    for index, pair in enumerate(pairs or ()):
        if pair is not None:
            parent[root(index)] = root(first_of_pair.setdefault(pair, index))
    with_word: defaultdict[str, list[int]] = defaultdict(list)
    first_of: dict[frozenset[str], int] = {}
    for index, each in enumerate(words):
        if not each:
            continue
        if each in first_of:
            parent[root(index)] = root(first_of[each])
            continue
        first_of[each] = index
        rarest = sorted(each, key=lambda word: (often[word], word))
        prefix = rarest[: len(each) - math.ceil(same * len(each) - 1e-9) + 1]
        for other in {other for word in prefix for other in with_word[word]}:
            if root(other) != root(index):
                common = len(each & words[other])
                if common >= same * (len(each) + len(words[other]) - common) - 1e-9:
                    parent[root(index)] = root(other)
        for word in prefix:
            with_word[word].append(index)
    roots = [root(index) for index in range(len(texts))]
    _, numbers = np.unique(roots, return_inverse=True)
    return numbers.astype(np.int64)


def _words(text: str | None) -> frozenset[str]:
    return frozenset(_WORD.findall((text or "").casefold()))
