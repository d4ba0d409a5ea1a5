"""Test-time adaptation to lm-eval tasks, on a tiny run and questions made of the words w0 to w63."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ptql.callbacks import BlockCallback, TestTimeAdaptation
from transformers import AutoTokenizer

from ptql import evaluate, quantize
from ptql.checkpoint import Checkpoint
from ptql.cli import main
from ptql.errors import InputError
from ptql.evaluation import tasks_under_test
from ptql.evaluation.prompt_text import PromptText
from ptql.evaluation.tasks import read_prompts, run_tasks
from ptql.evaluation.tasks_under_test import TasksUnderTest
from ptql.evaluation.whole import load_whole
from tests.words import save_source, save_text

LENGTH, DOCUMENTS, WORDS = 16, 12, 10  # of each prompt; 16 is not a multiple of 10: windows end inside documents
PREFIX = 2  # windows, 32 tokens: the first four documents have a token in them
CHOICE = """
task: {name}
custom_dataset: !function questions.load
dataset_kwargs: {{file: {file}}}
output_type: multiple_choice
test_split: test
num_fewshot: {shots}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
"""
WORD = """
task: word
custom_dataset: !function questions.load
dataset_kwargs: {file: second.jsonl}
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
WRITTEN = """
task: written
custom_dataset: !function questions.load
dataset_kwargs: {file: second.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["w62"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: rolling
custom_dataset: !function questions.load
dataset_kwargs: {file: first.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GROUP = """
group: both
task: [choice, shots]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
LOAD = """
import json
from pathlib import Path
import datasets

def load(file, **_):
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
"""
Document = dict[str, Any]


def documents(seed: int, count: int = DOCUMENTS) -> list[Document]:
    drawn = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        return " ".join(f"w{k}" for k in torch.randint(4, 62, (number,), generator=drawn).tolist())

    return [{"question": words(WORDS), "choices": [words(2), words(3)], "answer": k % 2} for k in range(count)]


def folder(path: Path, first: Sequence[Document], second: Sequence[Document] = ()) -> Path:
    """Task files over two lists of documents."""
    path.mkdir()
    (path / "questions.py").write_text(LOAD)
    for name, items in (("first", first), ("second", second or documents(2))):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "choice.yaml").write_text(CHOICE.format(name="choice", file="first.jsonl", shots=0))
    (path / "shots.yaml").write_text(CHOICE.format(name="shots", file="first.jsonl", shots=2))
    for name, task in (("word", WORD), ("written", WRITTEN), ("rolling", ROLLING), ("both", GROUP)):
        (path / f"{name}.yaml").write_text(task)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a method that learns, W4A4."""
    base = tmp_path_factory.mktemp("tta")
    source = save_source(base / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token, tokenizer.pad_token = "w62", "w63"  # special ones are found inside of others: not w6
    tokenizer.save_pretrained(source)
    data = {"data.length": 16, "data.samples": 3, "data.batch_size": 1}
    settings = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", **data}
    quantize(source, data=save_text(base / "words.txt"), out=base / "run", settings=settings)
    return base / "run"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    return folder(tmp_path / "tasks", documents(1))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int, int], list[Any]]:
    """What was answered to each request, by task, document and choice, in the order of the runs."""
    from lm_eval.models.huggingface import HFLM

    found: dict[tuple[str, int, int], list[Any]] = {}

    def recorded(method: Any) -> Any:
        def record(self: Any, requests: Any, **options: Any) -> list[Any]:
            answered = method(self, requests, **options)
            for request, answer in zip(requests, answered, strict=True):
                found.setdefault((request.task_name, request.doc_id, request.idx), []).append(answer)
            return answered

        return record

    for method in ("loglikelihood", "generate_until"):
        monkeypatch.setattr(HFLM, method, recorded(getattr(HFLM, method)))
    return found


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, dict[str, torch.Tensor]]]:
    """The weights that blocks of the whole model were given, one after the other."""
    found: list[dict[int, dict[str, torch.Tensor]]] = []
    own = TasksUnderTest.swap

    def record(self: TasksUnderTest, weights: Any) -> Any:
        found.append({index: {name: w.clone() for name, w in block.items()} for index, block in weights.items()})
        return own(self, weights)

    monkeypatch.setattr(TasksUnderTest, "swap", record)
    return found


def adapted(run: Path, tmp_path: Path, tasks_dir: Path, tasks: str, *callbacks: Any, **options: Any) -> dict[str, Any]:
    return evaluate(
        run,
        tasks=tasks,
        include_path=tasks_dir,
        accelerator="cpu",
        callbacks=callbacks,
        out=tmp_path / "found.json",
        **{"length": LENGTH, "batch_size": 1, **options},
    )


def tta(mode: Any, **options: Any) -> TestTimeAdaptation:
    """With rates at which the last block gains on these few windows; else it stays as it was."""
    rate, epochs = (0.001, 20) if mode == "prefix" else (0.003, 4)
    return TestTimeAdaptation(mode, **{"epochs": epochs, "prefix": PREFIX, "lr": rate, "weight_lr": rate, **options})


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    for details in result["task_details"].values():
        assert details.pop("seconds") > 0
    return result


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(w, other[index][name]) for index, block in one.items() for name, w in block.items()
    )


@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_tasks_know_nothing_of_each_other(run: Path, tmp_path: Path, tasks_dir: Path, mode: str) -> None:
    there, back, alone = (
        without_seconds(adapted(run, tmp_path, tasks_dir, tasks, tta(mode))["tta"][mode])
        for tasks in ("choice,word", "word,choice", "word")
    )
    assert there == back
    for part in ("tasks", "tasks_without", "task_details"):
        assert there[part]["word"] == alone[part]["word"]
    assert there["tasks"]["word"] != there["tasks_without"]["word"]


class Watch(BlockCallback):
    """Keeps the whole model's tensors."""

    def on_tasks_measured(self, trainer: Any, tasks: TasksUnderTest, found: dict[str, Any]) -> None:
        self.seen = {name: tensor.clone() for name, tensor in tasks.whole.state_dict().items()}


