"""`amq VERB --help`: what each verb says of itself, at once; and that one dataclass is all of a verb's settings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import amq
from amq.cli import VERBS, main
from amq.errors import AmqError
from amq.kernels import backends, names
from amq.util.extras import install_hint
from amq.util.lazy import load
from amq.util.settings import RUN, Settings, declared

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "transformers", "scipy", "msgspec", "rich", "safetensors")
GIVEN: dict[str, dict[str, Any]] = {
    "search": {"model": "m", "output": "o"},
    "select": {"run": "r", "memory": "1GiB"},
    "report": {"run": "r"},
    "quantize": {"model": "m", "output": "o", "uniform": "int4"},
    "eval": {"model": ("m",)},
    "export": {"checkpoint": "c", "to": "gguf", "output": "o"},
    "generate": {"model": "m", "prompt": "p"},
    "bench": {"model": "m"},
    "serve": {},
    "split": {},
    "formats": {},
}
"""What each verb cannot do without."""


def settings(verb: str) -> type[Settings]:
    return load(VERBS[verb].settings)


def test_help_says_what_each_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(VERBS) and all(len(line) <= 120 for line in lines)
    assert all(line.endswith(settings(name).ABOUT) for name, line in zip(VERBS, lines[2:], strict=True))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"amq {amq.__version__}\n"


@pytest.mark.parametrize(("argv", "message"), [([], "no verb is given"), (["sarch"], "'sarch' is no verb of amq")])
def test_what_is_no_verb(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}\nusage: amq VERB") and not captured.out


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    """In a process of its own; `amq` itself must not have imported any of it either."""
    code = (
        "import sys; from amq.cli import main\n"
        f"try: main({[verb, '--help'] if verb else ['--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: amq" in result.stdout


def test_a_missing_extra_is_one_line() -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nfrom amq.cli import main\nsys.exit(main(['serve', 'no model']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr == (
        f'error: amq serve needs the extra "serve" (uvicorn is not installed): {install_hint("serve")}\n'
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_grouped_and_ends_with_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    out, kind = capsys.readouterr().out, settings(verb)
    assert end.value.code == 0 and kind.VERB == verb and len(kind.EXAMPLES) == 2
    assert out.endswith("examples:\n" + "".join(f"  {line}\n" for line in kind.EXAMPLES))
    groups = {field.flag.group for field in declared(kind).values() if field.flag.help and not field.flag.positional}
    assert all(f"\n{group}:\n" in out for group in groups)
    assert len(groups) > 1 or len(declared(kind)) < 4, "one group holds everything"


@pytest.mark.parametrize("verb", VERBS)
def test_settings_survive_json(verb: str) -> None:
    made = settings(verb).make(**GIVEN[verb])
    text = json.dumps(made.json())
    back = {name: tuple(v) if isinstance(v, list) and isinstance(getattr(made, name), tuple) else v
            for name, v in json.loads(text).items()}  # fmt: skip
    assert settings(verb).make(**back) == made


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_command_lines_of_their_verb(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They parse, and make settings that only a model could refuse."""
    import shlex

    from amq.util import settings as module

    seen: list[dict[str, Any]] = []
    parse = module.parse_command

    def stop(*arguments: Any) -> dict[str, Any]:
        seen.append(parse(*arguments))
        raise KeyboardInterrupt

    main_module = sys.modules[load(VERBS[verb].main).__module__]
    monkeypatch.setattr(main_module, "parse_command", stop)
    for line in settings(verb).EXAMPLES:
        words = [word for word in shlex.split(line) if not word.startswith("AMQ_")]
        assert words[:2] == ["amq", verb]
        with pytest.raises(KeyboardInterrupt):
            VERBS[verb](words[2:])
        given = {name: value for name, value in seen[-1].items() if name in {f.name for f in fields(settings(verb))}}
        settings(verb).make(**given)


def test_runs_of_earlier_versions_keep_their_settings() -> None:
    """A run.json of schema amq/run/2, as it was written before settings had groups and ranges."""
    from amq.search.settings import SearchSettings
    from amq.util.records import parse_record

    saved = {
        **{"model": "smollm2", "output": "runs/a", "target_bits": 4.0, "memory": None, "context": 0, "max_loss": None},
        **{"formats": "int2,int3,int4", "group_size": 64, "pin": ["lm=int4"], "tie": "", "proxy": "rtn", "loss": "jsd"},
        **{"calibration": "pydoc", "window_length": 256, "windows": 1, "confirm_windows": 1, "bank_windows": 24},
        **{"solver": "additive", "cost": "fisher", "cost_passes": 4, "points": 6, "exact": False, "refine": 0},
        **{"prune": 2.0, "surrogate": "rbf", "initial": 250, "iterations": 200, "per_iteration": 50},
        **{"population": 200, "generations": 20, "crossover": 0.9, "mutation": 0.1, "seed": 0, "dtype": "auto"},
        **{"device": "cpu", "trust_remote_code": False, "backend": "reference", "activations": "fp32"},
        **{"cache_memory": "256MiB", "time": None},
    }
    read = parse_record(saved, SearchSettings, "run.json")
    since = {"answers": 32, "answer_tokens": 64, "rotation": "auto", "cache": "float16"}
    since |= {"min_speed": None, "prefer": "quality", "speed_table": None}
    assert (
        read.json() == {**saved, "head": "auto", "untie": "", "load": "auto", "gpu_memory": None, **since}
        and SearchSettings.make(**saved) == read
    )
    with pytest.raises(AmqError, match="run.json: --windows must be at least 1, got 0"):
        parse_record({**saved, "windows": 0}, SearchSettings, "run.json")


def test_every_flag_of_a_model_is_the_same_in_every_verb() -> None:
    """dtype, device and trust_remote_code are declared once."""
    loading = ("search", "quantize", "eval", "generate", "bench", "serve")
    for name in ("dtype", "device", "trust_remote_code"):
        assert len({declared(settings(verb))[name].flag for verb in loading}) == 1
        assert declared(settings("search"))[name].flag.group == RUN


def test_light_names_are_those_of_the_records() -> None:
    assert tuple(backends.BACKENDS) == names.BACKENDS
    assert all(set(b.activations) <= set(names.ACTIVATIONS) for b in backends.BACKENDS.values())
