import io
import json
import math

import pytest
from rich.console import Console

from ptql.errors import InputError
from ptql.evaluation.results import merge_metrics, print_results, results_table

METRICS = {
    "ppl": {"wikitext2-test": 20.966, "[bold]c4": 284321.5, "diverged": "inf"},
    "tasks": {
        "lm_eval_version": "0.4.13",
        "limit": None,
        "results": {
            "piqa_local": {
                "acc": 0.65,
                "acc_stderr": 0.048,
                "acc_norm": 0.69,
                "acc_norm_stderr": 0.046,
                "n": 100,
            },
            "lambada_openai_local": {
                "perplexity": 62.0,
                "perplexity_stderr": 13.5,
                "acc": 0.3,
                "acc_stderr": 0.046,
                "n": 100,
            },
            "a_task_whose_name_is_so_long_that_it_would_not_leave_room_for_its_scores": {
                "acc": 0.25,
                "acc_stderr": 0.01,
                "exact_match,strict-match": 0.125,
                "exact_match_stderr,strict-match": 0.011,
                "n": 1319,
            },
        },
    },
    "bits_per_weight": 4.125,
    "bits_per_weight_with_embeddings": 4.61,
    "size_bytes": 72_300_000,
}


def printed(metrics, **kwargs) -> str:
    console = Console(file=io.StringIO(), width=80, **kwargs)
    print_results(metrics, console)
    return console.file.getvalue()


def line_with(text: str, part: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if part in line]
    return line.split()


def test_merge_is_deep_and_is_what_the_file_holds(tmp_path):
    path = tmp_path / "new/metrics.json"
    merge_metrics(path, {"ppl": {"wikitext2": 6.1}, "size_bytes": 10})
    merged = merge_metrics(path, {"ppl": {"c4": 9.5}, "size_bytes": 12, "tasks": {"results": {"piqa": {"acc": 0.5}}}})
    assert merged == {
        "ppl": {"wikitext2": 6.1, "c4": 9.5},
        "size_bytes": 12,
        "tasks": {"results": {"piqa": {"acc": 0.5}}},
    }
    assert json.loads(path.read_text()) == merged
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_merge_of_unlike_values_takes_the_new_one(tmp_path):
    path = tmp_path / "metrics.json"
    merge_metrics(path, {"ppl": 3.0, "size_bytes": {"weights": 1}})
    assert merge_metrics(path, {"ppl": {"c4": 9.5}, "size_bytes": 2}) == {
        "ppl": {"c4": 9.5},
        "size_bytes": 2,
    }


def test_floats_that_json_has_not(tmp_path):
    path = tmp_path / "metrics.json"
    merge_metrics(path, {"ppl": {"a": math.inf, "b": -math.inf}, "losses": [math.nan, 1.0]})
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"ppl": {"a": "inf", "b": "-inf"}, "losses": ["nan", 1.0]}


@pytest.mark.parametrize("content", [b'{"ppl": ', b"\xff\xfe", b"[1, 2]"])
def test_damaged_file_is_named_and_kept(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.json: .*move it away"):
        merge_metrics(path, {"size_bytes": 1})
    assert path.read_bytes() == content


def test_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(InputError, match="not a readable JSON file"):
        merge_metrics(tmp_path, {"size_bytes": 1})


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    merge_metrics(path, {"size_bytes": 1})
    with pytest.raises(TypeError):
        merge_metrics(path, {"size_bytes": object()})
    assert json.loads(path.read_text()) == {"size_bytes": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_printed_results():
    text = printed(METRICS)
    assert line_with(text, "wikitext2-test") == ["wikitext2-test", "20.97"]
    assert line_with(text, "[bold]c4") == ["[bold]c4", "2.84e+05"]
    assert line_with(text, "diverged") == ["diverged", "inf"]
    assert line_with(text, "piqa_local") == ["piqa_local", "100", "0.650", "(0.048)", "0.690", "(0.046)"]
    accuracy, perplexity = [line.split() for line in text.splitlines() if "lambada" in line]
    assert accuracy == ["lambada_openai_local", "100", "0.300", "(0.046)"]
    assert perplexity == ["lambada_openai_local", "100", "perplexity", "62.000", "(13.500)"]
    assert line_with(text, "exact_match")[1:] == ["1319", "exact_match,strict-match", "0.125", "(0.011)"]
    assert "4.125 bits per weight, 4.610 with embeddings, 72.3 MB" in text


def test_printed_results_fit_a_pipe():
    text = printed(METRICS)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "…" not in text  # nothing is cut


def test_printed_results_without_tasks():
    assert line_with(printed({"ppl": {"c4": 9.5}}), "c4") == ["c4", "9.50"]
    assert printed({}) == ""


def test_table_columns_are_the_keys_of_all_rows():
    table = results_table([{"text": "a", "before": "1"}, {"text": "b", "after": "2"}])
    assert [column.header for column in table.columns] == ["text", "before", "after"]
    assert [list(column.cells) for column in table.columns][2][0].plain == ""
