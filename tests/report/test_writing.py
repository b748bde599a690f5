"""A report holds what the run's tables say, and nothing that the data says can become markup."""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmray.errors import InputError
from mmray.features.editing.report import read_edits
from mmray.features.evaluation.tables import PARTS
from mmray.report import fitting
from mmray.report.content import gather, samples_of
from mmray.report.pages import write_whole
from mmray.report.writing import write_report
from mmray.runs.run import Run, open_run
from mmray.runs.tables import to_bytes
from mmray.storage import open_store
from tests.support.dogs import dog_run


@pytest.fixture(scope="module")
def dogs(shared: Callable[..., Path]) -> Run:
    return open_run(shared("dogs", dog_run) / "run")


@pytest.fixture(scope="module")
def page(dogs: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return Path(write_report(dogs, tmp_path_factory.mktemp("page") / "report.html")).read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_concepts_are_those_of_the_rankings(dogs):
    content = gather(dogs)
    assert [row["name"] for row in content.index["concepts"]] == list(dogs.concepts)
    for name, shown in content.concepts.items():
        ranked = {row["neuron"]: row for row in dogs.rank(name, 100).to_pylist()}
        assert shown["n"] == dogs.concepts[name]
        assert shown["neurons"][0]["neuron"] == dogs.rank(name, 1)["neuron"][0].as_py()
        for row in shown["neurons"]:
            assert row["score"] == pytest.approx(ranked[row["neuron"]]["score"], rel=1e-3)
            assert row["specific"] == pytest.approx(ranked[row["neuron"]]["specific"], rel=1e-3)
            # What it writes is the table's, by the sign that it has at this concept.
            assert row["tokens"] == ranked[row["neuron"]]["tokens"]
            assert row["negative"] == (ranked[row["neuron"]]["activation"] < 0)


def test_every_neuron_named_has_a_page_and_every_page_its_facts(dogs):
    content = gather(dogs)
    named = {row["neuron"] for shown in content.concepts.values() for row in shown["neurons"]}
    assert named == set(content.neurons)
    for name in sorted(named)[:5]:
        facts, shown = dogs.neuron(name), content.neurons[name]
        assert shown["tokens"] == facts["tokens"]
        assert [row["id"] for row in shown["examples"]] == [row["sample_id"] for row in facts["examples"]]
        assert {row["name"] for row in shown["concepts"]} <= {row["concept"] for row in facts["concepts"]}
        negative = {row["concept"]: row["activation"] < 0 for row in facts["concepts"]}
        assert all(row["negative"] == negative[row["name"]] for row in shown["concepts"])


def test_layers_add_up(dogs):
    layers = gather(dogs).index["layers"]
    assert [row["width"] for row in layers] == dogs.info["model"]["widths"]
    for kind in ("score", "specific"):
        assert sum(row[kind] for row in layers) == pytest.approx(1, abs=0.01)


def test_heat_maps_are_the_tables(dogs):
    content = gather(dogs)
    rows = dogs.table("heatmaps").to_pylist()
    assert rows
    for row in rows:
        if row["neuron"] is not None:
            (single,) = [
                one
                for one in content.neurons[row["neuron"]]["maps"]
                if (one["id"], one["concept"]) == (row["sample_id"], row["concept"])
            ]
            assert single["map"]["high"] == pytest.approx(max(row["values"]), rel=1e-3)
            continue
        shown = {entry["id"]: entry for entry in content.concepts[row["concept"]]["samples"]}[row["sample_id"]]
        kept = shown["maps"][row["method"]]
        assert (kept["rows"], kept["columns"]) == (row["rows"], row["columns"])
        assert kept["low"] == pytest.approx(min(row["values"]), rel=1e-3)
        assert kept["high"] == pytest.approx(max(row["values"]), rel=1e-3)


def test_properties_over_all_concepts_and_of_the_one(dogs):
    content = gather(dogs)
    assert {row["property"] for row in content.index["properties"]} >= {"sensitivity", "causal", "comparison"}
    (measured,) = [name for name, shown in content.concepts.items() if shown["properties"]]
    assert {row["method"] for row in content.concepts[measured]["properties"]} >= {"score", "layer-matched"}
    assert len(dogs.properties(measured)) > len(content.concepts[measured]["properties"])


def test_one_file_holds_everything_and_asks_for_nothing(dogs, page):
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside)
    data = data_of(page)
    for name in dogs.concepts:
        shown = data["parts"][f"c:{name}"]
        # The one broken picture of the data is the only one that is not there.
        assert all(row["id"] in data["images"] for row in shown["samples"]), name
    assert all(image.startswith("data:image/webp;base64,") for image in data["images"].values())


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_file_keeps_to_its_size_and_the_most_frequent_concepts(dogs, page, tmp_path, monkeypatch, fraction):
    """Of the bytes that pages and pictures take, only a fraction is left."""
    whole = gather(dogs)
    frame = len(write_whole(replace(whole, concepts={}, neurons={}), {}))
    monkeypatch.setattr(fitting, "LARGEST", int(frame + fraction * (len(page.encode()) - frame)))
    file = Path(write_report(dogs, tmp_path / "small.html"))
    assert file.stat().st_size <= fitting.LARGEST
    data = data_of(file.read_text(encoding="utf-8"))
    names = [row["name"] for row in data["index"]["concepts"]]
    assert 0 < len(names) < len(whole.concepts)
    assert names == list(dogs.concepts)[: len(names)]
    wanted = {name for part in data["parts"].values() for name in samples_of(part)}
    left_out = wanted & set(data_of(page)["images"]) - set(data["images"])
    assert bool(left_out) == data["index"].get("some_pictures", False)


