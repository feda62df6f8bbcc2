"""Documents that equal an earlier one, and documents that differ from one in a few words (MinHash).

Near-duplicates are found as in FineWeb, with datatrove's random numbers: 112 hashes of the 5-grams of words,
in 14 buckets of 8. Documents that agree in a bucket are near-duplicates, and so is every document of a
cluster. Of two documents that share 80% of their 5-grams, 92% are found; of two that share half of them, 5%.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from overnight.preparation.documents import Records, kept_mask
from overnight.preparation.ngrams import WORD_FACTOR, Hashes, Indices, hash_windows, hash_words

HASHES_AT_ONCE = 16_000_000  # compared to find duplicates: about a gigabyte with the memory for sorting
NGRAM_WORDS = 5
BUCKETS = 14
HASHES_PER_BUCKET = 8
NO_SIGNATURE = np.uint64(0)
NGRAMS_AT_ONCE = 512  # whose hashes are computed together: they fit a processor's cache

MERSENNE_PRIME = np.uint64((1 << 61) - 1)
_random = np.random.RandomState(1)
FACTORS = _random.randint(1, MERSENNE_PRIME, dtype=np.uint64, size=(BUCKETS * HASHES_PER_BUCKET, 1))
SUMMANDS = _random.randint(0, MERSENNE_PRIME, dtype=np.uint64, size=(BUCKETS * HASHES_PER_BUCKET, 1))
BUCKET_FACTORS = np.array([pow(WORD_FACTOR, n, 2**64) for n in range(HASHES_PER_BUCKET)], dtype=np.uint64)


def find_duplicates(records: Records) -> NDArray[np.bool_]:
    """Which documents equal an earlier one; only kept documents count.

    Sorts one range of hashes at a time, so that memory does not limit the number of documents.
    """
    is_duplicate = np.zeros(len(records), dtype=bool)
    is_kept, high, low = kept_mask(records["status"]), records["hash_high"], records["hash_low"]
    ranges = -(-max(1, len(records)) // HASHES_AT_ONCE)
    edges = [2**64 * number // ranges for number in range(ranges + 1)]
    for begin, end in itertools.pairwise(edges):
        chosen = np.flatnonzero(is_kept & (high >= np.uint64(begin)) & (high <= np.uint64(end - 1)))
        order = chosen[np.lexsort((low[chosen], high[chosen]))]  # stable: equal documents stay in their order
        equal = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        is_duplicate[order[1:][equal]] = True
    return is_duplicate


def sign_texts(texts: Sequence[str]) -> Hashes:
    """(BUCKETS, texts): a hash of each bucket of each text; NO_SIGNATURE for a text of fewer than 5 words."""
    ngrams, text_indices = hash_windows(hash_words(texts), NGRAM_WORDS)
    bounds = np.searchsorted(text_indices, np.arange(len(texts) + 1))
    signatures = np.full((BUCKETS, len(texts)), NO_SIGNATURE)
    for number in np.unique(text_indices):
        signatures[:, number] = min_hashes(ngrams[bounds[number] : bounds[number + 1]]) @ BUCKET_FACTORS
    return signatures


def min_hashes(ngrams: Hashes) -> Hashes:
    """(BUCKETS, HASHES_PER_BUCKET): the least value of each of the hash functions over all n-grams."""
    least = np.full(FACTORS.size, MERSENNE_PRIME)
    for begin in range(0, ngrams.size, NGRAMS_AT_ONCE):
        hashes = FACTORS * ngrams[begin : begin + NGRAMS_AT_ONCE] + SUMMANDS
        # 2^61 modulo the prime is 1: this is the remainder, or the remainder plus the prime.
        hashes = (hashes & MERSENNE_PRIME) + (hashes >> np.uint64(61))
        np.minimum(hashes, hashes - MERSENNE_PRIME, out=hashes)
        least = np.minimum(least, hashes.min(axis=1))
    return least.reshape(BUCKETS, HASHES_PER_BUCKET)


def find_near_duplicates(buckets: Iterable[Hashes], status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which documents are near-duplicates of an earlier one.

    `buckets` are the rows of the documents' signatures; `status` is the current status of the documents: the
    first kept document of a cluster stays kept.
    """
    first = np.arange(len(status))  # of the documents in each document's cluster
    for bucket in buckets:
        _join_clusters(first, bucket)
    is_near = kept_mask(status)
    kept = np.flatnonzero(is_near)
    is_near[kept[np.unique(first[kept], return_index=True)[1]]] = False  # the first of each cluster
    return is_near


def _join_clusters(first: Indices, bucket: Hashes) -> None:
    """Join the clusters, each named by its first document, of all documents that agree in a bucket."""
    order = np.argsort(bucket, kind="stable")
    agree = np.flatnonzero((bucket[order[1:]] == bucket[order[:-1]]) & (bucket[order[1:]] != NO_SIGNATURE))
    one, other = order[agree], order[agree + 1]
    while (apart := first[one] != first[other]).any():
        one, other = one[apart], other[apart]
        clusters = first[one], first[other]
        for cluster in clusters:
            np.minimum.at(first, cluster, np.minimum(*clusters))
        while (first[first] != first).any():
            first[:] = first[first]
