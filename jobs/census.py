"""A census as a Ray job; every setting of `mmray census` is one of its configuration.

ray job submit --working-dir . -- python jobs/census.py --config jobs/configs/demo.yaml limit=64 out=s3://bucket/runs/demo
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("census")
