"""Status, sweep and verification on every kind of storage: S3, disks, and disks without hard links."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.engine import checked
from mmray.engine import run as run_job
from mmray.features import FEATURES, Feature
from mmray.storage import Store, open_store
from tests.support.command import Answer
from tests.support.letters import LINES
from tests.support.words import LetterJob, LetterSettings

Mmray = Callable[..., Answer]
pytestmark = pytest.mark.slow


@pytest.fixture(params=["local", "without links", "s3"])
def counted(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder with a finished toy analysis."""
    monkeypatch.setitem(FEATURES, "letters", Feature("letters", (), "mmray letters RUN", ("letters",), "lines"))
    place = str(tmp_path / "run")
    if request.param == "s3":
        place = f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/run"
    elif request.param == "without links":

        def refuse(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("os.link", refuse)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    asked = {"run": place, "text": str(tmp_path / "text.txt"), "local": True}
    run_job(LetterJob(checked(LetterSettings, asked)))
    return open_store(place)


def part_of(store: Store, unit: int) -> str:
    (key,) = [e.key for e in store.list("letters/") if f"/shards/{unit:06d}/" in e.key and "-counts." in e.key]
    return key


def test_every_store_tells_the_same(mmray: Mmray, counted: Store) -> None:
    found = json.loads(mmray("status", counted.uri, "--json").out)["analyses"]
    assert [(one["title"], one["units_done"], one["pending"], one["tables"]) for one in found] == [
        ("letters", 10, 0, "current")
    ]
    assert found[0]["driver"]["state"] == "ended"


def test_every_store_is_verified(mmray: Mmray, counted: Store) -> None:
    answer = mmray("status", counted.uri, "--verify", "--json")
    assert answer.status == 0
    # Ten receipts, two parts of each, a snapshot with two files, and their copies.
    verified = json.loads(answer.out)["verified"]
    assert (verified["files"], verified["problems"], verified["foreign"]) == (10 + 20 + 1 + 2 * 2, [], [])
    key = part_of(counted, 3)
    counted.put(key, counted.read(key)[:-1])
    answer = mmray("status", counted.uri, "--verify", "--json")
    assert answer.status == 3
    (problem,) = json.loads(answer.out)["verified"]["problems"]
    assert problem["path"] == f"{counted.uri}/{key.partition('~')[0]}"


def test_every_store_is_swept(mmray: Mmray, counted: Store) -> None:
    late = part_of(counted, 3).rpartition("/")[0] + "/0badcafe-counts.parquet"
    counted.put(late, b"late")
    attempts = [entry.key for entry in counted.list("letters/") if "/attempts/" in entry.key]
    swept = json.loads(mmray("status", counted.uri, "--sweep", "--json").out)["swept"]
    assert (swept["objects"], swept["young"], swept["left"]) == (1 + len(attempts), 0, [])
    assert not counted.exists(late)
    answer = mmray("status", counted.uri, "--verify")
    assert answer.status == 0
