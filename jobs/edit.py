"""An edit as a Ray job; every setting of `mmray edit` is one of its configuration.

ray job submit --working-dir . -- python jobs/edit.py --config jobs/configs/edit.yaml source=cat target=dog out=s3://bucket/edits/cat-dog
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("edit")
