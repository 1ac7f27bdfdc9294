"""`python -m ffkernels reproduce` and `paper`: recipes for the record, measurements behind docs/lab/paper.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffkernels.cli import Record, UserError, add_run_options, described, say, to_path, train_recipe
from ffkernels.recipes import checkpoint, data
from ffkernels.recipes.catalogue import RECIPES
from ffkernels.recipes.train import Trainer

from . import page, results

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


WHAT = ("ablation", "steps", "race", "race-convolutions", "classes", "variations", "search", "tables", "epoch")


def add_to(commands: Commands) -> None:
    """Adds both commands to those of `python -m ffkernels`."""
    recipes = {
        name: f"{recipe.source} Assumed here: {recipe.assumed or 'nothing.'} "
        f"Published: {recipe.published or 'no error.'}"
        for name, recipe in RECIPES.items()
    }
    command = commands.add_parser(
        "reproduce",
        help="train a published recipe and record what came of it",
        usage="%(prog)s (RECIPE | --readme | --list) [OPTIONS]",
        **described(
            """
            python -m ffkernels reproduce loewex --seed 1 --compute-dtype bfloat16
            python -m ffkernels reproduce cwc-fashion --data fashion-mnist
            python -m ffkernels reproduce --list      # recipes, their sources, published errors
            python -m ffkernels reproduce --readme    # the table of docs/results.md
            """,
            """
            Trains a recipe as `train` does, and writes a row of results: errors, seconds,
            machine, versions, seed.
            """,
        ),
    )
    command.set_defaults(run=_reproduce)
    command.add_argument("recipe", nargs="?", choices=RECIPES, metavar="RECIPE", help="a name of --list")
    command.add_argument("--readme", action="store_true", help="no training: make the table of docs/results.md")
    command.add_argument(
        "--results", type=to_path, default=Path(results.FOLDER), metavar="DIR", help="folder of rows (%(default)s)"
    )
    add_run_options(command, recipes)

    command = commands.add_parser(
        "paper",
        help="the runs and measurements behind docs/lab/paper.md",
        usage="%(prog)s WHAT [OPTIONS]",
        **described(
            """
            python -m ffkernels paper steps
            python -m ffkernels paper ablation --data path/to/mnist
            python -m ffkernels paper tables
            """,
            """
            ablation    trains what is missing in results/ablation
            steps       measures steps against backprop's
            race        trains recipes and backprop of one network, five seeds each, and
                        takes the time to an error
            race-convolutions
                        the same of a network of convolutions
            classes     trains backprop on what recipes of class goodness train on
            variations  changes each choice of the recipe projected
            search      looks for a better quick on images held back: successive halving
            tables      makes the tables and pictures of docs from these
            epoch       trains fflib's example by fflib and accelerated, in turns

            ablation, variations and search go on where they were stopped. steps, the races,
            classes, variations and search write results/backprop, epoch writes results/epoch.
            """,
        ),
    )
    command.set_defaults(run=_paper)
    command.add_argument("what", choices=WHAT, metavar="WHAT", help="one of the above")
    command.add_argument("--data", default="mnist", help="mnist, fashion-mnist or a folder of IDX files (%(default)s)")


def bench(argv: list[str]) -> int:
    """`python -m ffkernels bench`: the benchmark measures, its pages are written here."""
    from bench.command import main

    from . import readme

    return main(argv, readme.update)


def _reproduce(arguments: argparse.Namespace, argv: list[str]) -> int:
    folder: Path = arguments.results
    if arguments.readme == (arguments.recipe is not None):
        raise UserError(f"reproduce needs RECIPE or --readme, one of the two; names: {', '.join(RECIPES)}")
    if not arguments.readme:

        def record(trainer: Trainer) -> Record:
            identity = results.identity(trainer)
            path = results.path_of(folder, identity)
            return Record(results.name_of(identity), path, lambda: results.write(folder, results.row_of(trainer)))

        return train_recipe(arguments, argv, record)
    if not folder.is_dir():
        raise UserError(f"--results {folder}: no folder, so there are no rows to make the table of")
    try:
        results.update_page(results.PAGE, folder)
    except ValueError as error:
        raise UserError(error) from error
    print(f"{results.PAGE}: made from {folder}")
    return 0


def _paper(arguments: argparse.Namespace, argv: list[str]) -> int:
    # With the benchmark's contenders, which the other commands need not wait for.
    from bench.contenders import installed

    from . import ablation, backprop, classes, epoch, race, search, variations

    saved: dict[str, Any] = {"steps": backprop, "classes": classes, "variations": variations, "search": search}
    races = race.RACES
    try:
        # What is written is tried before hours of measuring.
        if arguments.what in saved:
            checkpoint.try_writing(saved[arguments.what].FILE)
            saved[arguments.what].save(data.load(arguments.data), say)
        elif arguments.what in races:
            checkpoint.try_writing(races[arguments.what].file)
            race.save(races[arguments.what], data.load(arguments.data), say)
        elif arguments.what == "ablation":
            ablation.run(data.load(arguments.data), ablation.FOLDER, say)
        elif arguments.what == "epoch":
            if installed("fflib") is None:
                raise UserError("fflib is not installed: pip install --no-deps fflib==0.3.0")
            print(epoch.measure(data.load(arguments.data), say))
        else:
            paper = Path("docs", "lab", "paper.md")
            page.update(paper, ablation.BEGIN, ablation.END, ablation.table(results.load(ablation.FOLDER)))
            page.update(paper, backprop.BEGIN, backprop.END, backprop.table())
            page.update(paper, search.BEGIN, search.END, search.table())
            print(f"{paper}: made from {ablation.FOLDER}, {backprop.FILE} and {search.FILE}")
            page.update(classes.PAGE, classes.BEGIN, classes.END, classes.table())
            page.update(classes.PAGE, variations.BEGIN, variations.END, variations.table())
            print(f"{classes.PAGE}: made from {results.FOLDER} and {classes.FILE}")
            for of in races.values():
                page.update(race.PAGE, *of.marks, race.table(of))
                if of.file.exists():
                    race.draw(of)
            print(f"{race.PAGE}: made from {', '.join(str(of.file) for of in races.values())}")
    except ValueError as error:
        raise UserError(error) from error
    return 0
