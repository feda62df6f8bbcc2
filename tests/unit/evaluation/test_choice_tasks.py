"""Lines of the official files, as their publishers write them, become questions; anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overnight.evaluation.choice_tasks import CHOICE_TASKS, encode_question, read_questions
from overnight.tokenizer.bpe import BytePair

SCIENCE = {
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "A"}, {"text": "the sun", "label": "B"}]
        + [{"text": text, "label": label} for text, label in (("the moon", "C"), ("snow", "D"))],
    },
    "answerKey": "B",
}
STORY = "".join(f"{number} Sentence {number} .\n" for number in range(1, 21))
BEASTS = ["crow", "dog", "king", "cat", "rat", "owl", "bee", "fly", "ant", "elk"]
STORY += "21 `` The XXXXX , '' said he .\tking\t\t" + "|".join(BEASTS) + "\n"
LINES: dict[str, tuple[dict[str, Any] | str, str, list[str], int]] = {
    "hellaswag-lm-eval": (
        {
            "activity_label": "Sitting",
            "ctx": "[header] A man sits. he",
            "endings": ["runs [substeps] away.", "eats.", "is [title] a roof.", "sleeps."],
            "label": "3",
        },
        "Sitting: A man sits. he",
        [" runs away.", " eats.", " is. a roof.", " sleeps."],
        3,
    ),
    "winogrande": (
        {"sentence": "Ann paid Eve since _ was rich.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "Ann paid Eve since",
        [" was rich.", " was rich."],
        0,
    ),
    **{
        name: (
            STORY,
            " ".join(f"Sentence {number}." for number in range(1, 21)) + ' "The',
            [f' {word}," said he.' for word in BEASTS],
            2,
        )
        for name in ("cbt-common-nouns", "cbt-named-entities")
    },
    "hellaswag": (
        {"ctx": "A man sits. he", "endings": ["runs.", "eats.", "is a roof.", "sleeps."], "label": 3},
        "A man sits. he",
        [" runs.", " eats.", " is a roof.", " sleeps."],
        3,
    ),
    "arc-easy": (
        SCIENCE,
        "Question: What is hot?\nAnswer:",
        [" ice", " the sun", " the moon", " snow"],
        1,
    ),
    "arc-challenge": (
        {**SCIENCE, "answerKey": "D"},
        "Question: What is hot?\nAnswer:",
        [" ice", " the sun", " the moon", " snow"],
        3,
    ),
    "openbookqa": (SCIENCE, "What is hot?", [" ice", " the sun", " the moon", " snow"], 1),
    "piqa": (
        {"goal": "Open a jar", "sol1": "turn it", "sol2": "eat it", "label": 0},
        "Question: Open a jar\nAnswer:",
        [" turn it", " eat it"],
        0,
    ),
    "boolq": (
        {"passage": "Snow is cold.", "question": "is snow cold", "label": True},
        "Snow is cold.\nQuestion: is snow cold?\nAnswer:",
        [" no", " yes"],
        1,
    ),
    "copa": (
        {
            "premise": "He fell.",
            "question": "cause",
            "choice1": "It froze.",
            "choice2": "He sang.",
            "label": 0,
        },
        "He fell because",
        [" it froze.", " he sang."],
        0,
    ),
}


def test_every_task_has_an_example_here() -> None:
    assert LINES.keys() == CHOICE_TASKS.keys()


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_a_line_becomes_a_question(name: str, tmp_path: Path) -> None:
    line, context, endings, answer = LINES[name]
    path = tmp_path / "task.jsonl"
    record = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{record}\n{record}\n")
    first, second = read_questions(CHOICE_TASKS[name], path)
    assert first == second
    assert first[:3] == (context, tuple(endings), answer)
    assert first.leads == ((" Ann", " Eve") if name == "winogrande" else ())


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2 is no question of hellaswag"),
        ("\udcff", "line 2 is no question of hellaswag"),
        ('{"ctx": 5, "endings": ["a", "b", "c", "d"], "label": 0}', "line 2: its context 5 is no text"),
        ('{"ctx": "x"}', "line 2 is no question of hellaswag"),
        ('{"ctx": "x", "endings": ["a", "b", "c"], "label": 0}', "line 2 has 3 endings, and hellaswag has 4"),
        (
            '{"ctx": "x", "endings": ["a", "b", "c", "d"], "label": 4}',
            "the answer is number 4, and there are 4",
        ),
        ('{"ctx": "x", "endings": ["a", "b", "c", "d"], "label": "?"}', "line 2 is no question"),
    ],
)
def test_a_damaged_line_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(LINES["hellaswag"][0]) + "\n" + line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=complaint):
        list(read_questions(CHOICE_TASKS["hellaswag"], path))


def test_a_question_is_encoded_part_by_part() -> None:
    tokenizer = BytePair([])
    choice = encode_question(next(iter([read_one("copa")])), tokenizer)
    assert tokenizer.decode(list(choice.context)) == "He fell because"
    assert [tokenizer.decode(list(ending)) for ending in choice.endings] == [" it froze.", " he sang."]
    assert choice.characters == (9, 8)
    assert choice.answer == 0


def read_one(name: str) -> Any:
    return CHOICE_TASKS[name].read(LINES[name][0])
