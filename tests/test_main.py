"""The command line: its version and its table of commands."""

import pytest

from gluon_stable_ce import __version__
from gluon_stable_ce.__main__ import COMMANDS, main


def test_version(capsys):
    with pytest.raises(SystemExit) as info:
        main(['--version'])
    assert info.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize('command', COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as info:
        main([command, '--help'])
    assert info.value.code == 0
    assert COMMANDS[command][1].split()[0] in capsys.readouterr().out


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as info:
        main(['demo'])
    assert info.value.code == 2
    assert "invalid choice: 'demo'" in capsys.readouterr().err
