"""Run `mmray pipeline` (census, edits and their evaluations) as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/pipeline.yaml census.out=s3://bucket/runs/demo
"""

from mmray.cli.job import run_file_job

if __name__ == "__main__":
    run_file_job("pipeline")
