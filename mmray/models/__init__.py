"""Vision-language models: the only room that knows architectures — loading, parts, prompting, capture, interventions."""
