"""Command: where in an image a word comes from, for one picture or measured over a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmray.detector.view import say_alignment
from mmray.errors import InputError
from mmray.features.saliency.settings import SaliencySettings, saliency_settings
from mmray.terminal.options import (
    AsJson,
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
    examples=("mmray saliency runs/llava", "mmray saliency --model demo --image dog.png --word dog --out dog.html"),
)
@with_settings(SaliencySettings)
def saliency(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Folder of a run; without it, --model and --image.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, hub id or demo, for a single picture.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture's file.")] = None,
    word: Annotated[str | None, typer.Option(help="Word of the caption to explain, true or not.")] = None,
    caption: Annotated[str | None, typer.Option(help="Caption with the word; default: the model's own.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt before the caption; default: that of a census.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write: .html (all maps), or .png (the first method's).")
    ] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Show where in an image a word comes from, or measure it over a run."""
    # One command for both, because both answer where a word comes from, with the same options of methods.
    if run is None:
        if model is None or image is None or word is None:
            raise InputError("saliency: give a RUN, or --model, --image and --word")
        checked = saliency_settings({"run": "", **settings})
        _explain_picture(
            model, image, word, caption, prompt, out or Path(f"saliency-{word}.html"), checked, as_json=as_json
        )
        return
    if any(option is not None for option in (model, image, word, caption, prompt, out)):
        raise InputError(
            "saliency: --model, --image, --word, --caption, --prompt and --out are for one picture, not a RUN"
        )
    _measure_run(saliency_settings({"run": run, **settings}), as_json=as_json)


def _explain_picture(
    name: str,
    file: Path,
    word: str,
    caption: str | None,
    prompt: str | None,
    out: Path,
    settings: SaliencySettings,
    *,
    as_json: bool,
) -> None:
    from mmray.detector.joint import join_if_given
    from mmray.features.saliency.methods import chosen_methods
    from mmray.features.saliency.model import explain, load_model
    from mmray.features.saliency.render import numbers, over, page
    from mmray.models.loading import require_images
    from mmray.neurons.model import open_image

    if out.suffix not in (".html", ".png"):
        raise InputError(f"--out {out}: give a name that ends in .html or .png")
    require_images(name, "mmray saliency")
    picture = open_image(file)
    assert picture is not None
    model = load_model(name)
    joint = join_if_given(model, settings.detector, settings.alignment)
    methods = chosen_methods(settings.methods, detector=joint is not None)
    explanation = explain(model, joint, picture, word, caption, methods=methods, prompt=prompt)
    if out.suffix == ".png":
        over(picture, explanation.maps[methods[0]], explanation.covers).save(out)
    else:
        out.write_text(page(picture, word, explanation), encoding="utf-8")
    rows = numbers(explanation)
    if as_json:
        described = {"caption": explanation.caption, "word": word, "probability": explanation.probability, "maps": rows}
        say_json(described | {"out": str(out)})
        return
    say(f"“{explanation.caption}” · P({word}) = {explanation.probability:.3f}", "bold")
    say_alignment(settings.alignment)
    for row in rows:
        say(f"  {row['method']:<16} {row['lowest']:>9.4f} to {row['highest']:<9.4f} at {row['x']:.2f}, {row['y']:.2f}")
    say(f"→ {out}")


def _measure_run(settings: SaliencySettings, *, as_json: bool) -> None:
    from mmray.features.saliency.job import SaliencyJob
    from mmray.features.saliency.view import saliency as show
    from mmray.runs.run import open_run

    done = run_with_progress(SaliencyJob(settings))
    rows = open_run(settings.run).table("saliency")
    if as_json:
        say_json(done.summary() | {"saliency": rows.to_pylist()})
    else:
        console.print(show(rows))
        say_alignment(settings.alignment)
        counts = f"{done.headline['words']:,} words of {done.headline['images']:,} images"
        say(f"{counts} in {done.seconds:.0f} s → {settings.run}")
        say_next(command_line("report", settings.run))
    finish(done, "image", quiet=as_json)
