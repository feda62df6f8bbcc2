"""Datatrove's MinHash with our own words. Imports datatrove.

FineWeb's measure: 112 hashes of the runs of 5 words, in 14 buckets of 8; documents of which a bucket agrees
are near-duplicates, and what is near to one of a cluster belongs to it. Of two documents that share 80% of
their runs, 92% are found; of two that share half of them, 5%.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from overnight.preparation.executors import Step
from overnight.preparation.ngrams import Hashes, hash_windows, hash_words

MERSENNE_PRIME = np.uint64((1 << 61) - 1)
ROWS_AT_ONCE = 512  # runs of words whose hashes are worked out together: they fit a processor's cache


class WordSignature(MinhashDedupSignature):  # type: ignore[misc]  # untyped there
    """The first stage, with words that need no library of languages. `run` writes a unit's signatures."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), build_config(), language=WhitespaceTokenizer())  # which is not asked

    def get_shingles(self, text: str) -> Hashes:
        """(runs, 1): every run of words as a number; none for a text of fewer words."""
        return hash_windows(hash_words([text]), self.config.n_grams)[0].reshape(-1, 1)

    def get_signature(self, shingles: Hashes) -> list[list[int]]:
        """For each bucket its hashes: the numbers of the class above, in flat memory, four times as fast."""
        factors, summands = (parameters.T.copy() for parameters in self.parameters)
        least = np.full(self.num_hashes, MERSENNE_PRIME, dtype=np.uint64)
        for row in range(0, len(shingles), ROWS_AT_ONCE):
            hashes = factors * shingles[row : row + ROWS_AT_ONCE].T + summands
            # 2^61 divided by the prime leaves 1: this is the remainder, or the remainder and the prime.
            hashes = (hashes & MERSENNE_PRIME) + (hashes >> np.uint64(61))
            np.minimum(hashes, hashes - MERSENNE_PRIME, out=hashes)
            least = np.minimum(least, hashes.min(axis=1))
        signature: list[list[int]] = least.reshape(self.config.num_buckets, -1).tolist()
        return signature


def build_buckets(signatures: Path, pairs: Path) -> Any:
    """The second stage: pairs of documents that agree in a bucket."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=build_config())


def build_clusters(pairs: Path, clusters: Path) -> Any:
    """The third stage: clusters of all documents that pairs lead to."""
    return MinhashDedupCluster(str(pairs), str(clusters), config=build_config(), save_cluster_id=True)


def build_config() -> MinhashConfig:
    """FineWeb's numbers; the named hash is not used, and is one that needs no further package."""
    return MinhashConfig(
        n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64, hash_fc="sha1")
    )


# ---------------------------------------------------------------- a step of the work as a step of datatrove's pipelines


class WorkStep(PipelineStep):  # type: ignore[misc]  # untyped there
    """Does a rank's share. Pickled by reference: its machine has the same package."""

    type, name = "overnight", "share"

    def __init__(self, step: Step, place: Path) -> None:
        super().__init__()
        self.step, self.place = step, str(place)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Nothing is read from the step before, and nothing handed on: all is in the folder."""
        self.step(Path(self.place), rank, world_size)
        yield from data or ()
