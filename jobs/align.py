"""Run `mmray align` as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/align.py --config jobs/configs/align.yaml out=s3://bucket/aligned/owlvit
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("align")