@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_the_model_is_as_it_was(run: Path, tmp_path: Path, tasks_dir: Path, mode: str, swapped: list[Any]) -> None:
    before, after, kept = Watch(), Watch(), digests(run)
    adapted(run, tmp_path, tasks_dir, "choice,word", before, tta(mode, blocks=2), after)
    assert digests(run) == kept
    assert all(torch.equal(tensor, after.seen[name]) for name, tensor in before.seen.items())
    blocks = {f"model.layers.{index}.{name}" for index, block in swapped[0].items() for name in block}
    assert blocks <= before.seen.keys()
    # one of the blocks, at least: a block whose loss is no better keeps what it was
    learned = [(f"model.layers.{index}.{name}", w) for index, block in swapped[0].items() for name, w in block.items()]
    assert any(not torch.equal(w, before.seen[name]) for name, w in learned)


def digests(directory: Path) -> dict[Path, str]:
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_answers_are_not_learned_from(run: Path, tmp_path: Path, mode: str, swapped: list[Any]) -> None:
    other = [{**document, "answer": 1 - document["answer"]} for document in documents(1)]
    found, weights = [], []
    for name, items in (("right", documents(1)), ("wrong", other)):
        found.append(adapted(run, tmp_path, folder(tmp_path / name, items), "choice", tta(mode))["tta"][mode])
        weights.append(swapped.copy())
        swapped.clear()
    assert all(same(*pair) for pair in zip(*weights, strict=True))
    assert len(weights[0]) >= 2
    assert found[0]["tasks"]["choice"]["acc"] == pytest.approx(1 - found[1]["tasks"]["choice"]["acc"])


def test_prefix_scores_the_others(
    run: Path, tmp_path: Path, tasks_dir: Path, swapped: list[Any], answers: dict[Any, list[Any]]
) -> None:
    result = adapted(run, tmp_path, tasks_dir, "choice", tta("prefix"))["tta"]["prefix"]
    assert without_seconds(result)["task_details"] == {"choice": {"documents": DOCUMENTS - 4, "adapted_on": PREFIX}}
    assert result["settings"]["prefix"] == PREFIX
    (weights, _former), seen = swapped, {key: answers[key] for key in answers if key[1] < DOCUMENTS - 4}
    answers.clear()

    rest, model = folder(tmp_path / "rest", documents(1)[4:]), Checkpoint(run / "model")
    whole, tokenizer = load_whole(model, torch.device("cpu")), AutoTokenizer.from_pretrained(run / "model")
    plain = run_tasks(whole, tokenizer, ["choice"], rest, batch_size=1, max_length=LENGTH)["results"]
    whole.model.layers[1].load_state_dict(weights[1])
    by_hand = run_tasks(whole, tokenizer, ["choice"], rest, batch_size=1, max_length=LENGTH)["results"]
    assert result["tasks_without"] == plain
    assert result["tasks"] == by_hand
    # seen: all documents as usual, these with what was learned, these without; answers: without, with
    assert {key: [own[2], own[1]] for key, own in seen.items()} == answers
    assert all(without != with_ for without, with_ in answers.values())


