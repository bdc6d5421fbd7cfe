"""The command line and a run's args.json, read with one clear line for every wrong word."""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import get_type_hints

from common import UserError
from common.args import flag, require
from extras import terminal
from extras.value_lists import join_values
from extras.words import CHOSEN_ANEW, PLANNED, holds, in_words, last_value, reads


def given_args(cls, description: str):
    """The command line as a `cls`. With --resume it is what the run's args.json holds, and other settings are refused.

    Raises UserError, in one line, for a wrong word, a flag without text, or a setting that the resumed run does not have.
    """
    from extras.config import starting_values
    from extras.phases import check_phase

    script, words = Path(inspect.getfile(cls)).stem, sys.argv[1:]
    args = command_line(cls, description, starting_values(cls, words))
    check_phase(script, args.stop_after)
    if args.resume:
        expected = f"none beside --resume {args.resume}: a resumed run keeps its settings"
        require(not args.config, "config", args.config, expected)
        saved = saved_args(cls, args.resume)
        same = args.output_dir == "auto" or Path(args.output_dir).resolve() == Path(args.resume).resolve()
        expected = f"none beside --resume {args.resume}, which goes on in its own folder"
        require(same, "output_dir", args.output_dir, expected)
        for name, given in vars(command_line(cls, description, saved)).items():
            if name not in CHOSEN_ANEW and given not in ("auto", getattr(saved, name)):
                raise UserError(
                    f"{flag(name)}: found {given}, but the run in {args.resume} has {getattr(saved, name)};"
                    " a resumed run keeps its settings"
                )
        planned = {name: getattr(args, name) for name in ("stop_after", *PLANNED) if hasattr(args, name)}
        args = dataclasses.replace(saved, resume=args.resume, output_dir=args.resume, dry_run=args.dry_run, **planned)
    elif last_value(words, "--resume") is not None:  # such as --resume "$RUN" of a shell
        require(False, "resume", "an empty text", "a run directory")
    for name in PLANNED:
        given = getattr(args, name, 0)
        require(not given or args.dry_run, name, given, "--dry-run beside it, whose plan it is for")
    for field in dataclasses.fields(cls):  # before a name is looked up: "" would be the current folder
        may_be_empty = field.default == "" or field.name in cls.may_be_empty
        filled = may_be_empty or str(getattr(args, field.name)).strip()
        require(bool(filled), field.name, "an empty text", "a value")
    if args.smoke and os.environ.get("RANK", "0") == "0":
        print("--smoke: the smallest sizes, to see a script run; its results mean nothing", flush=True)
    if args.deterministic:  # read by cuBLAS and by transformers' flash attention when they are first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    return args


def check_sources(args, given: str) -> None:
    """Raise UserError if the table would add its own source of the other kind to the source that the user gives."""
    missing = "preference_dataset" if given == "dataset" else "dataset"
    if given == "dataset" or (args.needs_demonstrations() and args.preference_dataset != "none"):
        raise UserError(
            f"{flag(missing)}: found none beside {flag(given)} {getattr(args, given)}, expected a source too; one may be both"
        )


# ---- the command line ----
# what flags and SETTINGS need, quick to import
LIGHT = ("common.args", "common.ranges", "extras.flags", "extras.two_cores", "dataclasses", "math", "typing")


def begin(path: str, description: str) -> None:
    """First lines of the script at `path`: catch signals, and answer --help or a wrong word at once.

    The script has not imported torch yet, which takes a second. So its Args is made from the source of that class alone.
    """
    terminal.catch()
    if words := sys.argv[1:]:
        cls, settings = read_flags(Path(path))
        if {"--help", "-h"} & set(words) or words[0].startswith("--tyro-"):
            from extras import help

            terminal.run(lambda: help.show(cls, description, settings))
            sys.exit()
        try:
            check_words(cls, words)
        except UserError:
            terminal.run(lambda: check_words(cls, words))
    if sys.stderr and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"{Path(path).stem}: loading libraries, data and models", file=sys.stderr, flush=True)


def check_words(cls, words: list[str]) -> None:
    """Raise UserError, in one line, for a wrong word of the command line, or for a wrong file of --config."""
    from extras.config import starting_values

    if wrong := wrong_word(cls, words):
        raise UserError(wrong)
    starting_values(cls, words)


