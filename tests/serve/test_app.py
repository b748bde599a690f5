"""Only who has the token is answered, on this machine's own names; bad requests are one line."""

import json
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from mmray.runs.run import open_run
from mmray.runs.snapshots import SnapshotWriter, newest
from mmray.storage import open_store
from tests.support.served import TOKEN, Client, serving

PATHS = (
    "",
    "data/index.js",
    "plotly.min.js",
    "part?key=c:dog",
    "image?id=x",
    "concepts",
    "neurons",
    "search?words=dog",
)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_told_without_the_token(ask: Client, path: str) -> None:
    for token in ("", "wrong", TOKEN[:-1], f"{TOKEN}x", "ü"):
        answer = ask(path, token=token.encode().decode("latin-1"))
        assert answer.status == 403
        assert b"dog" not in answer.body
    assert ask(path).status in (200, 404)


def test_the_token_of_an_address_becomes_a_cookie_and_leaves_the_address(ask: Client) -> None:
    answer = ask(f"?token={TOKEN}&a=1", token="")
    assert answer.status == 307
    assert answer.headers["location"] == "/?a=1"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"mmray-{ask.port}={TOKEN};")
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert ask("?token=wrong", token="").status == 403


def test_another_host_name_is_refused(ask: Client) -> None:
    assert ask("", host="evil.example").status == 400
    assert ask("", host=f"localhost:{ask.port}").status == 200


def test_posts_need_the_token_too(ask: Client) -> None:
    for path in ("sql", "map", "compare"):
        assert ask(path, {"query": "select 1"}, token="").status == 403


def test_pages_may_load_from_nowhere_else(ask: Client) -> None:
    answer = ask("")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert b"http://" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("part", None),
        ("neurons?layer=seven", None),
        ("concepts?count=many", None),
        ("sql", {}),
        ("sql", []),
        ("map", {"sample": "nothing", "neurons": "L0.u0"}),
        ("map", {"image": "no base64!", "neurons": "L0.u0"}),
        ("compare", {"image": "aGVsbG8=", "neurons": "L0.u0"}),
    ],
)
def test_a_bad_request_is_one_line(ask: Client, path: str, body: object) -> None:
    answer = ask(path, body)
    assert answer.status == 400
    assert "\n" not in answer.json["error"]


def test_what_is_not_there_is_not_found(ask: Client) -> None:
    for key in ("c:no such noun", "n:L99.u0", "n:what", "x:"):
        assert ask("part", key=key).status == 404
    assert ask("image", id="../../etc/passwd").status == 404
    assert ask("tables/rankings.parquet").status == 404


def test_a_page_shows_tables_that_were_written_after_the_start(dogs: Path, tmp_path: Path) -> None:
    shutil.copytree(dogs, tmp_path / "run")
    store = open_store(tmp_path / "run")
    with serving(tmp_path / "run") as ask:
        assert ask("concepts", words="dog").json["total"] >= 1
        before = newest(store, "census")
        assert before is not None
        writer = SnapshotWriter(store, "census", 9)
        for name in before.tables:
            table = open_run(tmp_path / "run").table(name)
            others = table.filter(pc.not_equal(table["concept"], "dog")) if "concept" in table.column_names else table
            writer.add(name, others)
        writer.commit(before.made_from, before.headline)
        index = json.loads(ask("data/index.js").body.decode().removeprefix("var DATA = ").removesuffix(";"))
        assert "dog" not in {row["name"] for row in index["index"]["concepts"]}
        assert ask("part", key="c:dog").status == 404
