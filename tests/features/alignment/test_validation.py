"""The validation of an aligned network in this process, of one that is trained as far as anybody looks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.detector.alignment import alignment_measures, save_alignment
from mmray.engine import Progress
from mmray.errors import InputError
from mmray.features.alignment.job import Aligned, run_alignment
from mmray.features.alignment.settings import AlignmentSettings, alignment_settings
from mmray.features.alignment.training import open_pair
from mmray.models.loading import digest, resolve
from mmray.runs.driver import drive_analysis
from mmray.storage import open_store
from tests.support.scenes import scenes, write

Asked = Callable[..., AlignmentSettings]


@pytest.fixture(scope="module")
def asked(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder, model = tmp_path_factory.mktemp("alignment"), str(tiny("llava"))
    data = write(folder / "data.parquet", scenes(4))
    known = {"tower": model, "model": model, "data": data, "validate_on": data, "hidden": 16, "draws": 20}
    known["out"] = str(folder / "out")
    return lambda **settings: alignment_settings({**known, "local": True, **settings})


@pytest.fixture(scope="module")
def validated(asked: Asked) -> Aligned:
    """Put an untrained network where a trained one would be, and validate it."""
    settings = asked()
    store = open_store(settings.out)
    digests = {name: digest(resolve(getattr(settings, name))) for name in ("tower", "model")}
    training = {"step": 1, "seen": 4, "lost": 0, "loss": 0.5}
    pair = open_pair(settings)
    torch.manual_seed(1)  # by some random weights the model writes the image's own token at every sample
    network = pair.network(settings.network, settings.hidden)
    save_alignment(store, network, {"digests": digests, "training": training})
    told: list[Progress] = []
    done = run_alignment(settings, told.append)
    assert [(progress.done, progress.total) for progress in told] == [(0, 4), (4, 4), (4, 4)]
    return done


def units(settings: AlignmentSettings) -> dict[str, float]:
    """Return what units committed, and when."""
    shards = Path(settings.out).glob("validation/*/shards/*/*")
    return {str(file): file.stat().st_mtime for file in shards}


@pytest.mark.slow
def test_a_trained_network_is_validated_without_ray(asked: Asked, validated: Aligned) -> None:
    assert (validated.images, validated.steps, validated.quarantined) == (4, 1, {})
    assert validated.measures["recall"]["n"] + validated.failures == 4
    assert alignment_measures(asked().out) == validated.measures


@pytest.mark.slow
def test_a_second_call_does_nothing_again(asked: Asked, validated: Aligned) -> None:
    before = units(asked())
    assert before
    assert run_alignment(asked()).measures == validated.measures
    assert units(asked()) == before


@pytest.mark.slow
def test_other_intervals_need_no_other_answers(asked: Asked, validated: Aligned) -> None:
    before = units(asked())
    again = run_alignment(asked(draws=40))
    assert units(asked()) == before
    for name, row in validated.measures.items():
        assert (again.measures[name]["after"], again.measures[name]["n"]) == (row["after"], row["n"]), name
    run_alignment(asked(pope_objects=2))
    assert len(units(asked())) == 2 * len(before)


@pytest.mark.slow
def test_a_second_driver_is_refused(asked: Asked, validated: Aligned) -> None:
    with drive_analysis(asked().out), pytest.raises(InputError, match="another driver is at work"):
        run_alignment(asked())


def test_training_in_this_process_is_refused(asked: Asked, tmp_path: Path) -> None:
    refused = r"^--local: .*/new is not trained yet, and the training needs Ray; leave --local out$"
    with pytest.raises(InputError, match=refused):
        run_alignment(asked(out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"draws": 7}, True),
        ({"validate_on": "elsewhere"}, True),
        ({"data": "elsewhere"}, True),
        ({"workers": 2}, True),
        ({"epochs": 2}, False),
        ({"seed": 1}, False),
    ],
)
def test_what_a_training_is_known_by(asked: Asked, change: dict[str, Any], same: bool) -> None:
    digests = {"data": "x"}
    assert (asked().fingerprint(digests) == asked(**change).fingerprint(digests)) == same
    assert asked().fingerprint(digests) != asked().fingerprint({"data": "y"})
