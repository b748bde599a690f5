"""Run `mmray perturb`, such as an audit of bias, as a Ray job; the configuration file holds its settings.

ray job submit --working-dir . -- python jobs/perturb.py --config jobs/configs/perturb.yaml out=s3://bucket/audits/confident
"""

from mmray.cli.job import run_job

if __name__ == "__main__":
    run_job("perturb")
