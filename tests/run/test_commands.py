"""What every command prints, and the sentence for every bad input: the one place where wording is pinned.

The expected output is in golden/commands, with N for numbers. `pytest -n0 tests/run/test_commands.py
--golden-update` rewrites it.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import random
import re
import shlex
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from overnight import cli
from overnight.ablation import campaign
from overnight.recipe import load_recipe
from overnight.run import resume

GOLDEN = Path(__file__).parent / "golden" / "commands"
RECIPE = """
run_name = "tiny"
[data]
data = "shards"
[model]
n_layer = 1
n_head = 2
n_embd = 16
context_length = 32
[schedule]
total_steps = 20
warmup_steps = 2
[batch]
tokens_per_step = 256
micro_batch_size = 4
[compute]
device = "cpu"
precision = "fp32"
compile = false
attention = "fused"
[evaluation]
evaluate_every_steps = 10
[samples]
sample_every_steps = 10
sample_prompts = ["The river"]
sample_tokens = 12
[checkpoints]
checkpoint_every_steps = 10
"""
PREPARE = "prepare corpus --tokenizer bpe-300 --validation-fraction 0.2 --out shards --workers 1"
TRAIN = "train tiny.toml"
LAUNCH = "launch gpt2-124m --slurm --nodes 2 --gpus-per-node 8 --data shards --out job.sbatch"
COMMANDS = {
    "help": "--help",
    "prepare": PREPARE,
    "train": TRAIN,
    "inspect": "inspect shards",
    "generate": "generate runs/tiny 'The river' --precision fp32 --max-new-tokens 8 --temperature 0",
    "evaluate": "evaluate runs/tiny --tasks validation hellaswag --task-files tasks",
    "doctor": "doctor tiny.toml",
    "plan": "plan gpt2-124m --data shards --device-type h200",
    "launch": LAUNCH,
    "ablate": "ablate tiny.toml --control --seeds 2 --total-steps 2 --no-step-times",
    "report": "report runs/tiny",
    "runs": "runs",
    "convert": "convert runs/tiny",
    "bench": "bench --variants fused-adamw --rows 1 --context-length 16 --steps 1 --device cpu --data shards",
}
WITH_JSON = ("inspect", "generate", "evaluate", "doctor", "plan", "ablate", "runs", "bench")
SLOW = {"bench"}
BAD_INPUTS = """
trian | xyzzy | train tiny.toml --n-layr 3 | evaluate runs/tiny --jsn | generate runs/tiny --zzz
train gpt2-123m | train nowhere.toml | train | doctor | plan --json | launch --slurm
report | generate | prepare
train bad-setting.toml | train bad-value.toml | train bad-syntax.toml | train bad-section.toml
train tiny.toml --n-layer many | train tiny.toml --precision fp13 | train tiny.toml --loss broken
train tiny.toml --run-name x --dropout 1.5 --warmup-steps -1 --beta2 2
train tiny.toml --run-name x --checkpoint-every-steps 0 --keep-checkpoints 0
train tiny.toml --run-name x --tokens-per-step 100 | train tiny.toml --run-name x --micro-batch-size 3
train tiny.toml --run-name x --batch-ramp-tokens 1000
train tiny.toml --run-name x --batch-ramp-start-tokens 96 --batch-ramp-tokens 1000
train tiny.toml --run-name x --spike-sigma 6 --precision fp16
train tiny.toml --run-name x --n-head 3 --n-kv-head 2 --window-pattern sl --n-expert 2 --experts-per-token 3
train tiny.toml --run-name x --optimizer muon --precision fp16 --sharding fsdp --head-learning-rate 0.1
train tiny.toml --run-name x --positions rotary --rotary-base 1 --logit-softcap 0 --latent-rank 4 --qk-norm
train tiny.toml --run-name x --shuffle-window 100 --packing best-fit
train tiny.toml --run-name x --mixture shards | train tiny.toml --run-name x --mixture shards=1 shards=1
train tiny.toml --run-name x --max-time soon | train tiny.toml --run-name a/b/c
train tiny.toml --run-name x --warmup-steps 50 | train tiny.toml --run-name x --data nowhere
train tiny.toml --run-name x --device gpu | train tiny.toml --run-name x --trackers mlflow
train tiny.toml --run-name x --init-from runs/nowhere
train tiny.toml --run-name x --init-from runs/tiny --n-layer 3
train tiny.toml --run-name x --tasks helaswag | doctor tiny.toml --tokenizer characters
train tiny.toml --run-name x --tokenizer bpe-301 | train tiny.toml --run-name x --tokenizer=nowhere
train tiny.toml | train --resume runs/nowhere | train --resume corpus | train --resume
train --resume runs/tiny --n-layer 3 --loss chunked | train --resume runs/tiny --total-steps 10
evaluate runs/nowhere | evaluate corpus | evaluate runs/tiny --data nowhere
evaluate runs/tiny --tasks helaswag | evaluate runs/tiny --tasks piqa --task-files tasks
evaluate runs/tiny --examples 0 --stride 0
generate nowhere | generate runs/tiny --temperature -1 --samples 0 --max-new-tokens 0 --top-p 2
generate runs/tiny --precision fp8
convert runs/tiny --out corpus | convert runs/tiny --to onnx | convert broken.pt --to hf --out x-hf
prepare nowhere | prepare empty | prepare broken --tokenizer characters --out data/broken --workers 1
prepare corpus.jsonl --text-column words --tokenizer characters --out data/x --workers 1
prepare corpus --tokens many | prepare corpus --validation-fraction 2 --shard-tokens 0 --workers 0
prepare corpus --tokenizer characters --train-tokenizer 300
prepare corpus --tokenizer characters --out shards --workers 1
prepare corpus --executor slurm | prepare corpus --decontaminate nowhere.jsonl
inspect nowhere | inspect runs/tiny | inspect shards --documents 0 --samples -1
plan tiny.toml --device-type h999 | plan tiny.toml --device-type a100
plan tiny.toml --machines 0 --seconds 0 | doctor tiny.toml --only gradient
doctor tiny.toml --benchmarks nowhere.jsonl | bench --model gpt2-123m | bench --variants bf17
bench --rows 0 --steps 0 --context-length 5000 | launch gpt2-124m | launch gpt2-124m --slurm --kubernetes
launch gpt2-124m --kubernetes --partition gpu --hours 0 --nodes 0
launch gpt2-124m --slurm --nodes 3 --gpus-per-node 7 | launch gpt2-124m --slurm --processes 2 --data shards
ablate | ablate tiny.toml | ablate tiny.toml --baseline gpt2-123m | ablate tiny.toml --control --seeds 0
ablate tiny.toml --control --seeds 1,2,1 --max-time 1h --evaluate-every-steps off
ablate tiny.toml --add positions --add positons=rotary --add qk_norm=maybe --add positions=learned
ablate tiny.toml --add biases=false --add biases=false | ablate tiny.toml --baseline quickstart
ablate tiny.toml --leave-out positions,n_layer | ablate tiny.toml --qk-norm --leave-out qk_nrm,dropout
ablate tiny.toml --positions rotary --rotary-base 500 --leave-out positions
ablate tiny.toml --control --tune seed=1,2 --tune beta1=0.9 --tune matrix_learning_rate=0.01,0.02
ablate tiny.toml --add optimizer=muon+beta1=0.8+beta1=0.9 --add seed=3 --add , --control --run-name a/b
ablate tiny.toml --control --tune beta1=0.9,0.90 --tune beta2=0.9,0.8 --tune beta2=0.7,0.6
ablate tiny.toml --add micro_batch_size=3 | ablate tiny.toml --control --micro-batch-size 3
ablate tiny.toml --add qk_norm=true --total-tokens 256 --warmup-steps 3
ablate tiny.toml --baseline bad-value.toml
ablate tiny.toml --baseline tiny.toml --add qk_norm=true
report nowhere | report runs/tiny --out corpus | runs nowhere | quickstart --frsh
"""


def write_inputs(folder: Path) -> None:
    """A text, tasks, recipes and things that are broken."""
    draw = random.Random(1)
    nouns = "river stone garden window teacher village mountain engine letter morning"

    def sentence() -> str:
        one, other, third = draw.choices(nouns.split(), k=3)
        return f"The {one} sees the {other} near the {third}."

    for name in ("corpus", "tasks", "empty", "broken"):
        (folder / name).mkdir()
    for number in range(60):
        text = " ".join(sentence() for _ in range(draw.randrange(4, 12)))
        (folder / "corpus" / f"{number:02}.txt").write_text(text)
    (folder / "corpus.jsonl").write_text(json.dumps({"text": sentence()}) + "\n")
    question = {"ctx": "The river sees", "label": 1, "endings": ["a.", "the stone.", "b.", "c."]}
    (folder / "tasks/hellaswag_val.jsonl").write_text((json.dumps(question) + "\n") * 8)
    (folder / "broken/bad.txt").write_bytes(b"The quiet river \xff\xfe sees the stone.\n")
    (folder / "broken.pt").write_bytes(b"not a checkpoint")
    (folder / "tiny.toml").write_text(RECIPE)
    for name, (old, new) in {
        "setting": ("n_layer = 1", "n_layr = 1\ntotal_steps = 3"),
        "value": ("n_layer = 1", 'n_layer = "one"'),
        "syntax": ("[schedule]", "[schedule"),
        "section": ("[schedule]", "[shedule]"),
    }.items():
        (folder / f"bad-{name}.toml").write_text(RECIPE.replace(old, new))


def call(line: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `overnight` with these words."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(shlex.split(line))
        except SystemExit as ended:
            status = int(ended.code or 0)
    texts = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]  # type: ignore[attr-defined]
    return status, texts[0], texts[1]


def normalise(text: str) -> str:
    """Without the current folder, dates, numbers and their units; lines wrapped to the width are joined."""
    text = text.replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), ".")
    text = re.sub(r"\d{4}-\d\d-\d\d[T \d:+]*|\w{3} \d+ \w{3} \d{4} \d\d:\d\d", "DATE", text)
    text = re.sub(r"(?<![\w-])\d[\d,]*(\.\d+)?(e[+-]?\d+)?[kMx]?(?![\w-])", "N", text)
    text = re.sub(r"\bN (ms|s|min|h|d|kB|MB|GB|TB)\b( N (s|min|h)\b)?", "N UNITS", text)
    text = re.sub(r"just now|N \w+ ago", "AGE", text)
    text = re.sub(r"\n +", " ", re.sub(r"[ ]+$", "", re.sub(r"[ ]+", " ", text), flags=re.MULTILINE))
    return re.sub(r"; the machine is busy: load N|(?m:^.*load average.*\n)", "", text)


def without_numbers(value: object) -> object:
    """JSON whose numbers are N and whose texts are normalised; its keys are what is compared."""
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_numbers(each) for each in value]
    if isinstance(value, str):
        return normalise(value)
    return "N" if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What `prepare` and `train` printed in the current folder, which now has inputs, shards and a run."""
    folder = tmp_path_factory.mktemp("commands").resolve()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(campaign, "run_overnight", cli.main)  # in this process
        patch.chdir(folder)
        write_inputs(folder)
        yield {name: call(COMMANDS[name]) for name in ("prepare", "train")}