def read_flags(path: Path) -> tuple:
    """Return the class Args and the table SETTINGS of the script at `path`, or {} if it has none.

    Nothing else of the script is run but its imports of LIGHT.
    """
    body = ast.parse(path.read_text()).body
    kept: list[ast.stmt] = [node for node in body if isinstance(node, ast.ImportFrom) and node.module in LIGHT]
    named = (node.names for node in body if isinstance(node, ast.ImportFrom) and node.module == "extras")
    if light := [name for names in named for name in names if f"extras.{name.name}" in LIGHT]:
        kept.append(ast.ImportFrom("extras", light, 0))
    kept += [node for node in body if isinstance(node, ast.Import) and node.names[0].name in LIGHT]
    kept += [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    kept += settings_of(body)
    found: dict = {"__name__": "__main__"}  # where the class is looked for, to read what stands below each flag
    exec(compile(ast.fix_missing_locations(ast.Module(kept, [])), str(path), "exec", dont_inherit=True), found)
    return found["Args"], found.get("SETTINGS", {})


def settings_of(body: list[ast.stmt]) -> list[ast.stmt]:
    """The table SETTINGS of a script, after the tables that it is made from."""
    tables = {ast.unparse(node.targets[0]): node for node in body if isinstance(node, ast.Assign)}
    names = (
        {node.id for node in ast.walk(tables["SETTINGS"]) if isinstance(node, ast.Name)}
        if "SETTINGS" in tables
        else set()
    )
    return [node for name, node in tables.items() if name in names]


def command_line(cls, description: str, default):
    """The command line as a `cls`, by tyro, over a default. Raises UserError, in one line, for a wrong flag or value."""
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=join_values(sys.argv[1:]), description=description, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    wrong = wrong_word(cls, sys.argv[1:])
    said = re.split("[-─]{4,}", re.sub("[│╭╮╰╯]", "", printed.getvalue()))  # tyro's heading, what is wrong, help
    raise UserError(wrong or " ".join(said[:2][-1].split()))


def wrong_word(cls, words: list[str]) -> str:
    """Return one line about the first wrong word of a command line; empty if all are right."""
    types_of = get_type_hints(cls)
    known = {flag(field.name): types_of[field.name] for field in dataclasses.fields(cls)}
    known |= {f"--no-{name[2:]}": kind for name, kind in known.items() if kind is bool}
    before, rest = "", iter(join_values(words))
    for word in rest:
        name, given, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in known:
            if before and not word.startswith("-"):
                return f"{before}: found the value {word}, expected none: the flag alone says yes, --no-... says no"
            if not word.startswith("--"):
                return f"{word}: found a word without a flag, expected --flag value (see --help)"
            near = "".join(f"{n}, or " for n in difflib.get_close_matches(name, known, 1))
            return f"{word}: found no flag of this name, expected {near}one that --help shows"
        before = name if known[name] is bool else ""
        if known[name] is bool and given:
            return f"{name}: found the value {value}, expected none: the flag alone says yes, --no-... says no"
        if known[name] is not bool:
            read = value if given else next(rest, None)
            if read is None or not reads(read, known[name]):
                found = "no value" if read is None else read or "an empty text"
                return f"{name}: found {found}, expected {in_words(known[name])}"
    return ""


def saved_args(cls, folder: str):
    """The args that a run wrote to its args.json. Raises UserError, in one line, if no run of this script has written them.

    A flag that is missing there is newer than the run. It gets the value in cls.before, else its default.
    """
    path, script = Path(folder) / "args.json", Path(inspect.getfile(cls)).stem
    if not path.is_file():
        raise UserError(f"--resume: found no args.json in {folder}, expected a run directory")
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--resume: {path}: found broken JSON ({error}), expected what a run writes there") from None
    saved = stored.get("args") if isinstance(stored, dict) else None
    if not isinstance(saved, dict):
        raise UserError(
            f"--resume: {path}: found {json.dumps(stored):.60}, expected script and args, as a run writes them"
        )
    if stored.get("script", script) != script:
        raise UserError(f"--resume: found a run of {stored['script']}.py in {folder}, expected one of {script}.py")
    types_of = get_type_hints(cls)
    default = {field.name: field.default for field in dataclasses.fields(cls)}
    made_at = f"the version that made the run (commit {stored.get('commit') or 'unknown'})"
    if unknown := ", ".join(flag(str(name)) for name in saved if name not in default):
        raise UserError(f"--resume: {path}: found {unknown}, which this version does not know; expected {made_at}")
    newer = {name: cls.before.get(name, value) for name, value in default.items() if name not in saved}
    if unclear := ", ".join(flag(name) for name in newer if name not in cls.before and default[name] == "auto"):
        raise UserError(
            f"--resume: {path}: found no {unclear}, whose value depends on the model in this version; expected {made_at}"
        )
    for name, value in saved.items():
        if not holds(value, types_of[name]):
            found = f"{flag(name)} {json.dumps(value):.60}"
            raise UserError(f"--resume: {path}: found {found}, expected {in_words(types_of[name])}")
    if newer and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{flag(name)} {value!r}" for name, value in newer.items())
        print(f"--resume: {path} is older than {listed}: what the run has done so far", flush=True)
    return cls(**saved, **newer)
