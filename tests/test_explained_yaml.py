"""What `--print-config` prints: a file to read, which means what the settings mean."""

import dataclasses
import re
import typing

import pytest
import yaml

from dvi.config import load_config
from dvi.explained_yaml import COMMENT_COLUMN, WIDTH, explained_yaml
from dvi.settings import PaperConfig, ServeConfig, SpecBenchSettings, TrainConfig, WarmupConfig
from dvi.settings.explained import choices_of, explanations, types_of

SCHEMAS = (TrainConfig, ServeConfig, WarmupConfig, PaperConfig)
SECTIONS = {hint for schema in SCHEMAS for hint in types_of(schema).values()} | {SpecBenchSettings}
ODD = ["draft.companion_model=a#b", "draft.companion=model", "model.path='007'", "train.lr=1e-5"]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_is_there_and_reads_back_to_the_same_settings(schema, tmp_path):
    """Catches a key left out, a value that a comment swallows, and a text that becomes a number."""
    config = load_config(None, ODD, schema=schema)
    path = tmp_path / "printed.yaml"
    path.write_text(explained_yaml(config), encoding="utf-8")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: list(keys) for name, keys in written.items()} == {
        name: list(keys) for name, keys in dataclasses.asdict(config).items()
    }
    assert load_config(path, schema=schema) == config


@pytest.mark.parametrize("text", ["\n\n", "a # b", "é: \"x\"", "[1, 2]", "- ", "'", "null", "  "])
def test_any_text_in_a_list_survives_its_comment(text, tmp_path):
    """Catches a line break that ends the line before its comment, and quotes that are left out."""
    config = load_config(None, [{"sampling": {"stop_strings": [text, "x" * 90]}}])
    path = tmp_path / "printed.yaml"
    path.write_text(explained_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_comments_stand_in_one_column_and_no_line_of_the_defaults_is_too_long():
    """Catches a page that nobody can read."""
    lines = explained_yaml(ServeConfig()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    later = {re.search("#", line).start() for line in lines if line.startswith(" ") and line.lstrip().startswith("#")}
    assert later == {COMMENT_COLUMN}


def test_a_key_with_choices_shows_them_and_what_its_section_says():
    """Catches a list of choices in a comment that the settings no longer have."""
    (line,) = (line for line in explained_yaml(TrainConfig()).splitlines() if line.startswith("  mode:"))
    assert line.startswith("  mode: auto                       # auto | exact | fast: ") and "token ids equal" in line


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda section: section.__name__))
def test_what_a_section_says_is_of_its_own_keys(section):
    """Catches an explanation whose key was renamed: it would be taken for a part of the one before it."""
    names = set(explanations(section))
    assert names <= {entry.name for entry in dataclasses.fields(section)}
    for known in section.__mro__[:-1]:
        entries = re.findall(r"^    (\w+)  +\S", known.__doc__, re.MULTILINE)
        assert names.issuperset(entries), set(entries) - names


def test_choices_are_of_words_or_of_a_list_of_them():
    """Catches numbers and free texts taken for choices."""
    assert choices_of(typing.Literal["a", "b"]) == ("a", "b") == choices_of(tuple[typing.Literal["a", "b"], ...])
    assert choices_of(int) == choices_of(tuple[str, ...]) == choices_of(str | None) == ()
