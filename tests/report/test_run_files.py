from __future__ import annotations

import json
import math

import pytest
import torch

from ptql.report.run_files import read_run, section
from tests.report.synthetic import NAMES, SITES, make_run, peaks


def test_a_run_is_read(tmp_path):
    run = read_run(make_run(tmp_path / "run", blocks=11))
    assert run.troubles == []
    assert [block.index for block in run.blocks] == list(range(11))  # "10" is after "2"
    assert run.series("steps") == [640.0] * 11
    assert run.layer_names == list(NAMES)
    found = run.ranges(run.blocks[3])
    assert list(found) == list(SITES)
    before, after = found["mlp.gate_proj"]
    assert torch.equal(before, peaks(3, 2, 256, False))
    assert torch.equal(after, peaks(3, 2, 256, True))


def test_an_empty_directory_is_a_run_about_which_nothing_is_known(tmp_path):
    run = read_run(tmp_path)
    assert (run.blocks, run.metrics, run.config_text) == ([], {}, "")
    assert [line.partition(" ")[0] for line in run.troubles] == ["metrics.json", "config.yaml", "manifest.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"a: &a [*a, *b]", b"[" * 100_000])
def test_damaged_files_are_said_and_left_out(tmp_path, content):
    (tmp_path / "ledger").mkdir()
    for name in ("metrics.json", "config.yaml", "ledger/manifest.json"):
        (tmp_path / name).write_bytes(content)
    run = read_run(tmp_path)
    assert (run.blocks, run.metrics, run.config) == ([], {}, {})
    assert len(run.troubles) == 3


def test_odd_entries_of_the_manifest_are_passed_over(tmp_path):
    (tmp_path / "ledger").mkdir()
    blocks = {"0": {"loss": "nan", "layers": [1]}, "x": {}, "1": 3, "2": {"file": "../../etc/passwd", "loss": []}}
    (tmp_path / "ledger" / "manifest.json").write_text(json.dumps({"blocks": blocks, "identity": 5}))
    run = read_run(tmp_path)
    assert [block.index for block in run.blocks] == [0, 2]
    assert all(math.isnan(value) for value in run.series("loss"))
    assert run.blocks[0].layers == {}
    assert [run.ranges(block) for block in run.blocks] == [{}, {}]


def test_a_block_file_that_is_damaged_has_no_ranges(tmp_path):
    run = read_run(make_run(tmp_path / "run", blocks=2))
    (tmp_path / "run" / "ledger" / "block-00001.safetensors").write_bytes(b"no tensors")
    assert run.ranges(run.blocks[1]) == {}
    assert len(run.ranges(run.blocks[0])) == 4


def test_sections():
    assert section({"a": {"b": {"c": 1}}}, "a", "b") == {"c": 1}
    assert section({"a": 3}, "a", "b") == {}
    assert section(None, "a") == {}
