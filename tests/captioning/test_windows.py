"""The windows that long videos are cut into."""

import pytest

from vlmds.captioning.windows import grouped, parse_seconds, spans
from vlmds.errors import InputError, SampleError
from vlmds.video.pool import Clip


@pytest.mark.parametrize(
    ("clip", "duration", "expected"),
    [
        ((None, None), 60.0, [(0, 30), (30, 60)]),
        ((None, None), 65.0, [(0, 30), (30, 60), (60, 65)]),
        ((None, None), 62.9, [(0, 30), (30, 62.9)]),  # a remainder under 10% is merged into the previous window
        ((None, None), 10.0, [(0, 10)]),
        ((None, None), 1.0, [(0, 1)]),
        ((5.0, None), 60.0, [(5, 35), (35, 60)]),
        ((5.0, 41.0), 60.0, [(5, 35), (35, 41)]),
        ((None, 90.0), 60.0, [(0, 30), (30, 60)]),
    ],
)
def test_windows_cover_the_clip_once(clip, duration, expected):
    assert spans(Clip("v", *clip), duration, 30.0) == expected
    whole = spans(Clip("v", *clip), duration, None)
    assert whole == [(expected[0][0], expected[-1][1])]


def test_a_start_past_the_end_is_the_samples_error():
    with pytest.raises(SampleError, match="start past the end: 9 s of 5 s"):
        spans(Clip("v", 9.0), 5.0, None)


def test_a_window_of_nothing_is_refused():
    for window in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="must be 0.1 s or more"):
            spans(Clip("v"), 5.0, window)


def test_only_neighbours_of_full_length_are_read_together():
    todo = [(0, 2), (2, 4), (4, 6), (8, 10), (10, 12), (12, 13)]
    assert list(grouped(todo, 2.0, 2)) == [[(0, 2), (2, 4)], [(4, 6)], [(8, 10), (10, 12)], [(12, 13)]]
    assert list(grouped(todo, None, 9)) == [[span] for span in todo]


def test_lengths_are_written_as_people_do():
    for text, seconds in (
        ("30", 30),
        ("30s", 30),
        ("1m", 60),
        ("1m30s", 90),
        ("1h", 3600),
        ("2.5s", 2.5),
        ("1h1m1s", 3661),
    ):
        assert parse_seconds(text, "--window") == seconds
    for text in ("", "0", "-3", "5x", "1s1m", "nan", "0.01"):
        with pytest.raises(InputError, match="--window"):
            parse_seconds(text, "--window")
