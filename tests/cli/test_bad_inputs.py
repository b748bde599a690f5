"""What users get wrong, command by command: each is one line, status 2, and names what to do instead."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mmray.runs.run import Run
from tests.support.command import Answer

CENSUS = "census --local -m demo -o {T}/out"
BAD_INPUTS = {
    # The command line itself.
    "censu": "Did you mean 'census'",
    "status": "Missing argument 'RUN'; see mmray status --help",
    "neuron {RUN}": "Missing argument 'NEURON'; see mmray neuron --help",
    "census -m demo -d demo": "Missing option '--out' / '-o'; see mmray census --help",
    "plan -m demo": "Missing option '--data' / '-d'; see mmray plan --help",
    "evaluate {RUN} --data demo": "give --edit or --decoding, and not both",
    "rank {RUN} --kk 3": "Possible options: --k",
    "rank {RUN} --k 0": "greater than or equal to 1; see mmray rank --help",
    "serve {RUN} --port 99999": "less than or equal to 65535",
    "diff {RUN} {RUN} --limit 2": "less than or equal to 1",
    # Folders.
    "status {T}/empty": "no run here (no run.json); give a folder that mmray census wrote",
    "status {T}/none": "no run here (no run.json); give a folder that mmray census wrote",
    "rank s3:/bucket": "no bucket; write s3://BUCKET/PREFIX",
    "rank ftp://host/run": "use a local path or s3://bucket/prefix",
    "status ''": "an empty path; give a folder",
    "diff {RUN} {T}/empty": "give a folder that mmray census wrote",
    "refresh {T}/empty --local": "give a folder that mmray census wrote",
    "properties {T}/empty --local": "give a folder that mmray census wrote",
    "serve {T}/empty --port 0": "give a folder that mmray census wrote",
    "report {T}/empty": "give a folder that mmray census wrote",
    "report {RUN} --edit {T}/empty": "give a folder that mmray edit wrote",
    "evaluate {RUN} --edit {T}/empty --data demo --local": "give a folder that mmray edit wrote",
    "apply {T}/empty --model demo --out {T}/out": "give a folder that mmray edit wrote",
    # Questions to a run.
    "rank {RUN} brocoli": "no concept 'brocoli' in {RUN}; it has broccoli",
    "rank {RUN} broccoli --by rank": "choose from score, specific, selective, share",
    "diff {RUN} {RUN} --by share": "choose from score, specific",
    "neuron {RUN} 714": "write layer and unit as L7.u89",
    "neuron {RUN} L99.u0": "2 layers of",
    # Models and data.
    "census --local -m {T}/empty -d demo -o {T}/out": "give a Hugging Face checkpoint folder",
    f"{CENSUS} -d {{T}}/none.parquet": "no such file or folder; check the path",
    f"{CENSUS} -d {{T}}/bad.parquet": "write or copy it again",
    f"{CENSUS} -d {{T}}/empty": "no files there; check the path",
    f"{CENSUS} -d {{T}}/images": "name them: --image-column NAME --caption-column NAME",
    f"{CENSUS} -d http://host/data.parquet": "use a local path or s3://bucket/prefix",
    f"{CENSUS} -d demo --caption-column text": "it has sample_id, image, caption",
    f"{CENSUS} -d demo --nouns {{T}}/none.tsv": "give objects, hanta, textblob, auto or a file with one noun per line",
    "census --local -m demo -d demo -o {T}/bad.yaml": "choose another OUT",
    # Settings.
    f"{CENSUS} -d demo --limit -3": "limit = -3: Input should be greater than or equal to 1",
    f"{CENSUS} -d demo --limit few": "valid integer",
    f"{CENSUS} -d demo --score magic": "'contribution', 'gate', 'activation'",
    f"{CENSUS} -d demo --workers 5:2": "MIN:MAX such as 2:16",
    "selectivity {RUN} --by mood --local": "the run has domain, language",
    "edit {RUN} --source Ship --target ship --out {T}/edit": "--source and --target are the same word",
    "edit {RUN} --suppress object --out {T}/edit": "--suppress and --replacement are the same word",
    "edit {RUN} --source ship --out {T}/edit": "--source and --target go together",
    "hallucination {RUN} --doses 2": "--doses is for --neurons; give both",
    "hallucination {RUN} --ban-below 0.3": "--ban-below is for --neurons; give both",
    "hallucination {RUN} --neurons --ban-below 0.3": "--ban-below is for --interventions; give both",
    "hallucination {RUN} --neurons --interventions --ban-below 1.5": "--ban-below 1.5: give a probability above 0",
    "bias {RUN} --pair woman:man --question old? --unrelated cup": "--unrelated: give it twice",
    "hallucination {RUN} --neurons --pope {T}/pope.json": "--pope is not for --neurons; leave one out",
    "edit {RUN} --out {T}/edit": "give --source and --target, or --suppress, or --reduce-hallucination",
    "edit {RUN} --source rokcet --target sun --out {T}/edit": "it has rocket",
    "edit {RUN} --suppress ship --method magic --out {T}/edit": "'learned', 'null-space'",
    "push {RUN} 'no name'": "give ORGANISATION/NAME",
    "pipeline {T}/none.yaml": "give a YAML file such as jobs/configs/demo.yaml",
    "pipeline {T}/bad.yaml": "not YAML, line 1",
    "pipeline {T}/other.yaml": "a pipeline has census, steps, edits",
}


def test_there_are_forty() -> None:
    assert len(BAD_INPUTS) >= 40


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "images"):
        (folder / name).mkdir()
    (folder / "images/metadata.jsonl").write_text('{"file": "a.png"}\n')
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    (folder / "bad.yaml").write_text("a: [")
    (folder / "other.yaml").write_text("censuss: {}\n")
    return folder


@pytest.mark.parametrize("line", BAD_INPUTS)
def test_a_bad_input_is_one_line_that_names_the_fix(
    mmray: Callable[..., Answer], run: Run, places: Path, line: str
) -> None:
    words = shlex.split(line.format(RUN=run.uri, T=places))
    assert BAD_INPUTS[line].format(RUN=run.uri, T=places) in mmray(*words).refusal
    assert not (places / "out").exists()
