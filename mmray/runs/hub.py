"""Upload a run's tables and its card to the Hugging Face hub, as a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmray.errors import InputError
from mmray.runs.card import CARD, card
from mmray.runs.run import Run

PRIVATE_TABLES = ("errors",)
"""Tables that stay: their messages name files of this machine."""
REPORT = "report.html"


def push_run(
    run: Run, repository: str, *, private: bool = False, report: bytes | None = None, endpoint: str | None = None
) -> str:
    """Upload a run's tables and card to the data set `repository` (ORGANISATION/NAME); return its address.

    The data set is created if it isn't there. What is there already is not uploaded again. `report` is a page to upload
    with it, see `shareable_report`. Raises InputError if the run has no tables, or the hub refuses.
    """
    # Imported late: reading a run needs no hub.
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    if "rankings" not in run.tables:
        raise InputError(f"{run.uri}: the census has not ended, so there are no tables to upload; run it again")
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory() as folder:
        files = dict(_files(run, Path(folder))) | ({REPORT: report} if report is not None else {})
        try:
            url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            api.create_commit(
                repository,
                [CommitOperationAdd(path, content) for path, content in files.items()],
                commit_message=f"Tables of a census of {run.info['data']['samples']:,} samples",
                repo_type="dataset",
            )
        except HFValidationError as error:
            raise InputError(f"{repository}: no name of a data set ({_line(error)}); give ORGANISATION/NAME") from error
        except LocalTokenNotFoundError as error:
            raise InputError("no Hugging Face token here; run hf auth login, or set HF_TOKEN") from error
        except HfHubHTTPError as error:
            raise InputError(
                f"{repository}: the hub refuses ({_line(error)}); check the name, and that your token may write"
            ) from error
        # The hub's own library has changed from one HTTP client to another: this is the base of each one's errors.
        except (HTTPError, OSError) as error:
            raise InputError(f"{api.endpoint}: can't be reached ({_line(error)})") from error
    return str(url)


def _files(run: Run, folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield the path of each file in the data set, and its content or where it lies on this machine."""
    store = run.folder.store
    yield CARD, card(store, run.info, without=PRIVATE_TABLES).encode()
    for entry in store.list("tables/"):
        if entry.key.split("/")[1].removesuffix(".parquet") in PRIVATE_TABLES:
            continue
        local = Path(store.uri) / entry.key
        if not local.is_file():
            # On S3: one file at a time is in memory, and all are on disk.
            local = folder / entry.key
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(store.read(entry.key))
        yield entry.key, str(local)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
