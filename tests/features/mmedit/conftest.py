"""Two records of each task, and a session whose edits keep little, on the demo."""

from pathlib import Path
from typing import Any

import pytest

from mmray.features.editing.dataset import EditDataset
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.mmedit.benchmark import Benchmark
from mmray.features.mmedit.record_edits import Session
from mmray.features.mmedit.settings import mmedit_settings
from mmray.runs.run import open_run
from tests.support.local_jobs import KEPT_TEXT
from tests.support.mmedit_files import write_records


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_records(tmp_path_factory.mktemp("mmedit") / "records", 3)


@pytest.fixture(scope="session")
def benchmark(demo: Any, coco_run: Path, files: tuple[Path, Path]) -> Benchmark:
    vqa, captioning = map(str, files)
    settings = mmedit_settings(
        {"run": str(coco_run), "vqa": vqa, "captioning": captioning, "kept": 6, "keep_text": KEPT_TEXT, "local": True}
    )
    session = Session(EditDataset(demo, open_run(coco_run)), settings)
    return Benchmark(session, BaselineReplies(demo, 8))
