"""What could make the stream's benchmark lie: whether both sides draw the same kind of batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from overnight.data.loader import TokenStream
from overnight.data.shards import HEADER_BYTES


def test_both_sides_draw_batches_of_one_kind(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    stream = benchmarks["stream"]
    shelf = stream.write_shards(tmp_path / "small", 5000, shard_tokens=5000, empty=False)
    written = np.fromfile(tmp_path / "small" / "train-00000.bin", dtype="<u2", offset=HEADER_BYTES)
    ours = TokenStream(shelf, tokens_per_row=64).batch(0, 12)
    theirs = stream.draw_as_nanogpt(tmp_path / "small" / "train-00000.bin", 12, 64)
    for ids, targets in ((ours.ids, ours.targets), theirs):
        assert ids.shape == targets.shape == (12, 64)
        assert ids.dtype == targets.dtype == torch.int64
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        text = written.tobytes()
        for row in ids.numpy().astype("<u2")[:, :32]:  # a row of ours may go round the end
            assert row.tobytes() in text + text


def test_an_empty_text_takes_no_place(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    shelf = benchmarks["stream"].write_shards(tmp_path / "large", 10**9, shard_tokens=10**8, empty=True)
    files = list((tmp_path / "large").iterdir())
    assert len(files) == len(shelf.manifest.train) == 10
    assert sum(file.stat().st_blocks * 512 for file in files) < 1_000_000
    assert TokenStream(shelf, tokens_per_row=1024).tokens == 10**9


def test_the_report_compares_all_sides(benchmarks: dict[str, Any]) -> None:
    stream = benchmarks["stream"]
    words = ["--small", "3000", "--large", "100000", "--context", "16", "--batches", "2", "--repeats", "2"]
    report = stream.measure(stream.read_options(words))
    assert [len(each) for each in report.measured["milliseconds"].values()] == [2, 2, 2, 2]
    assert report.rows[0][5] == "1.0"
