"""What may be in a damaged file of a run, and which files those may be."""

import json

STRANGE = json.dumps(
    {"fingerprint": "f", "result_settings": 1, "digests": [], "settings": "s", "shards": "x", "sizes": ["y"]}
    | {"made_from": {}, "headline": {}, "tables": {"letters": [{"key": 3, "checksum": {"size": 1, "sha256": 2}}]}}
).encode()
"""Keys as they should be, and nothing else."""

CONTENTS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"shard_id": 0, "samples": "x"}',
    b'{"fingerprint": 3}',
    STRANGE,
    None,
)

PLACES = ("run.json", "manifest.json", "receipts/000000.json", "aside/000001.json", "lease", "snapshot")
