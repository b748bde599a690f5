"""The command line, run in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that bad input gets; fails unless that, and status 2, is all there is."""
        assert self.status == 2, (self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("mmray: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("mmray: ").rstrip("\n")


@pytest.fixture
def mmray(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Return what runs the command line as `mmray ARGUMENTS` does."""
    from mmray.cli import main

    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["mmray", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return call
