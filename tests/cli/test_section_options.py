"""Options made from a settings section: what the section says, a verb's user is told and may say."""

from __future__ import annotations

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from dvi.cli.section_options import options_of, read_options
from dvi.config import checked
from dvi.settings import RIVALS, SpecBenchSettings

app, asked = typer.Typer(rich_markup_mode=None), []


@app.command()
@options_of(SpecBenchSettings, but=("warmups",))
def verb(model: str = "given", **options):
    asked.append(checked({"model": model} | read_options(SpecBenchSettings, options), SpecBenchSettings))


def settings_of(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return asked.pop()


def test_no_option_says_the_sections_defaults():
    """Catches a second set of defaults on the command line."""
    assert settings_of() == SpecBenchSettings(model="given")


def test_an_option_sets_the_key_of_its_name():
    """Catches a list that is not taken apart, a flag with a --no- form, and a number that stays text."""
    lists = ("--modes", "frozen, online", "--rivals", "all")
    found = settings_of(*lists, "--plain-padded", "--limit", "3", "--adapter", "a/b/")
    assert (found.modes, found.rivals) == (("frozen", "online"), RIVALS)
    assert (found.plain_padded, found.limit, str(found.adapter)) == (True, 3, "a/b")
    assert CliRunner().invoke(app, ["--no-plain-padded"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "warm"], "--modes must list some of frozen, online, online_untrained, got 'warm'"),
        (["--repetitions", "0"], "repetitions must be greater than or equal to 1, got 0; the default is 3"),
    ],
)
def test_what_the_section_refuses_its_option_refuses(arguments, message):
    """Catches a bound that holds in files only."""
    with pytest.raises(ValueError, match=message):
        settings_of(*arguments)


def test_help_says_what_the_section_says_and_leaves_out_what_is_not_asked():
    """Catches help of its own that drifts from the section's."""
    shown = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    assert "--warmups" not in shown and "--verify" not in shown
    assert shown.count("--") >= len(dataclasses.fields(SpecBenchSettings)) - 2
    assert "Questions of each task, 0 takes all 80." in shown