@pytest.mark.slow
def test_pictures_that_fit_are_of_concepts_before_neurons(dogs, page, monkeypatch):
    content, size = gather(dogs), 30_000
    order = [name for name in content.samples() if name in data_of(page)["images"]]
    pictures = {name: bytes(size) for name in sorted(order)}
    for count in (0, 3, len(order)):
        monkeypatch.setattr(fitting, "LARGEST", len(write_whole(content, {})) + int((count + 0.5) * size * 4 / 3))
        kept = fitting.pictures_that_fit(content, pictures)
        assert list(kept) == order[:count]
        assert len(write_whole(content, kept)) <= fitting.LARGEST
    firsts = [page["samples"][0]["id"] for page in content.concepts.values()]
    of_neurons = {row["id"] for page in content.neurons.values() for row in page["examples"]}
    late = (
        of_neurons - set(content.of_sections()) - {row["id"] for p in content.concepts.values() for row in p["samples"]}
    )
    assert max(map(content.samples().index, firsts)) < min(map(content.samples().index, late), default=len(order))


def test_what_the_data_says_is_no_markup(page):
    assert "<script>alert" not in page
    assert any("<script>alert" in str(text) for text in data_of(page)["captions"].values())


def test_failures_are_told(dogs, page):
    told = data_of(page)["index"]["failures"]
    assert told["count"] == len(dogs.table("errors")) >= 1
    assert {row["stage"] for row in told["rows"]} == set(dogs.table("errors")["stage"].to_pylist())


def test_many_files_hold_the_same(dogs, page, tmp_path):
    place = Path(write_report(dogs, pages=tmp_path / "pages"))
    assert place.name == "index.html"
    whole, root = data_of(page), place.parent
    script = (root / "data" / "index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var DATA = ").removesuffix(";"))
    assert set(index["files"]) == set(whole["parts"])
    for key, file in index["files"].items():
        text = (root / file).read_text(encoding="utf-8")
        found_key, part, _ = json.loads("[" + text.removeprefix("receive(").removesuffix(")") + "]")
        assert found_key == key
        assert part == whole["parts"][key]
    for name, file in index["images"].items():
        assert (root / file).stat().st_size > 100, name
    assert "<script>alert" not in place.read_text(encoding="utf-8") + script


def test_without_the_data_there_are_no_pictures(dogs, tmp_path, monkeypatch):
    monkeypatch.setitem(dogs.info["settings"], "data", str(tmp_path / "gone.parquet"))
    shown = data_of(Path(write_report(dogs, tmp_path / "report.html")).read_text(encoding="utf-8"))
    assert shown["images"] == {}
    assert shown["parts"]


def edit_folder(folder: Path) -> None:
    import numpy as np
    import pyarrow as pa
    from safetensors.numpy import save

    store = open_store(folder)
    rows = {
        "layer": np.array([1, 1, 0]),
        "unit": np.array([4, 5, 6]),
        "delta": np.array([[3.0, 4.0], [0, 1], [0, 0]], dtype=np.float32),
    }
    store.put("edit.safetensors", save(rows))
    purposes = [{"kind": "swap", "source": "dog", "target": "cat"}]
    facts = {
        "purposes": purposes,
        "settings": {"sum": [{"wishes": [{"method": "learned"}]}, {"wishes": [{"method": "zero"}]}]},
        "facts": {"seconds": 2.5, "rows_changed": 3},
    }
    store.put("edit.json", json.dumps(facts).encode())
    numbers = {"before": 0.0, "after": 0.9, "low": 0.8, "high": 1.0}
    measures = {"reliability": numbers | {"n": 4, "protocol": "greedy"}, "chair_i": numbers | {"n": 0, "protocol": ""}}
    store.put("evaluation.json", json.dumps({"measures": measures, "data": None}).encode())
    captions = [
        {"sample_id": "a", "before": "a tree", "after": "a tree", "changed": False, "role": "unrelated"},
        {"sample_id": "b", "before": "a dog", "after": "a cat", "changed": True, "role": "source"},
    ]
    store.put("captions.parquet", to_bytes(pa.Table.from_pylist(captions, schema=PARTS["captions"])))


def test_edits_are_read_from_their_folders(dogs, tmp_path):
    edit_folder(tmp_path / "swap")
    (edit,) = read_edits(dogs, [str(tmp_path / "swap")])
    assert edit.name == "swap"
    assert edit.facts["purpose"] == "dog → cat"
    assert edit.facts["method"] == "learned · zero"
    assert [row["measure"] for row in edit.measures] == ["reliability"]
    assert edit.verdict
    assert edit.verdict["words"].startswith("does not take (0.9 of its captions, bound 0.95); not measured: ")
    assert [row["id"] for row in edit.captions] == ["b", "a"]
    assert edit.changed["layers"] == {0: 1, 1: 2}
    assert edit.changed["strongest"][0] == {"neuron": "L1.u4", "norm": 5.0}


def test_a_folder_without_an_edit_is_refused(dogs, tmp_path):
    with pytest.raises(InputError, match="no edit here"):
        read_edits(dogs, [str(tmp_path)])


@pytest.mark.slow
def test_a_report_needs_neither_torch_nor_ray(run, tmp_path):
    code = f"""
        import sys, mmray
        from mmray.report.writing import write_report
        write_report(mmray.open_run({run.uri!r}), {str(tmp_path / "report.html")!r})
        print(sorted({{"torch", "ray", "transformers", "torchvision"}} & set(sys.modules)))
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
