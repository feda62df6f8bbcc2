"""Tensors written in pieces, cut anywhere, and read back."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from overnight.training.checkpoint.format import TensorFiles, write_tensors
from overnight.training.state import TensorShard

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


def draw_tensors(shapes: list[list[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}


def cut(tensors: dict[str, torch.Tensor], draw: st.DataObject, files: int) -> list[dict[str, TensorShard]]:
    """Each tensor cut anywhere, at most once for each file, and the pieces dealt out."""
    dealt: list[dict[str, TensorShard]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        cuts = draw.draw(st.sets(st.integers(1, len(tensor)), max_size=files - 1))
        ends = sorted({*cuts, len(tensor)})
        owners = draw.draw(st.permutations(range(files)))
        for owner, (first, end) in zip(owners, itertools.pairwise([0, *ends]), strict=False):
            dealt[owner][name] = TensorShard(tensor[first:end], first)
    return dealt


def write_all(folder: Path, dealt: list[dict[str, TensorShard]]) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(dealt))]
    for path, pieces in zip(paths, dealt, strict=True):
        write_tensors(path, pieces)
    return paths


@settings(max_examples=100)
@given(SHAPES, st.integers(1, 4), st.data())
def test_pieces_are_read_back_whole_and_by_rows(shapes, files, draw):
    """Rows beyond the last are zero, as in the shards of the padded embedding."""
    tensors = draw_tensors(shapes)
    with tempfile.TemporaryDirectory() as folder:
        found = TensorFiles(write_all(Path(folder), cut(tensors, draw, files)))
        assert found.shapes == {name: tensor.shape for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            padded = torch.cat([tensor, torch.zeros(4, *tensor.shape[1:])])
            start = draw.draw(st.integers(0, len(tensor)))
            end = draw.draw(st.integers(start, len(padded)))
            for first, last in ((0, len(tensor)), (start, end)):
                rows = torch.full((last - first, *tensor.shape[1:]), float("nan"))
                found.read(name, rows, first)
                assert torch.equal(rows, padded[first:last])


@settings(max_examples=30)
@given(st.integers(2, 9), st.data())
def test_missing_rows_are_detected(rows, draw):
    """Any piece but the last: only the model that reads a tensor knows its length."""
    tensor = torch.arange(rows * 2.0).view(rows, 2)
    end = draw.draw(st.integers(1, rows - 1))
    pieces = [{"t": TensorShard(tensor[:end], 0)}, {"t": TensorShard(tensor[end:], end)}]
    with tempfile.TemporaryDirectory() as folder:
        first, last = write_all(Path(folder), pieces)
        with pytest.raises(ValueError, match="rows of t are missing"):
            _ = TensorFiles([last]).shapes
        assert TensorFiles([first]).shapes == {"t": torch.Size([end, 2])}
        with pytest.raises(ValueError, match="rows of t are missing"):
            _ = TensorFiles([first, last, last]).shapes


def test_file_of_whole_tensors_has_no_metadata(tmp_path):
    tensors = draw_tensors([[3, 2], [4]])
    write_tensors(tmp_path / "a", {name: TensorShard(tensor, 0) for name, tensor in tensors.items()})
    assert b"first_rows" not in (tmp_path / "a").read_bytes()
    assert all(torch.equal(load_file(tmp_path / "a")[name], tensor) for name, tensor in tensors.items())


def test_view_is_written_without_its_base(tmp_path):
    """Rows of a larger tensor, and a transposed one."""
    large = torch.arange(200_000.0).view(100, 2000)
    write_tensors(
        tmp_path / "a", {"rows": TensorShard(large[3:5], 3), "turned": TensorShard(large[:2, :3].t(), 0)}
    )
    assert (tmp_path / "a").stat().st_size < 20_000
    stored = load_file(tmp_path / "a")
    assert torch.equal(stored["rows"], large[3:5])
    assert torch.equal(stored["turned"], large[:2, :3].t())
