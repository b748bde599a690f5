"""Run `mmray edit` as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/edit.py --config jobs/configs/edit.yaml source=cat target=dog out=s3://bucket/edits/cat-dog
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("edit")
