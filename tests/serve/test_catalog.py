"""Lists are searched, sorted and filtered as sorting all rows of the tables would."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmray.runs.run import Run, open_run
from mmray.serve.catalog import SORTED, Catalog


@pytest.fixture(scope="module")
def run(dogs: Path) -> Run:
    return open_run(dogs)


@pytest.fixture(scope="module")
def catalog(run: Run) -> Iterator[Catalog]:
    found = Catalog(run)
    yield found
    found.close()


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize(("table", "by"), [(table, by) for table, names in SORTED.items() for by in names])
def test_a_list_is_in_order(catalog: Catalog, table: str, by: str, down: bool) -> None:
    ask: Any = getattr(catalog, table)
    found = ask(by=by, down=down, count=10_000)
    assert found["total"] == len(found["rows"])
    values = [row[by] for row in found["rows"]]
    if table == "neurons" and by == "neuron":
        values = [(row["layer"], row["unit"]) for row in found["rows"]]
    assert values == sorted(values, reverse=down)
    assert ask(by=by, down=down, count=7)["rows"] == found["rows"][:7]


def test_concepts_are_those_of_the_run_with_their_highest_values(catalog: Catalog, run: Run) -> None:
    found = catalog.concepts(count=10_000)["rows"]
    assert {row["concept"]: row["n"] for row in found} == run.concepts
    for row in found[:10]:
        assert row["score"] == run.rank(row["concept"], 1)["score"][0].as_py()
        assert row["specific"] == run.rank(row["concept"], 1, "specific")["specific"][0].as_py()


def test_words_and_layers_filter(catalog: Catalog, run: Run) -> None:
    found = catalog.concepts("OG")
    assert {row["concept"] for row in found["rows"]} == {name for name in run.concepts if "og" in name}
    assert catalog.concepts("%")["total"] == 0
    rows = run.table("neurons").to_pylist()
    assert {row["neuron"] for row in catalog.neurons("l7.u10")["rows"]} == {
        row["neuron"] for row in rows if row["neuron"].startswith("L7.u10")
    }
    token = rows[3]["tokens"][0].lower()
    writers = {row["neuron"] for row in rows if token in [word.lower() for word in row["tokens"][:6]]}
    assert {row["neuron"] for row in catalog.neurons(token, count=5000)["rows"]} == writers
    own = catalog.neurons(token, layer=0, count=5000)["rows"]
    assert {row["neuron"] for row in own} == {name for name in writers if name.startswith("L0.")}


def test_a_search_puts_the_best_match_first(catalog: Catalog, run: Run) -> None:
    found = catalog.search(" Dog ")
    assert found["concepts"][0] == {"name": "dog", "n": run.concepts["dog"]}
    assert found["total"] == sum("dog" in name for name in run.concepts)
    assert catalog.search("L0.u1")["neurons"]
    assert catalog.search("no such thing") == {"concepts": [], "total": 0, "neurons": []}
