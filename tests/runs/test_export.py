"""Exported files hold the tables' rows, and Neuronpedia's batches have the fields that it reads."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mmray.runs.export import export_csv, export_neuronpedia
from mmray.runs.run import Run
from tests.support.command import Answer

FEATURE = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values"),
    *("freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist", "vector"),
}
"""Fields of a feature in SAEDashboard's `NeuronpediaDashboardFeature`."""
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def test_csv_has_every_row_of_every_table(run: Run, tmp_path: Path) -> None:
    files = export_csv(run, tmp_path / "csv")
    assert [file.stem for file in files] == run.tables
    for file in files:
        table = run.table(file.stem)
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        assert len(rows) == len(table)
        for field in table.schema:
            for text, value in list(zip((row[field.name] for row in rows), table[field.name].to_pylist(), strict=True))[
                :50
            ]:
                if pa.types.is_nested(field.type):
                    assert (json.loads(text) if text else None) == value
                elif isinstance(value, float):
                    assert float(text) == pytest.approx(value)
                elif isinstance(value, str):
                    assert text == value


def test_neuronpedia_gets_each_ranked_neuron_once_with_what_the_tables_know(run: Run, tmp_path: Path) -> None:
    found = {}
    for file in export_neuronpedia(run, tmp_path / "neurons"):
        batch = json.loads(file.read_text(encoding="utf-8"))
        assert set(batch) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
        assert file.parent.name == f"{batch['layer']}-{batch['sae_set']}"
        for feature in batch["features"]:
            assert set(feature) == FEATURE
            assert all(set(one) == ACTIVATION for one in feature["activations"])
            found[f"L{batch['layer']}.u{feature['feature_index']}"] = feature
    ranked = [row for row in run.table("neurons").to_pylist() if row["n_concepts"]]
    assert list(found) == [row["neuron"] for row in ranked]
    for row in ranked[:10]:
        facts = run.neuron(row["neuron"])
        feature = found[row["neuron"]]
        assert (feature["pos_str"], feature["neg_str"]) == (facts["tokens"], facts["suppressed"])
        highest = [one for one in facts["examples"] if one["sign"] == 1]
        assert [one["tokens"] for one in feature["activations"]] == [[one["caption"]] for one in highest]
        assert [one["values"] for one in feature["activations"]] == [[one["activation"]] for one in highest]


def test_the_command_says_where_the_files_are(run: Run, tmp_path: Path, mmray: Callable[..., Answer]) -> None:
    answer = mmray("export", run.uri, "--csv", "--out", tmp_path / "csv")
    assert answer.out.splitlines()[0] == f"{len(run.tables)} files → {tmp_path / 'csv'}"
    assert mmray("export", run.uri, "--out", tmp_path / "x").refusal == "give --csv or --neuronpedia"
    (tmp_path / "file").write_text("")
    assert "choose another --out" in mmray("export", run.uri, "--csv", "--out", tmp_path / "file").refusal
