"""Records of the official files become questions; invalid ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overnight.evaluation.choice_tasks import CHOICE_TASKS, encode_question, read_questions
from overnight.tokenizer.bpe import BytePair

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
}


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_record_becomes_question(name: str, tmp_path: Path) -> None:
    record, context, endings, answer = RECORDS[name]
    path = tmp_path / "task.jsonl"
    text = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{text}\n{text}\n")
    first, second = read_questions(CHOICE_TASKS[name], path)
    assert first == second
    assert first[:3] == (context, tuple(f" {ending}" for ending in endings), answer)
    assert first.leads == ((" Ann", " Eve") if name == "winogrande" else ())


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "\udcff",
        json.dumps({**HELLASWAG, "ctx": 5}),
        '{"ctx": "x"}',
        json.dumps({**HELLASWAG, "endings": ["a", "b", "c"]}),
        json.dumps({**HELLASWAG, "label": 4}),
        json.dumps({**HELLASWAG, "label": "?"}),
    ],
)
def test_invalid_record_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(HELLASWAG) + "\n" + line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"task\.jsonl, line 2"):
        list(read_questions(CHOICE_TASKS["hellaswag"], path))


def test_question_is_encoded_in_parts() -> None:
    tokenizer = BytePair([])
    choice = encode_question(CHOICE_TASKS["copa"].read(COPA), tokenizer)
    assert tokenizer.decode(list(choice.context)) == "He fell because"
    assert [tokenizer.decode(list(ending)) for ending in choice.endings] == [" it froze.", " he sang."]
    assert choice.characters == (9, 8)
    assert choice.answer == 0
