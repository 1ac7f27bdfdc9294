"""The help of every command: examples first, short enough to be read, and each example is one that is understood."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

import bench.command
import bench.gpu
import bench.parallel
from ffkernels import cli

LINES, COLUMNS = 40, 100


def helps() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser."""
    main = cli._parser()
    (commands,) = (action for action in main._actions if isinstance(action, argparse._SubParsersAction))
    parsers = {cli.PROGRAM: main} | {f"{cli.PROGRAM} {name}": parser for name, parser in commands.choices.items()}
    # `_parser` only names it.
    parsers[f"{cli.PROGRAM} bench"] = bench.command.parser()
    return parsers | {"python -m bench.gpu": bench.gpu.parser(), "python -m bench.parallel": bench.parallel.parser()}


of_each_command = pytest.mark.parametrize("program", helps())


@of_each_command
def test_a_help_fits_a_screen_and_begins_with_examples(program, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = helps()[program].format_help()
    assert len(text.splitlines()) <= LINES
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []
    usage, first = text.split("\n\n")[:2]
    assert usage.startswith(f"usage: {program} ")
    assert len(usage.splitlines()) == 1
    assert first.startswith("examples:\n  ")


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    (block,) = re.findall(r"^examples:\n((?:  .+\n)+)", parser.format_help(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@of_each_command
def test_examples_of_a_help_are_understood(program) -> None:
    parsers = helps()
    found = examples(parsers[program])
    assert len(found) > 1
    named = set()
    for words in found:
        while re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words == ["make", "gpu"]:
            continue
        if words[0] == "torchrun":
            words = ["python", *words[words.index("-m") :]]
        name = max((name for name in parsers if words[: len(name.split())] == name.split()), key=len)
        code: object = 0
        try:
            parsers[name].parse_args(words[len(name.split()) :])
        except SystemExit as exit_:  # --help and --list
            code = exit_.code
        assert code == 0, words
        named.add(name)
    assert program in named or program == cli.PROGRAM


def test_lists_of_recipes_have_each_of_them(capsys) -> None:
    for command in ("train", "reproduce"):
        assert cli.main([command, "--list"]) == 0
        out = capsys.readouterr().out
        assert re.findall(r"^([\w-]+): ", out, re.MULTILINE) == list(cli.catalogue.RECIPES)
        assert max(map(len, out.splitlines())) <= COLUMNS
    assert "Published: 0.50%" in " ".join(out.split())
