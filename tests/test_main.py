"""The command line: its version and its table of commands."""

import pkgutil

import pytest

import gluon_stable_ce
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


def test_no_module_hides_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(gluon_stable_ce.__path__)}
    assert 'metric' in modules
    assert not modules.intersection(gluon_stable_ce.__all__)
