"""The only room that imports ray: actors, the census driver, the pipeline."""
