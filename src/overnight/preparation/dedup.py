"""Documents that differ in a few words, found by datatrove's MinHash in three steps.

    near/signatures/bucket_000/00017.minhash.sig   of every document of a unit, and last 00017.signed
    near/pairs/00000_00.dups                       documents that agree in a bucket, and last 00000.paired
    near/clusters/000017.clusters                  (document, cluster) of a unit, if there are any

The signatures of a unit depend on its texts alone, and the clusters on all signatures: not on the workers.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight.preparation.documents import KEPT, Document, kept_mask
from overnight.preparation.executors import Step, divide_workers, import_datatrove, run_step, track
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import PrepareState, read_state, target_units
from overnight.preparation.tokenize import open_unit
from overnight.run_directory import flush_to_disk
from overnight.terminal import progress

BUCKETS = 14
OTHER_OPEN_FILES = 200  # upper bound for this process
NO_CLUSTER = 2**32 - 1


def import_minhash() -> Any:
    """The module minhash. Raises ValueError if datatrove is not installed."""
    return import_datatrove("overnight.preparation.minhash", "near_duplicates=drop")


def compare_units(staging: Path, units: int, config: PrepareConfig) -> None:
    """Find the near-duplicates among all documents of the first `units` units, with a progress bar."""
    signatures = staging / "near" / "signatures"
    with progress("near-duplicates", units, "units") as advance:
        watch = track(advance, lambda: (len(list(signatures.glob("*.signed"))), ""))
        sign = partial(sign_documents, threads=divide_workers(config, units)[1])
        run_step(sign, staging, units, config, watch)
    run_step(pair_documents, staging, BUCKETS, config)
    run_step(cluster_documents, staging, 1, config)


def dedup_steps(jobs: int) -> list[tuple[Step, int]]:
    """The steps of `compare_units`, each with the number of its ranks."""
    return [(sign_documents, jobs), (pair_documents, min(jobs, BUCKETS)), (cluster_documents, 1)]


def sign_documents(staging: Path, rank: int = 0, ranks: int = 1, threads: int = 1) -> None:
    """Write the signatures of every `ranks`-th unit, unless they are there already."""
    state = read_state(staging)
    units = range(rank, target_units(staging), ranks)
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the GIL
        for _ in pool.map(partial(_sign_unit, staging, state), units):
            pass


def _sign_unit(staging: Path, state: PrepareState, number: int) -> None:
    folder = staging / "near" / "signatures"
    done = folder / f"{number:05d}.signed"
    if done.is_file():
        return
    documents, _ = open_unit(state, number)
    empty = Document("", "")  # has no n-grams, hence no signature
    kept = (document if status in KEPT else empty for document, status in documents)
    import_minhash().WordSignature(folder).run(kept, number)
    _flush(folder.glob(f"bucket_*/{number:05d}.*"))
    done.touch()


def pair_documents(staging: Path, rank: int = 0, ranks: int = 1) -> None:
    """Write the pairs of every `ranks`-th bucket, unless they are there already."""
    minhash, near = import_minhash(), staging / "near"
    _allow_open_files(target_units(staging) + OTHER_OPEN_FILES)
    for bucket in range(rank, BUCKETS, ranks):
        done = near / "pairs" / f"{bucket:05d}.paired"
        if not done.is_file():
            folders = str(near / "signatures"), str(near / "pairs")
            minhash.MinhashDedupBuckets(*folders, config=minhash.CONFIG).run(None, bucket, BUCKETS)
            _flush((near / "pairs").glob(f"{bucket:05d}_*"))
            done.touch()


def cluster_documents(staging: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """Write all clusters of near-duplicates, unless they are there already."""
    minhash, near = import_minhash(), staging / "near"
    if (near / "clusters").is_dir():
        return
    partial_folder = near / "clusters.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    with contextlib.redirect_stderr(io.StringIO()):  # datatrove draws a progress bar of its own
        folders = str(near / "pairs"), str(partial_folder)
        minhash.MinhashDedupCluster(*folders, config=minhash.CONFIG, save_cluster_id=True).run(None, 0, 1)
    _flush(partial_folder.iterdir())
    partial_folder.rename(near / "clusters")


def forget_clusters(staging: Path) -> None:
    """Remove pairs and clusters, which are computed again when there are more documents."""
    for folder in (staging / "near" / "clusters", staging / "near" / "pairs", staging / "logs"):
        shutil.rmtree(folder, ignore_errors=True)


def find_near_duplicates(
    staging: Path, status: NDArray[np.uint8], first_documents: list[int]
) -> NDArray[np.bool_]:
    """Which documents are near-duplicates of an earlier one, in any unit.

    `status` is the current status of the documents: the first kept document of a cluster stays kept.
    """
    clusters = np.full(len(status), NO_CLUSTER, dtype=np.uint32)
    for number, first in enumerate(first_documents[:-1]):
        path = staging / "near" / "clusters" / f"{number:06d}.clusters"
        if path.is_file():
            documents, cluster = np.fromfile(path, dtype="<u4").reshape(-1, 2).T
            clusters[first + documents.astype(np.int64)] = cluster
    members = np.flatnonzero(kept_mask(status) & (clusters != NO_CLUSTER))
    is_near = np.zeros(len(status), dtype=bool)
    is_near[members] = True
    is_near[members[np.unique(clusters[members], return_index=True)[1]]] = False  # the first of each cluster
    return is_near


def _flush(paths: Iterable[Path]) -> None:
    """Flush datatrove's files to the disk, before they are marked as complete."""
    for path in paths:
        with path.open("rb") as file:
            flush_to_disk(file.fileno())


def _allow_open_files(wanted: int) -> None:
    """Raise the limit of open files, as far as allowed: datatrove opens a file of every unit at once."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
