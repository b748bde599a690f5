"""All commands: importing a module registers its commands."""

import mmray.cli.demo
import mmray.cli.features
import mmray.cli.models
import mmray.cli.report
import mmray.cli.status
import mmray.features.alignment.command
import mmray.features.census.command
import mmray.features.editing.command
import mmray.features.evaluation.command
import mmray.features.hallucination.command
import mmray.features.pipeline.command
import mmray.features.properties.command
import mmray.features.saliency.command
import mmray.features.select.command
import mmray.features.selectivity.command  # noqa: F401
