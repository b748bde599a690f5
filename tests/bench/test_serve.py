"""The drawn run of the benchmark has what its pages need."""

from pathlib import Path

from mmray.serve.live import LiveRun
from tests.bench import serve


def test_a_drawn_run_opens_and_its_rows_are_consistent(tmp_path: Path) -> None:
    serve.draw(tmp_path / "run", 300, widths=(512, 512), captions=400, occurrences=2000)
    live = LiveRun(str(tmp_path / "run"))
    assert live.index["index"]["run"]["neurons"] == 1024
    rankings = live.run.table("rankings")
    assert len(rankings) == 300 * serve.RANKED
    counts = dict(zip(rankings["concept"].to_pylist(), rankings["n"].to_pylist(), strict=True))
    assert counts == live.run.concepts
    name = live.catalog.most_frequent(1)[0]
    for key in (f"c:{name}", "n:L1.u511", "layers:"):
        assert live.part(key) is not None
    live.catalog.close()
