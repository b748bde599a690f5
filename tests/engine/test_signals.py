"""SIGTERM, which clusters send, and Ctrl-C end a command alike: one line, and the lease is released."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmray.engine.session import own_sigterm

CENSUS = """
    import signal, sys, time, types
    from mmray.cli import main
    from mmray.runs.lease import hold_lease
    from mmray.storage import open_store

    def run_census(settings, *_):
        with hold_lease(open_store(settings.out)):
            print("at work", flush=True)
            time.sleep(60)

    # A shell's background job ignores Ctrl-C, and so does all that it starts: this is a command in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["mmray.features.census.job"] = types.SimpleNamespace(run_census=run_census)
    main(lambda: ["census", "--model=demo", "--data=demo", f"--out={sys.argv[1]}"])
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_stopped_says_so_and_lets_go(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CENSUS), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "at work\n"
        driver.send_signal(sent)
        _, said = driver.communicate(timeout=30)
    assert driver.returncode == status
    assert said == f"mmray: stopped; run the same command again to resume {tmp_path}\n"
    assert json.loads((tmp_path / "lease/000001.json").read_text())["released"]


def test_ray_does_not_take_the_place_of_our_handler() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with own_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        assert signal.getsignal(signal.SIGTERM) is stop
        with pytest.raises(KeyboardInterrupt), own_sigterm():
            sys.exit(15)
    finally:
        signal.signal(signal.SIGTERM, before)
