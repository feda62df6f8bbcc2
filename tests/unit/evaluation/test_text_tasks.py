"""The texts of the zero-shot table, read as published; every bad file is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.tasks import TASKS, TaskResult, open_task
from overnight.evaluation.text_tasks import CLOZE_TASKS, TEXT_TASKS, Cloze, encode_cloze, encode_text
from overnight.tokenizer.bpe import BytePair

ARTICLE = " \n = Title = \n \n It was <unk> , he said . \n"


def write(folder: Path, file: str, content: str | bytes) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_wikitext_is_put_together_and_its_words_are_counted_as_published(tmp_path: Path) -> None:
    task = TEXT_TASKS["wikitext-2"]
    text = task.read(write(tmp_path, task.file, ARTICLE), None)
    assert text.text == "\n= Title =\n\nIt was <unk>, he said.\n"
    assert text.words == 3 + 7 + 4, "words, and an end for each line"
    assert text.units() == {"word": 14, "byte": len(text.text), "character": len(text.text)}


def test_the_words_of_the_real_wikitext_are_as_many_as_its_authors_say(shared_data: Path) -> None:
    text = TEXT_TASKS["wikitext-2-validation"].read(shared_data / "wikitext-2" / "wiki.valid.tokens", None)
    assert text.words == 217_646  # Merity et al. 2016, table 1


def test_the_last_twentieth_of_wikipedia_is_judged(tmp_path: Path) -> None:
    for name in ("enwik8", "text8"):
        path = write(tmp_path, name, "é".encode() * 3_000_000 + b"x")
        text = TEXT_TASKS[name].read(path, None)
        assert text.text == "é" * 2_499_999 + "x", "the half of a character that the cut leaves is left out"
        assert text.units() == {"byte": 4_999_999, "character": 2_500_000}
        assert TEXT_TASKS[name].read(path, 10).text == "é" * 10


def test_lambada_is_cut_before_its_last_word(tmp_path: Path) -> None:
    lines = '{"text": "He saw \\"the\\n\\nold dog"}\n{"text": "Now she said yes."}\n'
    clozes = CLOZE_TASKS["lambada"].read(write(tmp_path, "lambada.jsonl", lines))
    assert clozes == [Cloze('He saw "the\n\nold', " dog"), Cloze("Now she said", " yes.")]
    plain = CLOZE_TASKS["lambada-plain"].read(write(tmp_path, "plain.txt", "he saw `` the old dog\n"))
    assert plain == [Cloze("he saw `` the old", " dog")]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2 is no passage of lambada"),
        ('{"context": "a b"}', "line 2 is no passage"),
        ("5", "line 2 is no passage"),
        ('{"text": "word"}', "line 2: 'word' has no word before its last one"),
        ('{"text": 5}', "line 2: '5' has no word"),
    ],
)
def test_a_damaged_passage_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path, "lambada.jsonl", '{"text": "a b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        CLOZE_TASKS["lambada"].read(path)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ptb\.test\.txt is no UTF-8 text at byte 3"):
        TEXT_TASKS["ptb"].read(write(tmp_path, "ptb.test.txt", b"abc\xff"), None)
    for name in ("ptb", "lambada", "hellaswag"):
        task = {**TEXT_TASKS, **CLOZE_TASKS}.get(name)
        write(tmp_path, task.file if task else "hellaswag_val.jsonl", "")
        with pytest.raises(ValueError, match="is empty: fetch it again"):
            open_task(name, tmp_path)


def test_a_text_is_judged_whole_after_the_id_that_begins_a_document() -> None:
    tokenizer = BytePair([])
    passages = encode_text("abcdefghij", tokenizer, 4)
    assert list(passages[0].ids) == [tokenizer.end_of_text, *tokenizer.encode("abcd")]
    assert sum(passage.scored for passage in passages) == 10
    assert [passage.scored for passage in encode_text("abcdefghij", tokenizer, 4, stride=2)] == [4, 2, 2, 2]


def test_a_long_passage_loses_its_beginning_not_its_last_word() -> None:
    tokenizer = BytePair([])
    passage = encode_cloze(Cloze("a long way to", " go"), tokenizer, 8)
    assert tokenizer.decode(list(passage.ids)) == "way to go"
    assert passage.scored == 3
    with pytest.raises(ValueError, match="' everlasting' does not fit the model's context of 8"):
        encode_cloze(Cloze("a", " everlasting"), tokenizer, 8)


HELLASWAG = {"ctx": "He sat. he", "endings": ["ran.", "ate.", "is a roof.", "slept."], "label": 3}
WINOGRANDE = {"sentence": "_ paid Eve.", "option1": "Ann", "option2": "Eve", "answer": "2"}
FILES = {
    "hellaswag": ("hellaswag_val.jsonl", json.dumps(HELLASWAG)),
    "winogrande": ("winogrande_1.1/dev.jsonl", json.dumps(WINOGRANDE)),
    "lambada": ("lambada_test.jsonl", '{"text": "a b"}'),
    "wikitext-2": ("wikitext-2/wiki.test.tokens", ARTICLE),
    "text8": ("text8", "some words"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_task_opens_by_its_name_and_scores_what_it_is_given(name: str, tmp_path: Path) -> None:
    """The numbers are made up; each metric comes out with its interval, beside the same model again."""
    assert name in TASKS
    file, content = FILES[name]
    write(tmp_path, file, f"{content}\n" * 3)
    task = open_task(name, tmp_path, most=2)
    examples = task.encode(BytePair([]), 2048)
    assert len(examples) == (1 if name in TEXT_TASKS else 2)
    widths = [len(each.endings) if isinstance(each, Choice) else 2 for each in examples]
    made_up = TaskResult(examples, [tuple(map(float, range(1, width + 1))) for width in widths])
    scores = task.score(made_up, made_up)
    assert {score.task for score in scores} == {name}
    for score in scores:
        assert score.interval.low <= score.value <= score.interval.high
        assert score.against is not None
        assert score.against.value == score.value


def test_what_has_no_context_follows_the_id_that_begins_a_document(tmp_path: Path) -> None:
    write(tmp_path, *FILES["winogrande"])
    tokenizer = BytePair([])
    (choice,) = open_task("winogrande", tmp_path).encode(tokenizer, 64)
    assert isinstance(choice, Choice)
    assert choice.context == (tokenizer.end_of_text,)
    branches = [tokenizer.decode(choice.branch(number)) for number in (0, 1)]
    assert branches == [" Ann paid Eve.", " Eve paid Eve."]
    assert {tokenizer.decode(ending) for ending in choice.endings} == {" paid Eve."}
