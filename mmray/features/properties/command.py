"""The command `properties`."""

from __future__ import annotations

from typing import Any

from mmray.features.properties.settings import PropertySettings, property_settings
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
    group="Understand",
    examples=("mmray properties runs/llava", "mmray properties runs/llava --concepts 20 --only maps"),
)
@with_settings(PropertySettings)
def properties(run: RunArgument, as_json: AsJson = False, **settings: Any) -> None:
    """Measure what a run's neurons mean, with controls, and draw heat maps."""
    from mmray.features.properties.job import PropertiesJob
    from mmray.features.properties.view import properties as show
    from mmray.runs.run import open_run

    checked = property_settings({"run": run, **settings})
    done = run_with_progress(PropertiesJob(checked))
    opened = open_run(run)
    if as_json:
        table = opened.optional("properties")
        measured = opened.properties().to_pylist() if table is not None else []
        say_json(done.summary() | {"properties": measured})
    else:
        if checked.only != "maps":
            found = opened.properties()
            console.print(show(found))
            measured_properties = found["property"].to_pylist()
            if "image_invariance" in measured_properties and "region_invariance" not in measured_properties:
                say("no region invariance and no gradient: the image is not in the decoder's sequence")
        counts = f"{done.headline['concepts']:,} concepts, {done.headline['heatmaps']:,} heat maps"
        say(f"{counts} in {done.seconds:.0f} s → {run}")
        say_next(command_line("report", run))
    finish(done, "concept", quiet=as_json)
