"""Run `mmray refresh` as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/refresh.py --config jobs/configs/refresh.yaml limit=0.2
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("refresh")
