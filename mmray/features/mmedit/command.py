"""The command `mmedit`."""

from __future__ import annotations

from typing import Any

from mmray.features.mmedit.settings import MmeditSettings, mmedit_settings
from mmray.terminal.options import (
    AsJson,
    RunArgument,
    app,
    command_line,
    console,
    finish,
    run_with_progress,
    say,
    say_json,
    say_next,
    with_settings,
)


@app.command(
    group="Edit",
    examples=(
        "mmray mmedit runs/llava --vqa vqa_eval.json --captioning caption_eval_edit.json",
        "mmray mmedit runs/llava --vqa vqa_eval.json --methods learned,ft-l,ike --limit 100",
    ),
)
@with_settings(MmeditSettings)
def mmedit(run: RunArgument, as_json: AsJson = False, **settings: Any) -> None:
    """Compare edit methods on MMEdit's records."""
    from mmray.features.mmedit.editors import LEFT_OUT
    from mmray.features.mmedit.job import MmeditJob
    from mmray.features.mmedit.view import tables
    from mmray.runs.run import open_run

    done = run_with_progress(MmeditJob(mmedit_settings({"run": run, **settings})))
    rows = open_run(run).table("mmedit")
    if as_json:
        say_json(done.summary() | {"mmedit": rows.to_pylist()})
    else:
        for table in tables(rows):
            console.print(table)
        say(LEFT_OUT)
        say(f"{done.done:,} records in {done.seconds:.0f} s → {run}")
        say_next(command_line("report", run))
    finish(done, "record", quiet=as_json)
