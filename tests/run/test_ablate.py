"""`overnight ablate`, whole, with tiny runs: results, tuning, failures, campaigns that go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

from overnight import cli
from overnight.ablation import campaign, timing
from overnight.config import to_toml
from overnight.run_directory import RunDirectory

FOLDER = Path("runs/ablate-small")
ARMS = ("small", "optimizer=muon", "control")
WORDS = ("ablate", "small.toml", "--add", "optimizer=muon", "--control", "--seeds", "2")


class Started(list):
    """The commands of the runs that were started; they run in this process, unless `run` is replaced."""

    run = staticmethod(cli.main)

    def __call__(self, words):
        self.append(words)
        return self.run(words)


@pytest.fixture
def started(monkeypatch):
    """Runs are started in this process."""
    commands = Started()
    monkeypatch.setattr(campaign, "run_overnight", commands)
    return commands


@pytest.fixture(scope="module")
def first(tmp_path_factory, recipe):
    """(folder, exit status, started commands) of the campaign WORDS. Do not change it; see `copied`."""
    folder, commands = tmp_path_factory.mktemp("campaign"), Started()
    settings = {"total_steps": 4, "evaluate_every_steps": 2, "sample_every_steps": None}
    settings |= {"tokens_per_step": 256, "micro_batch_size": 8, "evaluation_tokens": 640, "n_layer": 1}
    settings |= {"attention": "fused", "async_checkpoint": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(campaign, "run_overnight", commands)
        patch.setattr(timing, "WARM_UPS", 1)
        (folder / "small.toml").write_text(to_toml(recipe(**settings, warmup_steps=1)))
        return folder, cli.main(WORDS), commands


@pytest.fixture
def copied(first, tmp_path, monkeypatch):
    """A copy of that campaign in the current folder."""
    monkeypatch.chdir(shutil.copytree(first[0], tmp_path / "copy"))


def read_results(folder=FOLDER):
    return json.loads((folder / "ablate.json").read_text())


def last_loss(name):
    return RunDirectory(FOLDER / name).read_events("evaluations")[-1]["loss"]


def test_differences_are_those_of_the_runs(first, copied):
    _, status, commands = first
    assert status == 0
    assert [Path(words[1]).stem for words in commands] == [
        f"{arm}-{seed}" for seed in (1337, 1338) for arm in ARMS
    ], "seed after seed, so that pairs are complete early"
    baseline, muon, control = read_results()["arms"]
    differences = [last_loss(f"optimizer=muon-{seed}") - last_loss(f"small-{seed}") for seed in (1337, 1338)]
    found = muon["nats_difference"]
    assert found["values"] == pytest.approx(differences)
    assert found["mean"] == pytest.approx(statistics.fmean(differences))
    reach = 12.706205 * statistics.stdev(differences) / 2**0.5
    assert found["high"] - found["mean"] == pytest.approx(reach)
    assert muon["changes"] == {"optimizer": ["adamw", "muon"]}
    assert muon["step_time_ratio"] > 0
    assert control["nats_difference"]["values"] == [0.0, 0.0], "the same to the bit"
    assert control["nats_difference"]["verdict"] == "not told apart"
    assert baseline["nats_difference"] is None


def test_arms_begin_alike_and_keep_one_checkpoint(first, copied):
    for seed in (1337, 1338):
        begins = {
            RunDirectory(FOLDER / f"{arm}-{seed}").read_events("evaluations")[0]["loss"] for arm in ARMS
        }
        assert len(begins) == 1
    assert {len([*path.glob("checkpoints/step-*")]) for path in FOLDER.glob("*-133?")} == {1}


def test_page_is_self_contained(copied):
    page = (FOLDER / "ablate.html").read_text()
    assert page.count("<svg") == 2
    assert "not told apart" in page
    assert "2 comparisons, each with its own interval" in page
    assert "<script" not in page
    assert not re.search(r"src=|href=.(?!#)|url\((?!#)|@import", page)


def test_finished_campaign_trains_nothing_again(copied, started, capsys):
    before = read_results()
    assert cli.main([*WORDS, "--json", "--no-step-times"]) == 0
    assert started == []
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_results()
    assert [arm["loss"] for arm in printed["arms"]] == [arm["loss"] for arm in before["arms"]]


def test_stopped_campaign_goes_on(copied, started, capsys):
    """A run that is missing is begun, one that was stopped is resumed; the command to go on is printed."""
    expected = read_results()["arms"][1]["loss"]
    shutil.rmtree(FOLDER / "small-1338")
    unfinished = RunDirectory(FOLDER / "optimizer=muon-1338")
    shutil.rmtree(unfinished.checkpoints)
    unfinished.checkpoints.mkdir()
    started.run = lambda words: (_ for _ in ()).throw(KeyboardInterrupt)
    assert cli.main(WORDS) == cli.INTERRUPTED
    assert f"next: overnight {' '.join(WORDS)}\n" in capsys.readouterr().err
    started.run = cli.main
    started.clear()
    assert cli.main([*WORDS, "--no-step-times"]) == 0
    assert started == [
        ["train", str(FOLDER / "recipes/small-1338.toml")],
        ["train", "--resume", str(unfinished.path)],
    ]
    assert read_results()["arms"][1]["loss"] == expected


def test_failing_arm_is_reported_and_the_others_go_on(copied, started, capsys):
    """A run that diverges, and one whose process ends; a diverged run is not trained a second time."""
    words = ["ablate", "small.toml", "--add", "peak_learning_rate=1e25", "--add", "beta1=0.5", "--seeds", "1"]
    words += ["--no-step-times", "--total-steps", "8", "--run-name", "fails"]
    started.run = lambda given: -signal.SIGKILL if "beta1" in given[-1] else cli.main(given)
    assert cli.main(words) == cli.FAILED
    out = " ".join(capsys.readouterr().out.split())
    assert "compared on 0 of 1 seeds" in out
    assert "beta1=0.5-1337: its process was killed" in out
    started.clear()
    started.run = cli.main
    assert cli.main(words) == cli.FAILED
    assert [Path(words[1]).stem for words in started] == ["beta1=0.5-1337"]
    _, diverged, other = read_results(Path("runs/ablate-fails"))["arms"]
    assert "it has diverged" in diverged["runs"][0]["failure"]
    assert diverged["nats_difference"] is None
    assert len(other["nats_difference"]["values"]) == 1


def test_run_of_other_settings_is_refused(copied, started, capsys):
    assert cli.main([*WORDS, "--beta2", "0.9"]) == cli.WRONG_USE
    err = capsys.readouterr().err
    assert "beta2=0.9 (was 0.95)" in err
    assert "and 3 more" in err
    assert cli.main([*WORDS, "--total-steps", "8"]) == cli.WRONG_USE
    assert "total_steps=8 (was 4)" in capsys.readouterr().err
    (FOLDER / "control-1338/metrics.jsonl").write_text("")
    assert cli.main(WORDS) == cli.WRONG_USE
    assert "control-1338: damaged" in capsys.readouterr().err
    assert started == []


def test_rates_are_tuned_for_each_arm_on_another_seed(copied, started, capsys):
    words = ["ablate", "small.toml", "--add", "optimizer=muon", "--seeds", "1", "--no-step-times"]
    words += ["--tune", "matrix_learning_rate=0.01,0.02"]
    assert cli.main([*words, "--run-name", "tuned"]) == 0
    assert len(started) == 2 + 2
    found = read_results(Path("runs/ablate-tuned"))
    assert {each["seed"] for each in found["tried"]} == {1336}
    best = min(found["tried"], key=lambda each: each["loss"])
    assert [each["settings"] for each in found["tried"] if each["is_chosen"]] == [best["settings"]]
    assert [arm["runs"][0]["settings"] for arm in found["arms"]] == [{}, best["settings"]]
    untuned, at_the_end = found["notices"]
    assert untuned == "small was not tuned: none of the tuned settings has a meaning for it."
    assert re.search("is the (highest|lowest) that was tried", at_the_end)
    assert "one seed: none" in capsys.readouterr().out


def test_signal_reaches_the_run_which_may_save(monkeypatch, tmp_path):
    """The process is in a session of its own, and gets each signal from this one; then the campaign ends."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    program = (
        "import pathlib, signal, sys\n"
        f"def save(*_): pathlib.Path({str(saved)!r}).touch(); sys.exit(130)\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); signal.pause()"
    )
    monkeypatch.setattr(campaign, "PROGRAM", program)

    def send():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        campaign.run_overnight([])
    thread.join()
    assert saved.exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_run_is_started_as_a_command():
    assert campaign.run_overnight(["--version"]) == 0
    assert campaign.run_overnight(["nothing"]) == cli.WRONG_USE
