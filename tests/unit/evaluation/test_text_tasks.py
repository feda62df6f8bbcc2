"""Text tasks: files as published, detokenization, and scores of every kind of task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.evaluation.choice_tasks import CHOICE_TASKS
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.scores import TaskResult
from overnight.evaluation.tasks import TASKS, open_task
from overnight.evaluation.text_tasks import (
    CLOZE_TASKS,
    TEXT_TASKS,
    Cloze,
    encode_cloze,
    encode_text,
    join_treebank,
    join_wikitext,
)
from overnight.tokenizer.bpe import BytePair

ARTICLE = " \n = Title = \n \n It was <unk> , he said . \n"


def write(folder: Path, file: str, content: str | bytes) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_wikitext_is_joined_and_counted(tmp_path: Path) -> None:
    task = TEXT_TASKS["wikitext-2"]
    text = task.read(write(tmp_path, task.file, ARTICLE), None)
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


def test_lambada_is_cut_before_last_word(tmp_path: Path) -> None:
    lines = '{"text": "He saw \\"the\\n\\nold dog"}\n{"text": "Now she said yes."}\n'
    clozes = CLOZE_TASKS["lambada"].read(write(tmp_path, "lambada.jsonl", lines))
    assert clozes == [Cloze('He saw "the\n\nold', " dog"), Cloze("Now she said", " yes.")]
    plain = CLOZE_TASKS["lambada-plain"].read(write(tmp_path, "plain.txt", "he saw `` the old dog\n"))
    assert plain == [Cloze("he saw `` the old", " dog")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            ("lambada", f'{{"text": "a b"}}\n{line}\n'.encode(), r"lambada_test\.jsonl, line 2")
            for line in ("{", '{"context": "a b"}', "5", '{"text": "word"}', '{"text": 5}')
        ),
        ("ptb", b"abc\xff", r"ptb\.test\.txt .*byte 3"),
        *((name, b"", "empty") for name in ("ptb", "lambada", "hellaswag")),
    ],
)
def test_invalid_task_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    task = {**TEXT_TASKS, **CLOZE_TASKS, **CHOICE_TASKS}[name]
    write(tmp_path, task.file, content)
    with pytest.raises(ValueError, match=message):
        open_task(name, tmp_path)


def test_text_is_encoded_after_end_of_text() -> None:
    tokenizer = BytePair([])
    passages = encode_text("abcdefghij", tokenizer, 4)
    assert list(passages[0].ids) == [tokenizer.end_of_text, *tokenizer.encode("abcd")]
    assert sum(passage.scored for passage in passages) == 10
    assert [passage.scored for passage in encode_text("abcdefghij", tokenizer, 4, stride=2)] == [4, 2, 2, 2]


def test_long_cloze_loses_first_ids() -> None:
    tokenizer = BytePair([])
    passage = encode_cloze(Cloze("a long way to", " go"), tokenizer, 8)
    assert tokenizer.decode(list(passage.ids)) == "way to go"
    assert passage.scored == 3
    with pytest.raises(ValueError, match="everlasting"):
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
def test_task_is_opened_and_scored(name: str, tmp_path: Path) -> None:
    """With invented results, compared with themselves."""
    assert name in TASKS
    file, content = FILES[name]
    write(tmp_path, file, f"{content}\n" * 3)
    task = open_task(name, tmp_path, most=2)
    examples = task.encode(BytePair([]), 2048)
    assert len(examples) == (1 if name in TEXT_TASKS else 2)
    widths = [len(each.endings) if isinstance(each, Choice) else 2 for each in examples]
    result = TaskResult(examples, [tuple(map(float, range(1, width + 1))) for width in widths])
    scores = task.score([result, result])
    assert {score.task for score in scores} == {name}
    for score in scores:
        assert score.interval.low <= score.value <= score.interval.high
        assert score.against is not None
        assert score.against.value == score.value


def test_empty_context_becomes_end_of_text(tmp_path: Path) -> None:
    write(tmp_path, *FILES["winogrande"])
    tokenizer = BytePair([])
    (choice,) = open_task("winogrande", tmp_path).encode(tokenizer, 64)
    assert isinstance(choice, Choice)
    assert choice.context == (tokenizer.end_of_text,)
    branches = [tokenizer.decode(choice.branch(index)) for index in (0, 1)]
    assert branches == [" Ann paid Eve.", " Eve paid Eve."]
    assert {tokenizer.decode(ending) for ending in choice.endings} == {" paid Eve."}


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
