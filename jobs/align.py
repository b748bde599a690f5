"""An alignment as a Ray job; every setting of `mmray align` is one of its configuration.

ray job submit --working-dir . -- python jobs/align.py --config jobs/configs/align.yaml out=s3://bucket/aligned/owlvit
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("align")
