"""Run `mmray census` as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/census.py --config jobs/configs/demo.yaml limit=64 out=s3://bucket/runs/demo
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("census")
