"""Commands run in this process: exit codes, and the one line of a refusal."""

import pytest

from attn_notes.cli import main


@pytest.fixture
def run():
    """The exit code of a command."""
    return lambda *argv: main([str(word) for word in argv])


@pytest.fixture
def refused(run, capsys):
    """The one line of complaint about a command that is refused with exit code 2."""

    def ask(*argv):
        capsys.readouterr()
        code, seen = run(*argv), capsys.readouterr()
        assert (code, seen.out, seen.err.count("\n")) == (2, "", 1), seen.err
        return seen.err

    return ask


@pytest.fixture
def ask(run, capsys):
    """The lines that a command prints, which says nothing else."""

    def ask(*argv):
        capsys.readouterr()
        code, seen = run(*argv), capsys.readouterr()
        assert (code, seen.err) == (0, "")
        return seen.out.split("\n")[:-1]

    return ask
