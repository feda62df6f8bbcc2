"""Tasks: published files become questions and texts, which are encoded and scored; results are cached."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overnight.distributed.world import World
from overnight.evaluation import tasks
from overnight.evaluation.choice_tasks import CHOICE_TASKS, Question, encode_question, read_questions
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.scores import Numbers, TaskResult
from overnight.evaluation.tasks import TASKS, cache_key, evaluate_cached, open_task
from overnight.evaluation.text_tasks import TEXT_TASKS, join_treebank, join_wikitext
from overnight.files import cache_path
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.bpe import BytePair

ROWS = {**TEXT_TASKS, **CHOICE_TASKS}
TOKENIZER = BytePair([])
ARTICLE = " \n = Title = \n \n It was <unk> , he said . \n"
ANSWERS = ("ice", "the sun", "the moon", "snow")
SCIENCE = {
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": text, "label": label} for text, label in zip(ANSWERS, "ABCD", strict=True)],
    },
    "answerKey": "B",
}
ANIMALS = ["crow", "dog", "king", "cat", "rat", "owl", "bee", "fly", "ant", "elk"]
STORY = "".join(f"{number} Sentence {number} .\n" for number in range(1, 21))
STORY += "21 `` The XXXXX , '' said he .\tking\t\t" + "|".join(ANIMALS) + "\n"
JOINED_STORY = " ".join(f"Sentence {number}." for number in range(1, 21)) + ' "The'
HELLASWAG = {"ctx": "A man sits. he", "endings": ["runs.", "eats.", "is a roof.", "sleeps."], "label": 3}
WITH_HINTS = {
    "activity_label": "Sitting",
    "ctx": "[header] A man sits. he",
    "endings": ["runs [substeps] away.", "eats.", "is [title] a roof.", "sleeps."],
    "label": "3",
}
GAP = {"sentence": "Ann paid Eve since _ was rich.", "option1": "Ann", "option2": "Eve", "answer": "1"}
COPA = {"premise": "He fell.", "question": "cause", "choice1": "It froze.", "choice2": "He sang.", "label": 0}
ARC = "Question: What is hot?\nAnswer:"
JAR = {"goal": "Open a jar", "sol1": "turn it", "sol2": "eat it", "label": 0}
SNOW = {"passage": "Snow is cold.", "question": "is snow cold", "label": True}

# Record, context, endings without their first space, answer.
RECORDS: dict[str, tuple[dict[str, Any] | str, str, list[str] | tuple[str, ...], int]] = {
    "hellaswag": (HELLASWAG, "A man sits. he", ["runs.", "eats.", "is a roof.", "sleeps."], 3),
    "hellaswag-lm-eval": (
        WITH_HINTS,
        "Sitting: A man sits. he",
        ["runs away.", "eats.", "is. a roof.", "sleeps."],
        3,
    ),
    "arc-easy": (SCIENCE, ARC, ANSWERS, 1),
    "arc-challenge": ({**SCIENCE, "answerKey": "D"}, ARC, ANSWERS, 3),
    "openbookqa": (SCIENCE, "What is hot?", ANSWERS, 1),
    "piqa": (JAR, "Question: Open a jar\nAnswer:", ["turn it", "eat it"], 0),
    "boolq": (SNOW, "Snow is cold.\nQuestion: is snow cold?\nAnswer:", ["no", "yes"], 1),
    "copa": (COPA, "He fell because", ["it froze.", "he sang."], 0),
    "winogrande": (GAP, "Ann paid Eve since", ["was rich.", "was rich."], 0),
    "cbt-common-nouns": (STORY, JOINED_STORY, [f'{word}," said he.' for word in ANIMALS], 2),
    "cbt-named-entities": (STORY, JOINED_STORY, [f'{word}," said he.' for word in ANIMALS], 2),
    "lambada": ({"text": 'He saw "the\n\nold dog.'}, 'He saw "the\n\nold', ["dog."], 0),
    "lambada-plain": ("he saw `` the old dog", "he saw `` the old", ["dog"], 0),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """The file of a task."""
    path = folder / ROWS[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_record_becomes_question(name: str, mark: str, tmp_path: Path) -> None:
    record, context, endings, answer = RECORDS[name]
    text = record if isinstance(record, str) else json.dumps(record)
    first, second = read_questions(CHOICE_TASKS[name], write(tmp_path, name, f"{mark}{text}\n{text}\n"))
    assert first == second
    assert first[:3] == (context, tuple(f" {ending}" for ending in endings), answer)
    assert first.leads == ((" Ann", " Eve") if name == "winogrande" else ())


def test_question_is_encoded_in_parts() -> None:
    choice = encode_question(CHOICE_TASKS["copa"].read(COPA), TOKENIZER, 2048)
    assert isinstance(choice, Choice)
    assert TOKENIZER.decode(list(choice.context)) == "He fell because"
    assert [TOKENIZER.decode(list(ending)) for ending in choice.endings] == [" it froze.", " he sang."]
    assert (choice.characters, choice.answer) == ((9, 8), 0)
    gap = {"sentence": "_ paid Eve.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    choice = encode_question(CHOICE_TASKS["winogrande"].read(gap), TOKENIZER, 2048)
    assert isinstance(choice, Choice)
    assert choice.context == (TOKENIZER.end_of_text,)
    branches = [TOKENIZER.decode(choice.branch(index)) for index in (0, 1)]
    assert branches == [" Ann paid Eve.", " Eve paid Eve."]
    assert {TOKENIZER.decode(ending) for ending in choice.endings} == {" paid Eve."}


def test_wikitext_is_joined_and_counted(tmp_path: Path) -> None:
    text = TEXT_TASKS["wikitext-2"].read(write(tmp_path, "wikitext-2", ARTICLE), None)
    assert text.text == "\n= Title =\n\nIt was <unk>, he said.\n"
    assert text.words == 3 + 7 + 4, "words, and an end for each line"
    assert text.units() == {"word": 14, "byte": len(text.text), "character": len(text.text)}


def test_wikitext_words_match_published_count(shared_data: Path) -> None:
    text = TEXT_TASKS["wikitext-2-validation"].read(shared_data / "wikitext-2" / "wiki.valid.tokens", None)
    assert text.words == 217_646  # Merity et al. 2016, table 1


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_wikipedia_uses_last_twentieth(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, "é".encode() * 3_000_000 + b"x")
    text = TEXT_TASKS[name].read(path, None)
    assert text.text == "é" * 2_499_999 + "x", "without the half character at the cut"
    assert text.units() == {"byte": 4_999_999, "character": 2_500_000}
    assert TEXT_TASKS[name].read(path, 10).text == "é" * 10


TOO_DEEP = "[" * 100_000
INVALID_QUESTIONS = [
    "{",
    TOO_DEEP,
    "\udcff",
    json.dumps({**HELLASWAG, "ctx": 5}),
    '{"ctx": "x"}',
    json.dumps({**HELLASWAG, "endings": ["a", "b", "c"]}),
    json.dumps({**HELLASWAG, "label": 4}),
    json.dumps({**HELLASWAG, "label": "?"}),
]
INVALID_PASSAGES = ["{", TOO_DEEP, '{"context": "a b"}', "5", '{"text": "word"}', '{"text": 5}']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(("hellaswag", f"{json.dumps(HELLASWAG)}\n{line}\n", "line 2") for line in INVALID_QUESTIONS),
        *(("lambada", f'{{"text": "a b"}}\n{line}\n', "line 2") for line in INVALID_PASSAGES),
        ("ptb", "abc\udcff", "byte 3"),
        *((name, "", "empty") for name in ("ptb", "lambada", "hellaswag")),
    ],
)
def test_invalid_task_file_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.* {message}"):
        open_task(name, tmp_path)


def test_text_is_encoded_after_end_of_text(tmp_path: Path) -> None:
    write(tmp_path, "text8", "abcdefghij")
    passages = open_task("text8", tmp_path).encode(TOKENIZER, 4)
    assert isinstance(passages[0], Passage)
    assert list(passages[0].ids) == [TOKENIZER.end_of_text, *TOKENIZER.encode("abcd")]
    lengths = {
        stride: open_task("text8", tmp_path, stride=stride).encode(TOKENIZER, 4) for stride in (None, 2)
    }
    assert [passage.scored for passage in lengths[None]] == [4, 4, 2]
    assert [passage.scored for passage in lengths[2]] == [4, 2, 2, 2]


def test_long_passage_loses_first_ids() -> None:
    passage = encode_question(Question("a long way to", (" go",), 0), TOKENIZER, 8)
    assert isinstance(passage, Passage)
    assert TOKENIZER.decode(list(passage.ids)) == "way to go"
    assert passage.scored == 3
    with pytest.raises(ValueError, match="everlasting"):
        encode_question(Question("a", (" everlasting",), 0), TOKENIZER, 8)


CONTENTS = {
    "hellaswag": json.dumps(HELLASWAG),
    "winogrande": json.dumps(GAP),
    "lambada": '{"text": "a b"}',
    "wikitext-2": ARTICLE,
    "text8": "some words",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_task_is_opened_and_scored(name: str, tmp_path: Path) -> None:
    """With invented results, compared with themselves."""
    assert name in TASKS
    write(tmp_path, name, f"{CONTENTS[name]}\n" * 3)
    task = open_task(name, tmp_path, most=2)
    examples = task.encode(TOKENIZER, 2048)
    assert len(examples) == (1 if name in TEXT_TASKS else 2)
    widths = [len(each.endings) if isinstance(each, Choice) else 2 for each in examples]
    result = TaskResult(examples, [tuple(map(float, range(1, width + 1))) for width in widths])
    scores = task.score([result, result])
    assert {score.task for score in scores} == {name}
    for score in scores:
        if score.interval is None:
            assert not score.metric.startswith("accuracy"), "whose interval holds for few examples"
        else:
            assert score.interval.low <= score.value <= score.interval.high
        assert score.against is not None
        assert score.against.value == score.value


WIKITEXT = [
    (" = Robert <unk> = \n", "= Robert <unk> =\n"),
    (" = = Early life = = \n \n He was born . \n", "== Early life ==\n\nHe was born.\n"),
    (" 1 @,@ 250 m ( 0 @.@ 8 mi ) , well @-@ known", "1,250 m (0.8 mi), well-known"),
    (' a " red " and a " blue " one ; the end', 'a "red" and a "blue" one; the end'),
    (" the dog 's tail , the dogs ' tails", "the dog's tail, the dogs' tails"),
    (" they 'd say it isn 't so", "they'd say it isn't so"),
    (" the ' old one ' is $ 5 / month [ sic ]", "the 'old one' is $5/month [sic]"),
    (" 50 % of it : all ! what ? yes ...", "50% of it: all! what? yes..."),
]
TREEBANK = [
    ("mr. vinken is n't N years old , he says", "mr. vinken isn't N years old, he says"),
    ("`` we do n't know , '' he said", '"we don\'t know," he said'),
    ("the -LRB- old -RRB- house 's $ N price", "the (old) house's $N price"),
    ("`` XXXXX ! ''", '"XXXXX!"'),
]


def test_detokenized_examples() -> None:
    assert [join_wikitext(words) for words, _ in WIKITEXT] == [text for _, text in WIKITEXT]
    assert [join_treebank(words) for words, _ in TREEBANK] == [text for _, text in TREEBANK]


@given(st.lists(st.sampled_from(["a", "dogs", "'s", "'", '"', "(", ")", ",", ".", "$", "5", "<unk>", "/"])))
def test_detokenizing_changes_only_spaces(words: list[str]) -> None:
    text = " ".join(words)
    assert re.sub(r"\s", "", join_wikitext(text)) == re.sub(r"\s", "", text)
    if "'" not in words:  # two in a row are the treebank's quotation mark
        assert re.sub(r"\s", "", join_treebank(text)) == re.sub(r"\s", "", text)


# ---------------------------------------------------------------- cached results

EXAMPLES = [Passage([number, 1], 1) for number in range(6)]
RESULTS = {index: (float(index), 0.0) for index in range(6)}


def build_model(seed: int) -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=11))
    initialize(model, seed)
    return model


def test_other_number_of_processes_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example's result is its first id here."""
    count = 0

    def evaluate_task(_model: Any, examples: Sequence[Any], *_: Any) -> Iterator[tuple[int, Numbers]]:
        nonlocal count
        for index in reversed(range(len(examples))):
            count += 1
            yield index, (float(examples[index].ids[0]), 0.0)

    monkeypatch.setattr(tasks, "evaluate_task", evaluate_task)
    monkeypatch.setattr(tasks, "gather_results", lambda own, _: dict(own))
    monkeypatch.setattr(World, "barrier", lambda _: None)
    model, task = build_model(0), SimpleNamespace(name="task", encode=lambda *_: EXAMPLES)
    folder = cache_path() / "task-results" / cache_key(model, EXAMPLES, "fp32")
    folder.mkdir(parents=True)
    (folder / "0.jsonl").write_text("[0, [0.0, 0.0]]\n[3, [3.0, 0.0]]\n")
    (folder / "1.jsonl").write_text("[5, [5.0, 0.0]]\n[1, [1.0")  # interrupted
    found = [
        evaluate_cached(task, model, TOKENIZER, "fp32", World(rank, 2, "cpu")).numbers  # type: ignore[arg-type]
        for rank in (1, 0)
    ]
    assert found == [{4: RESULTS[4], 2: RESULTS[2], 1: RESULTS[1]}, RESULTS], (
        "the first one adds what is cached"
    )
    assert count == 3
    assert not folder.exists()


def test_cache_key_covers_everything_that_decides_results() -> None:
    model, questions = build_model(0), [Choice((1,), ((2,), (3, 4)), (1, 2), 0)]
    keys = {
        cache_key(model, EXAMPLES, "fp32"),
        cache_key(model, EXAMPLES, "bf16"),
        cache_key(model, EXAMPLES[:5], "fp32"),
        cache_key(model, [Passage([0, 1, 1], 1), *EXAMPLES[1:]], "fp32"),
        cache_key(model, [Passage([0, 1, 1], 2), *EXAMPLES[1:]], "fp32"),
        cache_key(build_model(1), EXAMPLES, "fp32"),
        cache_key(model, questions, "fp32"),
        cache_key(model, [Choice((1,), ((2, 3), (4,)), (1, 2), 0)], "fp32"),
        cache_key(model, [Choice((1,), ((3,), (3, 4)), (1, 2), 0, ((2,), ()))], "fp32"),
    }
    assert len(keys) == 9
    assert cache_key(build_model(0), list(EXAMPLES), "fp32") in keys
    with torch.no_grad():
        model.h[0].ln_1.bias[3] = 1e-30
    assert cache_key(model, EXAMPLES, "fp32") not in keys
