import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptql.errors import InputError
from ptql.evaluation.tasks import check_tasks, run_tasks

TASK = """
task: colours_local
tag: colours
custom_dataset: !function questions.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["red", "green"]
doc_to_target: 0
"""
GROUP = "group: colours_and_piqa\ntask: [colours_local, piqa]\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection was tried: {args[-1]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def task_dir(tmp_path):
    (tmp_path / "colours_local.yaml").write_text(TASK)
    (tmp_path / "group.yaml").write_text(GROUP)
    (tmp_path / "questions.py").write_text("def load(**kwargs):\n    open('/no/such/questions.jsonl')\n")
    return tmp_path


@pytest.fixture
def indexed(monkeypatch, task_dir):
    """The folders of each index that is built; lm-eval's own, which takes seconds, is passed over."""
    from lm_eval.tasks._index import TaskIndex

    build, folders = TaskIndex.build, []

    def record(paths, **kwargs):
        folders.append([Path(path).name for path in paths])
        return build([path for path in paths if Path(path) == task_dir], **kwargs)

    monkeypatch.setattr(TaskIndex, "build", staticmethod(record))
    return folders


@pytest.fixture
def stories(stories_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(stories_dir)


def test_names_of_the_folder_need_no_other_index(task_dir, indexed):
    check_tasks(["colours_local", "colours"], task_dir)
    assert indexed == [[task_dir.name]]


def test_group_may_name_tasks_of_lm_eval(task_dir, indexed):
    check_tasks(["colours_and_piqa"], task_dir)
    assert indexed == [[task_dir.name], ["tasks", task_dir.name]]


def test_unknown_name(task_dir, indexed):
    with pytest.raises(InputError, match=r"^tasks=colors_locl,zzz: .*\(near: colours_local") as caught:
        check_tasks(["colours_local", "colors_locl", "zzz"], task_dir)
    assert "--include_path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"include_path=.*nowhere: not a folder"):
        check_tasks(["piqa"], tmp_path / "nowhere")


def test_names_of_lm_eval():
    check_tasks(["piqa", "mmlu"], None)
    with pytest.raises(InputError, match=r"tasks=arc_esy: .*near: arc_easy"):
        check_tasks(["piqa", "arc_esy"], None)


def test_import_is_light():
    code = "import sys, ptql.evaluation.tasks; sys.exit('lm_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.shared
def test_scores_agree_with_a_plain_loop(stories, shared_dir, capsys):
    model, tokenizer = stories
    state = torch.get_rng_state()  # not Python's own: the type checker of the tests draws from that
    report = run_tasks(model, tokenizer, ["piqa_local", "arc_easy_local"], shared_dir / "data/lm_eval_tasks", limit=8)

    assert json.loads(json.dumps(report)) == report
    assert report["limit"] == 8
    assert set(report["results"]) == {"piqa_local", "arc_easy_local"}
    for scores in report["results"].values():
        assert set(scores) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
        assert scores["n"] == 8
        assert scores["acc_stderr"] == pytest.approx((scores["acc"] * (1 - scores["acc"]) / 7) ** 0.5)

    acc, acc_norm = piqa_by_hand(model, tokenizer, shared_dir / "data/zeroshot/piqa.jsonl", 8)
    assert report["results"]["piqa_local"]["acc"] == acc
    assert report["results"]["piqa_local"]["acc_norm"] == acc_norm

    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert "DISABLE_MULTIPROC" not in os.environ
    assert logging.getLogger("lm_eval").level != logging.ERROR


def piqa_by_hand(model, tokenizer, path: Path, limit: int) -> tuple[float, float]:
    """acc and acc_norm of the first questions: the likeliest answer wins, or the likeliest per character."""
    model = model.double()
    right = right_norm = 0
    for line in path.read_text().splitlines()[:limit]:
        question = json.loads(line)
        prompt = f"Question: {question['goal']}\nAnswer:"
        start = len(tokenizer(prompt).input_ids)
        totals, per_character = [], []
        for answer in (question["sol1"], question["sol2"]):
            tokens = tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(tokens).logits[0]
            total = 0.0
            for position in range(start, tokens.shape[1]):
                total += float(logits[position - 1].log_softmax(-1)[tokens[0, position]])
            totals.append(total)
            per_character.append(total / len(answer))
        right += totals.index(max(totals)) == question["label"]
        right_norm += per_character.index(max(per_character)) == question["label"]
    return right / limit, right_norm / limit


@pytest.mark.shared
def test_perplexity_has_a_standard_error(stories, shared_dir, capsys):
    tasks_dir = shared_dir / "data/lm_eval_tasks"
    scores = run_tasks(*stories, ["lambada_openai_local"], tasks_dir, limit=4)["results"]["lambada_openai_local"]
    assert set(scores) == {"acc", "acc_stderr", "perplexity", "perplexity_stderr", "n"}
    assert scores["perplexity_stderr"] > 0
    assert capsys.readouterr().out == ""


@pytest.mark.shared
def test_head_of_its_own_is_not_tied_again(stories, shared_dir):
    model, tokenizer = stories
    assert model.config.tie_word_embeddings
    head = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.weight = head
    scores = run_tasks(model, tokenizer, ["arc_easy_local"], shared_dir / "data/lm_eval_tasks", limit=1)
    assert model.lm_head.weight is head
    assert "tie_weights" not in vars(model)
    assert "acc_stderr" not in scores["results"]["arc_easy_local"]  # one question has none


@pytest.mark.shared
def test_questions_that_cannot_be_read(stories, task_dir):
    with pytest.raises(InputError, match=r"^tasks=colours_local: .*questions\.jsonl.*--include_path"):
        run_tasks(*stories, ["colours_local"], task_dir)


@pytest.mark.shared
def test_only_the_first_process_of_a_host_gets_scores(stories, shared_dir, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    report = run_tasks(*stories, ["arc_easy_local"], shared_dir / "data/lm_eval_tasks", limit=1)
    assert report["results"] == {}
