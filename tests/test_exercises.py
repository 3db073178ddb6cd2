"The course's exercises: each lesson has two, and their solutions run and print what its page shows."
import contextlib
import io
import re

import pytest
from conftest import ROOT

COURSE = ROOT/"docs/learn"
LESSONS = sorted(COURSE.glob("[0-9]*.md"))
CODE = re.compile(r"```python\n(.+?)```(?:\n\n```\n(.+?)```)?", re.S) # and what it prints, where the page shows it
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    "A folder after the course's setup: its demonstrations are recorded."
    folder = tmp_path_factory.mktemp("course")
    with contextlib.chdir(folder): exec(CODE.search((COURSE/"index.md").read_text())[1], {})
    return folder


def printed(code, names):
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(code, names)
    return out.getvalue()


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_solutions(lesson, workplace):
    text, names = lesson.read_text(), {"__name__": "lesson"}
    assert re.findall(r"^\*\*(\d)\. ", text, re.M) == ["1", "2"], "two exercises"
    assert text.count("<summary>Solution</summary>") == sum(bool(shown) for _, shown in CODE.findall(text)) == 2
    with contextlib.chdir(workplace):
        for code, shown in CODE.findall(text):
            found = printed(code, names)
            assert NUMBER.sub("#", found) == NUMBER.sub("#", shown), found
            numbers = [[float(x) for x in NUMBER.findall(t)] for t in (found, shown)]
            assert numbers[0] == pytest.approx(numbers[1], rel=.1, abs=.02), found # machines round differently
