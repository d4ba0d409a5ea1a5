"""The figures of packed caches are made from what the caches hold, once each, and go into a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from benchmarks import kv_cache
from ptql import PackedCache
from tests.benchmarks.pages import assert_filled, in_one
from tests.benchmarks.test_lrquant_benchmark import cells
from tests.models import CONFIGS, random_model, some_ids
from tests.words import save_source, save_text


def test_perplexity_through_a_cache_is_that_of_the_whole_window() -> None:
    model, ids = random_model(CONFIGS["llama"]), some_ids(3, 40)
    found = kv_cache.perplexity(model, lambda m: DynamicCache(config=m.config), ids, 7)
    logits = model(ids).logits.double().log_softmax(-1)
    losses = -logits[:, :-1].gather(2, ids[:, 1:, None])
    assert found["ppl"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found["cache_bytes"] == 2 * 2 * 2 * 40 * 12 * 4  # blocks, keys and values, heads, tokens, channels, float32
    packed = kv_cache.perplexity(model, lambda m: PackedCache(m, 4, 0), ids, 7)
    assert packed["cache_bytes"] == 2 * 2 * 2 * 40 * (6 + 4)
    assert packed["ppl"] != found["ppl"]


def test_rows_are_made_once_and_fill_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = save_source(tmp_path / "model"), save_text(tmp_path / "words.txt")
    results, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    sizes = ["--length", "24", "--windows", "2", "--generate", "6", "--window", "0", "--window", "4"]
    command = ["--model", f"toy={source}", "--text", str(text), "--results", str(results), *sizes]
    assert kv_cache.main(command) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    ours = [row for row in rows if not row["cache"].startswith(kv_cache.QUANTO)]
    assert len(ours) == 1 + 4 * 2 + 3 * 2
    assert {row["window"] for row in ours} == {0, 4}
    assert all(len(row["written"].split()) == 6 for row in ours)
    before = results.read_text()
    assert kv_cache.main(command) == 0
    assert results.read_text() == before
    page.write_text("<!-- begin: kv_cache -->\n<!-- end: kv_cache -->\n")
    assert kv_cache.main(["--results", str(results), "--docs", str(page)]) == 0
    made = cells(page.read_text())
    assert made[2][:3] == ["toy", "not packed", ""]
    assert made[2][4] == "1.000"
    assert len(made) == 2 + len(rows)
    capsys.readouterr()


def test_words_that_two_texts_begin_with() -> None:
    assert kv_cache._shared_start(["a", "b"], ["a", "c"]) == 1
    assert kv_cache._shared_start(["a"], ["a", "c"]) == 1
    assert kv_cache._shared_start([], ["a"]) == 0


def test_the_page_has_what_the_results_say(tmp_path: Path) -> None:
    rows = in_one("kv-cache-*.jsonl", tmp_path)
    assert_filled("docs/transformers.md", tmp_path, lambda copy: kv_cache.main(["--results", rows, "--docs", copy]))


def test_bytes_of_none() -> None:
    assert kv_cache._bytes(None) == 0
    assert kv_cache._bytes(torch.zeros(3, dtype=torch.int16)) == 6