@pytest.mark.parametrize("task", ["choice", "written"])
def test_online_does_not_look_ahead(
    run: Path, tmp_path: Path, answers: dict[Any, list[Any]], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, last = documents(1), documents(3, DOCUMENTS + 2)[DOCUMENTS - 1 :]
    found = []
    for name, every in (("one", items), ("other", [*items[:-1], *last])):
        # greedy answers are alike soon: a fast rate tells them apart
        path = folder(tmp_path / name, every, every)
        details = adapted(run, tmp_path, path, task, tta("online", lr=1.0))["tta"]["online"]["task_details"][task]
        assert details["documents"] == len(every)
        assert details["adapted_on"] == (len(every) - 1) * WORDS // LENGTH
        found.append(dict(answers))
        answers.clear()
    one, other = found
    early = [key for key in one if key[1] < DOCUMENTS - 1]
    assert [one[key] for key in early] == [other[key] for key in early]
    for (_, document, _), (without, with_) in one.items():
        if document * WORDS < LENGTH:
            assert without == with_
    assert any(without != with_ for without, with_ in one.values())


def test_online_in_larger_batches(run: Path, tmp_path: Path, tasks_dir: Path, answers: dict[Any, list[Any]]) -> None:
    details = adapted(run, tmp_path, tasks_dir, "choice", tta("online", batch_size=3))["tta"]["online"]["task_details"]
    assert details["choice"]["adapted_on"] == 6  # of 110 tokens before the last document, two batches of 48
    changed = {document for (_, document, _), (without, with_) in answers.items() if without != with_}
    assert changed == set(range(5, DOCUMENTS))  # the first that begins after 48 tokens


@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_what_learns_nothing_changes_nothing(
    run: Path, tmp_path: Path, tasks_dir: Path, mode: str, swapped: list[Any]
) -> None:
    found = adapted(run, tmp_path, tasks_dir, "choice,word", tta(mode, lr=1e-30, weight_lr=1e-30), limit=10)
    result = found["tta"][mode]
    assert result["tasks"] == result["tasks_without"]
    assert len(swapped) > 2
    assert all(same(weights, swapped[0]) for weights in swapped)  # those of the whole model, too: they were put back
    if mode != "prefix":
        assert result["tasks"] == found["tasks"]["results"]


def test_a_text_shorter_than_a_window(run: Path, tmp_path: Path, tasks_dir: Path) -> None:
    callbacks = (tta("transductive"), tta("online"))
    found = adapted(run, tmp_path, tasks_dir, "choice", *callbacks, limit=3, length=64)["tta"]
    assert found["transductive"]["task_details"]["choice"]["adapted_on"] == 1
    assert found["online"]["task_details"]["choice"]["adapted_on"] == 0
    assert found["online"]["tasks"] == found["online"]["tasks_without"]


def test_members_of_a_group_are_adapted_to_one_by_one(
    run: Path, tmp_path: Path, tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build  # of lm-eval's own tasks it takes seconds
    own = staticmethod(lambda paths, **more: build([path for path in paths if Path(path) == tasks_dir], **more))
    monkeypatch.setattr(TaskIndex, "build", own)
    group = adapted(run, tmp_path, tasks_dir, "both", tta("prefix"))["tta"]["prefix"]
    alone = adapted(run, tmp_path, tasks_dir, "shots,choice", tta("prefix"))["tta"]["prefix"]
    for part in ("tasks", "tasks_without"):
        mean = (group[part]["choice"]["acc"] + group[part]["shots"]["acc"]) / 2
        assert group[part].pop("both")["acc"] == pytest.approx(mean)
        assert group[part] == alone[part]
    assert without_seconds(group)["task_details"] == without_seconds(alone)["task_details"]


def test_scores_are_in_a_table(run: Path, tmp_path: Path, tasks_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = adapted(run, tmp_path, tasks_dir, "choice", tta("prefix", name="mine"))["tta"]["mine"]
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if " mine " in line)
    scores = [f"{tasks[part]['choice']['acc']:.3f}" for part in ("tasks_without", "tasks")]
    assert row == ["choice", "acc", "mine", str(DOCUMENTS - 4), *scores]


# Prompts


def test_prompts_hold_neither_answers_nor_examples(tasks_dir: Path) -> None:
    questions = [[document["question"]] for document in documents(1)]
    assert read_prompts(["choice", "shots"], tasks_dir) == {"choice": questions, "shots": questions}
    assert read_prompts(["word"], tasks_dir, 5) == {"word": [[item["question"]] for item in documents(2)[:5]]}


@pytest.mark.shared
def test_prompts_that_are_choices(shared_dir: Path) -> None:
    (prompts,) = read_prompts(["winogrande_local"], shared_dir / "data/lm_eval_tasks", 1).values()
    line = json.loads((shared_dir / "data/zeroshot/winogrande.jsonl").read_text().splitlines()[0])
    before = line["sentence"].split("_")[0]
    assert prompts == [[before + line["option1"], before + line["option2"]]]


@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_prompts(run: Path, bos: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.bos_token = "w1"
    text = PromptText.of("any", [["w5 w6 w7"], [], ["w8", "w9"], ["w10 w11"]], tokenizer, 3, bos)
    rows = [[5, 6, 7], [8, 9, 10]] if not bos else [[1, 5, 6], [1, 7, 8], [1, 9, 10]]
    assert text.windows.tolist() == rows
    assert text.starts == [0, 3, 3, 5]
    assert text.stride == 3 - bos
    assert [text.after(k) for k in (0, 1, 2)] == (
        [[0, 1, 2, 3], [1, 2, 3], []] if not bos else [[0, 1, 2, 3], [1, 2, 3], [3]]
    )


def test_prompts_that_are_empty(run: Path) -> None:
    with pytest.raises(InputError, match=r"tta tasks=any: its prompts are empty, .* leave it out"):
        PromptText.of("any", [[], []], AutoTokenizer.from_pretrained(run / "model"), 16, False)


# Refusals: one line, before anything is measured


@pytest.fixture
def refused(
    run: Path, tmp_path: Path, tasks_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    def unmeasured(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(tasks_under_test, "load_whole", unmeasured)

    def line(tasks: str, settings: dict[str, Any], model: Sequence[str] = ("--run", str(run))) -> str:
        config = tmp_path / "tta.yaml"
        callback = {"class_path": "ptql.callbacks.TestTimeAdaptation", "init_args": settings}
        config.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
        given = ("--include_path", str(tasks_dir), "--length", str(LENGTH), "--trainer.accelerator", "cpu")
        capfd.readouterr()
        assert main(["eval", *model, "--tasks", tasks, "-c", str(config), *given]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        return err

    return line


def test_prefix_that_leaves_nothing(refused: Callable[..., str]) -> None:
    err = refused("choice,word", {"mode": "prefix", "prefix": 7})
    assert "tta prefix=7: task 'choice' has 7 windows of 16 tokens and no document would be left" in err
    assert "take a smaller prefix" in err


def test_compat_with_tasks(refused: Callable[..., str]) -> None:
    assert "tta compat=rlq with tasks=choice: the original's code adapts for perplexity only" in refused(
        "choice", {"compat": "rlq"}
    )


def test_tasks_without_prompts(refused: Callable[..., str]) -> None:
    err = refused("choice,rolling", {})
    assert "tasks=rolling: it has no prompts" in err
    assert "--text.NAME FILE" in err


def test_model_that_is_spread(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_under_test, "fits", lambda *_: False)
    err = refused("choice", {})
    assert "tta tasks=choice: adapted blocks are put into the whole model, which does not fit on cpu" in err


def test_model_that_is_no_run(refused: Callable[..., str], run: Path) -> None:
    assert "give --run RUN" in refused("choice", {}, ("--model.source", str(run / "model")))
