"""Vision-language models, the only room that knows architectures: loading, parts, prompts, hooks, interventions."""
