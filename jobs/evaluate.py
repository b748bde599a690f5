"""Run `mmray evaluate` as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/evaluate.yaml edit=s3://bucket/edits/cat-dog
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("evaluate")
