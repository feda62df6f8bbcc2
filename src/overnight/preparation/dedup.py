"""Documents that differ in a few words: found by datatrove's MinHash, in three steps of the work.

    near/signatures/bucket_000/00017.minhash.sig   of every document of a unit, and last 00017.signed
    near/pairs/00000_00.dups                       documents that agree in a bucket, and last 00000.paired
    near/clusters/000017.clusters                  (document, cluster) for a unit, where there are any

A unit's signatures depend on its texts alone, and the clusters on all signatures: not on who did the work.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overnight.preparation.documents import KEPT, Document, filter_documents, kept_mask
from overnight.preparation.executors import Step, count_threads, run_step
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.prepare_state import read_state, target_units
from overnight.preparation.sources import read_parts
from overnight.preparation.tokenize import sound_parts
from overnight.run_directory import flush_to_disk
from overnight.terminal import progress

BUCKETS = 14
OPEN_FILES_BESIDES = 200


def require_datatrove() -> None:
    """Raise ValueError if it is not installed. What it says of its work goes to no terminal."""
    try:
        import overnight.preparation.datatrove_steps  # noqa: F401
    except ImportError:
        raise ValueError(
            "near_duplicates=drop needs datatrove, which is not installed: pip install 'overnight[data]'"
        ) from None
    from loguru import logger

    logger.disable("datatrove")


def compare_units(place: Path, config: PrepareConfig) -> None:
    """Find the near-duplicates among all documents of the units that are wanted, with a bar."""
    units = target_units(place)
    sign = partial(sign_documents, threads=count_threads(config, units))
    with progress("near-duplicates", units, "units") as advance:
        shown = 0

        def watch() -> None:
            nonlocal shown
            signed = len(list((place / "near" / "signatures").glob("*.signed")))
            advance(signed - shown)
            shown = signed

        run_step(sign, place, units, config, watch)
    run_step(pair_documents, place, BUCKETS, config)
    run_step(cluster_documents, place, 1, config)


def comparing_steps(jobs: int) -> list[tuple[Step, int]]:
    """The steps that `compare_units` runs, each with its number of ranks."""
    return [(sign_documents, jobs), (pair_documents, min(jobs, BUCKETS)), (cluster_documents, 1)]


def sign_documents(place: Path, rank: int = 0, ranks: int = 1, threads: int = 1) -> None:
    """The signatures of every `ranks`-th unit's documents; nothing for a unit that has them already."""
    require_datatrove()
    with ThreadPoolExecutor(threads) as pool:  # numpy lets other threads work
        for _ in pool.map(partial(_sign_unit, place), range(rank, target_units(place), ranks)):
            pass


def _sign_unit(place: Path, number: int) -> None:
    from overnight.preparation.datatrove_steps import WordSignature

    work, folder = read_state(place), place / "near" / "signatures"
    done = folder / f"{number:05d}.signed"
    if done.is_file():
        return
    parts, _ = sound_parts(work.units[number], work)
    judged = filter_documents(read_parts(parts, work.text_column), work.on_bad_text)
    unsigned = Document("", "")  # has no runs of words
    WordSignature(folder).run((document if fate in KEPT else unsigned for document, fate in judged), number)
    _flush(folder.glob(f"bucket_*/{number:05d}.*"))
    done.touch()


def pair_documents(place: Path, rank: int = 0, ranks: int = 1) -> None:
    """The pairs of every `ranks`-th bucket; nothing for a bucket that has them already."""
    require_datatrove()
    from overnight.preparation.datatrove_steps import build_buckets

    near = place / "near"
    _allow_open_files(place)
    for bucket in range(rank, BUCKETS, ranks):
        done = near / "pairs" / f"{bucket:05d}.paired"
        if not done.is_file():
            build_buckets(near / "signatures", near / "pairs").run(None, bucket, BUCKETS)
            _flush((near / "pairs").glob(f"{bucket:05d}_*"))
            done.touch()


def cluster_documents(place: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """All clusters of near-duplicates; nothing if they are there already."""
    require_datatrove()
    from overnight.preparation.datatrove_steps import build_clusters

    near = place / "near"
    if (near / "clusters").is_dir():
        return
    partial_folder = near / "clusters.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
        build_clusters(near / "pairs", partial_folder).run(None, 0, 1)
    _flush(partial_folder.iterdir())
    partial_folder.rename(near / "clusters")


def forget_clusters(place: Path) -> None:
    """Before more units are wanted: pairs and clusters are to be found anew then, among more documents."""
    for folder in (place / "near" / "clusters", place / "near" / "pairs", place / "logs"):
        shutil.rmtree(folder, ignore_errors=True)


def find_near_duplicates(place: Path, fates: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.bool_]]:
    """For each unit which of its documents are near to one before, in it or in an earlier unit.

    `fates` are those of the documents so far: the first of a cluster that is to be kept stays.
    """
    found = [np.zeros(len(group), dtype=bool) for group in fates]
    pairs = [_clustered(place, number, group) for number, group in enumerate(fates)]
    clusters = np.concatenate([pair[:, 1] for pair in pairs])
    is_near = np.ones(clusters.size, dtype=bool)
    is_near[np.unique(clusters, return_index=True)[1]] = False
    ends = np.cumsum([len(pair) for pair in pairs])[:-1]
    for group, pair, near in zip(found, pairs, np.split(is_near, ends), strict=True):
        group[pair[near, 0]] = True
    return found


def _clustered(place: Path, number: int, fates: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(documents, 2): a unit's documents that are to be kept and belong to a cluster, and that cluster."""
    path = place / "near" / "clusters" / f"{number:06d}.clusters"
    if not path.is_file():
        return np.zeros((0, 2), dtype=np.uint32)
    pairs = np.fromfile(path, dtype="<u4").reshape(-1, 2)
    clustered: NDArray[np.uint32] = pairs[kept_mask(fates)[pairs[:, 0]]]
    return clustered


def _flush(paths: Iterable[Path]) -> None:
    """Have what datatrove wrote on the disk before it is marked as done."""
    for path in paths:
        with path.open("rb") as file:
            flush_to_disk(file.fileno())


def _allow_open_files(place: Path) -> None:
    """Datatrove opens a file of every unit at once: allow as many as the system lets a process have."""
    import resource

    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = target_units(place) + OPEN_FILES_BESIDES
    if allowed != resource.RLIM_INFINITY and wanted > allowed:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
