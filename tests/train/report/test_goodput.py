"""Tests of train/report/goodput.py."""

import json
import time
from pathlib import Path

import pytest

from train.report.goodput import (
    KINDS,
    Session,
    SessionLog,
    Times,
    add_up,
    format_seconds,
    read_sessions,
)


def test_time_counts_as_what_it_is_spent_on() -> None:
    times = Times()
    times.turn_to("steps")
    with times.spending("data"):
        time.sleep(0.05)
    with pytest.raises(RuntimeError), times.spending("evaluation"):
        raise RuntimeError
    assert times.kind == "steps"
    assert 0.05 <= times.seconds["data"] < 0.5
    assert times.seconds["checkpoints"] == 0.0
    assert set(times.seconds) == set(KINDS)


def test_what_a_kill_made_it_do_again_does_not_count() -> None:
    first = Session(0.0, 100.0, 0, 100, {"steps": 80.0, "compiling": 15.0})
    second = Session(130.0, 190.0, 75, 150, {"steps": 45.0, "data": 5.0, "starting": 10.0})
    spent = add_up([first, second])
    assert spent.wall == 190.0
    assert spent.parts == pytest.approx(
        {
            "steps": 60.0 + 45.0,
            "redone": 20.0,
            "stopped": 30.0,
            "compiling": 15.0,
            "data": 5.0,
            "starting": 10.0,
            "evaluation": 0.0,
            "checkpoints": 0.0,
            "other": 5.0,
        }
    )
    assert spent.goodput == pytest.approx(105 / 190)
    assert str(spent).startswith("55.3% of 3 min 10 s in steps; 15.8% stopped, 10.5% redone")


def test_nothing_yet_is_no_goodput() -> None:
    assert add_up([]).goodput == 0.0
    assert add_up([Session(5.0, 5.0, 0, 0)]).goodput == 0.0


def test_sessions_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    for first in (0, 7):
        log = SessionLog(path, Times(), first)
        log.update(first + 5, now=True)
        log.update(first + 6)  # too soon to be written
    sessions = read_sessions(path)
    assert [(x.first_step, x.last_step) for x in sessions] == [(0, 5), (7, 12)]
    path.write_text(json.dumps([{"began": 1}]))
    assert read_sessions(path) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (12.0, "12 s"),
        (245.0, "4 min 5 s"),
        (3600.0, "1 h 0 min"),
        (2 * 86400 + 3 * 3600 + 59.0, "2 d 3 h"),
    ],
)
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