@pytest.fixture
def check(pytestconfig):
    """`check(name, found)`: compare with the golden file, or rewrite it."""

    def check(name, found):
        if pytestconfig.getoption("--golden-update"):
            (GOLDEN / name).write_text(found, encoding="utf-8")
        expected = (GOLDEN / name).read_text(encoding="utf-8")
        assert found == expected, f"{name}: --golden-update rewrites it"

    return check


def slow_marked(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


@pytest.mark.parametrize("name", slow_marked(COMMANDS))
def test_command_prints_golden_text(name, printed, check):
    status, out, err = printed.get(name) or call(COMMANDS[name])
    assert status == (1 if name == "doctor" else 0), err
    job = Path("job.sbatch").read_text() if name == "launch" else ""
    job = job.replace(sysconfig.get_path("scripts"), "BIN")
    check(f"{name}.txt", f"$ overnight {COMMANDS[name]}\n{normalise(out)}[stderr]\n{normalise(err)}{job}")


@pytest.mark.parametrize("name", slow_marked(WITH_JSON))
def test_command_prints_golden_json(name, printed, check):
    _, out, err = call(f"{COMMANDS[name]} --json")
    texts = [out] if out.startswith(("{\n", "[")) else out.splitlines()  # one value, or one a line
    found = without_numbers([json.loads(each) for each in texts])
    check(f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def test_bad_inputs(printed, check):
    """Each ends with one sentence and exit status 2; no run is begun."""
    rows, before = [], sorted(Path("runs").iterdir())
    for line in (line.strip() for part in BAD_INPUTS.strip().splitlines() for line in part.split("|")):
        status, _, err = call(line)
        sentence = err.replace(f"{Path.cwd()}/", "").splitlines()[-1]  # after the lines of progress
        if choices := re.search(r"one of \(([^)]*)\)", sentence):  # tyro lists them in any order
            sentence = sentence.replace(choices[1], ", ".join(sorted(choices[1].split(", "))))
        rows.append(f"$ overnight {line}\n[{status}] {sentence}\n")
    accepted = [row for row in rows if "\n[2] overnight: " not in row]
    assert not accepted, "".join(accepted)
    assert sorted(Path("runs").iterdir()) == before
    check("bad_inputs.txt", "".join(rows))


HOSTILE = "-a b'$HOME \"c"  # in one name what a shell or a parser would take for something else
IN_HOSTILE_FOLDER = """
prepare HERE/text --tokenizer characters --out HERE/shards --validation-fraction 0.2
prepare --from-shards HERE/shards --tokenizer gpt2 | prepare HERE/nothing/at-all
inspect HERE/shards | inspect HERE/theirs
doctor HERE/tiny.toml --only shards
plan HERE/tiny.toml --device off --device-type h200 | plan HERE/tiny.toml
train HERE/tiny.toml --total-steps 2 --warmup-steps 1 | train HERE/tiny.toml --total-steps 2 --warmup-steps 1
report HERE/run | evaluate HERE/run | generate HERE/run --max-new-tokens 2 | runs HERE/run
convert HERE/run --out HERE/hf
"""


def printed_commands(text):
    """The commands in a text: in backticks, or after `next:` or `then:` to the end of the line."""
    found = re.findall(r"`(overnight [^`]* [^`]*)`|(?:next|then): (overnight .*)", text)
    return ["".join(each) for each in found]


def test_every_command_printed_can_be_pasted(tmp_path, monkeypatch):
    """Each is parsed by a shell and by its own parser; the paths in it are those that were meant."""
    monkeypatch.chdir(tmp_path)
    here = tmp_path / HOSTILE
    here.mkdir()
    write_inputs(tmp_path)
    for old, new in (("corpus", "text"), ("empty", "theirs")):
        Path(old).rename(here / new)
    (here / "theirs/train.bin").write_bytes(b"1234")
    (here / "tiny.toml").write_text(RECIPE.replace('"shards"', json.dumps(f"./{HOSTILE}/shards")))
    commands = []
    for line in (line.strip() for part in IN_HOSTILE_FOLDER.strip().splitlines() for line in part.split("|")):
        if line.startswith("report"):
            shutil.copytree("runs/tiny", here / "run")
        _, out, err = call(line.replace("HERE", shlex.quote(f"./{HOSTILE}")))
        assert printed_commands(out + err) or line.startswith("prepare --from-shards"), f"{line}: {out}{err}"
        commands += printed_commands(out + err)
    page = html.unescape((here / "run/report.html").read_text())
    commands += re.findall(r"^overnight (?:train|evaluate|generate|report) .*[^<]$", page, re.MULTILINE)
    assert len(commands) > 15
    assert not [problem for each in commands if (problem := unusable(each, monkeypatch))]


def unusable(command, monkeypatch):
    """Why a command can't be pasted; None if its parser reads it, and each path in it is in HOSTILE."""
    words = shlex.split(command.replace("RECIPE", "quickstart").replace("SOURCE", "python-docs"))[1:]
    with monkeypatch.context() as patch:
        read = SimpleNamespace(**dict.fromkeys(("run", "train_in_processes"), lambda *_: None))
        patch.setattr(cli, "_command_module", lambda _: read)
        patch.setattr(resume, "load_resumed", lambda _: load_recipe("quickstart"))
        status, _, err = call(shlex.join(words))
    paths = [word for word in words if HOSTILE[:4] in word or "HOME" in word]
    wrong = [path for path in paths if not re.match(rf"(--[a-z-]+=)?(\./)?{re.escape(HOSTILE)}", path)]
    return f"{command}: {status} {err} {wrong}" if status or wrong else None


def test_command_that_is_not_quoted_is_found(tmp_path, monkeypatch):
    """The negative control: what was printed before."""
    monkeypatch.chdir(tmp_path)
    for command in ("train RECIPE --data my notes", f"report {shlex.quote(HOSTILE)}", "inspect -x"):
        assert unusable(f"overnight {command}", monkeypatch)
