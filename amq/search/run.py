"""One search from settings to run folder: load, bank, plan, solve, confirm, choose, report.

The run folder is the result and the memory of a search: `run.json` (settings, versions, timings), `archive.jsonl`,
`cost.json`, `sensitivity.json`, `surrogate.json`, `front.json`, `configuration.json` and the report. Everything but the
archive is written whole; see docs/format.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amq.errors import AmqError
from amq.model.answers import SEARCHED, open_answers
from amq.model.blocks import BlockRunner
from amq.model.inventory import Inventory, embedding_weight
from amq.model.losses import ANSWERS, OBJECTIVES
from amq.model.open import fingerprint as content_hash
from amq.model.opened import OpenModel, open_model
from amq.model.own_text import BUILT_IN
from amq.model.paging import memory_text
from amq.model.settings import AUTO
from amq.model.shape import DEFAULT_CACHE, kept_as
from amq.model.speed_table import SpeedTable
from amq.model.text import SELF, Corpus
from amq.proxy.answers import Agreement, AnswerWindows
from amq.proxy.caches import attention_of
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import CACHE, FISHER, add_pass, gradient_passes
from amq.proxy.native import NativeStates
from amq.proxy.resident import BankReader, near
from amq.quantize.bank import BankSettings, WeightBank, open_bank
from amq.quantize.methods import rotation_of
from amq.quantize.rotate import check_widths
from amq.runtime.families import Unsupported
from amq.runtime.speed_measure import How, Skeleton, measure
from amq.search.archive import Archive
from amq.search.choose import Budget, budget_from_memory, check_bits
from amq.search.conduct import SearchResult, Timings, conduct
from amq.search.problem import Problem, Table
from amq.search.records import (
    Cost,
    KvEntry,
    LinearEntry,
    MachineEntry,
    ModelEntry,
    OtherEntry,
    RunFile,
    TextEntry,
    versions,
)
from amq.search.run_folder import ARCHIVE, NAMES, RunFolder, RunWriter, read_cost
from amq.search.sensitivity import sensitivity_costs
from amq.search.settings import COSTS, ENGINE, FREE_ON_RESUME, NATIVE, SearchSettings, differences
from amq.search.share import KINDS, SCORED, WINDOWS, Shares, Sharing, prompt_length, share_memory
from amq.search.space import SearchSpace
from amq.search.speed import Speed, wanted_times
from amq.search.working import REFERENCE, all_codes, bank_formats, working_bytes
from amq.util.files import check_place
from amq.util.limits import check_memory, fits, free_memory
from amq.util.progress import Progress
from amq.util.settings import parse_size

CONTEXT = "context"
"""The windows whose last tokens are scored behind a long prompt."""
READY_SHARE = 4
"""Of the free memory, a quarter may be weights that are ready for the native engine, in all of their formats."""


@dataclass
class Stage:
    """A loaded model with its bank and evaluator: everything of a search that touches weights.

    quantized: its weights without those that are kept in 16 bits. rotation: of the bank. near: the bank for the device
    that the model is on. measured_by: what `evaluator` runs candidates on.
    """

    opened: OpenModel
    quantized: Inventory
    space: SearchSpace
    bank: WeightBank
    rotation: str
    near: BankReader
    evaluator: Evaluator
    measured_by: str
    cost_windows: torch.Tensor
    corpus: Corpus
    windows_key: str
    budget: Budget
    cached_length: int = 0

    @property
    def cached_loss(self) -> Callable[[Mapping[str, str], Sequence[str]], float] | None:
        """Of a configuration through a cache of these kinds, behind a long prompt; None where nothing measures that."""
        if not self.cached_length:
            return None
        return lambda formats, kinds: self.evaluator.evaluate_cached(formats, kinds, CONTEXT)


def run_search(settings: SearchSettings, resume: bool = False, progress: Progress | None = None) -> SearchResult:
    """Runs (or resumes) a search; raises AmqError for bad input before anything is written."""
    progress = progress or Progress()
    output, started = Path(settings.output), time.monotonic()
    previous = _check_output(output, settings, resume)
    timings = Timings()
    stage = prepare(settings, progress, timings)
    if previous:
        _check_same_inputs(previous, settings, stage)
    run = _describe(settings, stage)
    with RunFolder.create(output, stage.space) as folder:  # refuses a folder that another search is using
        problem = Problem(
            stage.space, folder.archive, stage.evaluator, settings.solver, settings.seed, progress=progress
        )
        problem.budget, problem.max_loss, problem.speed = stage.budget.bits, stage.budget.max_loss, stage.budget.speed
        problem.objective = OBJECTIVES[settings.loss]
        problem.cost_tables = _cost_tables(settings, stage, problem, folder, timings)
        folder.write(run)  # with which what is measured from here on can be resumed
        shares = _share(settings, stage, problem, folder, timings) if settings.shares_memory else None
        result = conduct(problem, run, folder, timings, started)
        if shares is not None and stage.cached_loss is not None:
            formats, kinds = result.configuration.formats, list(result.configuration.cache.values())
            final, in_default = (stage.cached_loss(formats, each) for each in (kinds, [DEFAULT_CACHE] * len(kinds)))
            folder.write(replace(shares, final=final, final_in_default=in_default))
        return result


def _share(settings: SearchSettings, stage: Stage, problem: Problem, folder: RunWriter, timings: Timings) -> Shares:
    """How `--cache auto` divides the memory, which bounds the weights from here on; its file is written."""
    assert settings.memory is not None, "--cache auto wants --memory"
    kv, table = KvEntry.of(stage.opened.shape), problem.cost_table(FISHER)
    of_caches = (made.cache if (made := read_cost(folder.path, stage.space)) else None) or {}
    sharing = Sharing(
        parse_size(settings.memory), settings.context, stage.opened.inventory, stage.space, kv.caches(), kv.layers,
        table, of_caches,
    )  # fmt: skip
    path = folder.path / NAMES[Shares]
    with timings.measure("share"):  # once: a run that is resumed keeps its budget
        shares = Shares.read(path) if path.is_file() else share_memory(
            sharing, stage.cached_loss, stage.cached_length, problem.progress
        )  # fmt: skip
    folder.write(shares)
    problem.budget, problem.kinds = shares.best.bits, shares.kinds_of(kv.layers)
    return shares


def _check_output(output: Path, settings: SearchSettings, resume: bool) -> RunFile | None:
    """The earlier run.json when resuming; refuses a folder that is in use or that was made with other settings."""
    check_place(output, "--output")
    exists = output.is_dir() and any(output.iterdir())
    if not exists:
        return None
    if not resume:
        raise AmqError(f"--output {output} is not empty: give another folder, or --resume to go on with the run in it")
    if not (output / NAMES[RunFile]).is_file():
        raise AmqError(f"--resume: {output} holds no {NAMES[RunFile]}, so it is not a run folder of amq")
    previous = RunFolder.open(output).run
    if previous.schema != RunFile.SCHEMAS[0]:
        raise AmqError(
            f"--resume: {output} holds a run of schema {previous.schema!r}, this amq writes {RunFile.SCHEMAS[0]!r}, "
            "and configurations of the two do not compare (windows begin with the tokenizer's BOS now, and head and "
            "embeddings are searched): use another --output"
        )
    free = FREE_ON_RESUME | ENGINE if previous.measured_by else FREE_ON_RESUME
    changed = differences(previous.settings.json(), settings.json(), free)
    if changed:
        raise AmqError(f"--resume: {output} was made with other settings: {'; '.join(changed)}")
    if (output / ARCHIVE).is_file():  # damaged, or another search's: said before a model is loaded
        Archive(output / ARCHIVE).close()
    return previous


def _check_same_inputs(previous: RunFile, settings: SearchSettings, stage: Stage) -> None:
    """Refuses to resume where a name in the settings stands for something else than it did."""
    output = settings.output
    if previous.model.fingerprint != stage.opened.fingerprint:
        raise AmqError(
            f"{output} holds a run of another model (or other weights) than {settings.model}: use another --output"
        )
    if previous.calibration.sha256 != stage.corpus.sha256:
        raise AmqError(
            f"--resume: the text {settings.calibration!r} is not the one that {output} was begun with (SHA-256 "
            f"{stage.corpus.sha256[:12]}…, was {previous.calibration.sha256[:12]}…): restore it or use another --output"
        )
    if previous.calibration.windows not in ("", stage.windows_key):
        raise AmqError(
            f"--resume: the text {settings.calibration!r} gives other windows of tokens than when {output} was begun: "
            f"the tokenizer of {settings.model} or the version of amq has changed, or, with --objective {ANSWERS}, the "
            "model answered anew on another processor; use another --output"
        )
    if previous.measured_by not in ("", stage.measured_by):
        raise AmqError(
            f"--resume: the configurations of {output} were measured by the {previous.measured_by}, now they would be "
            f"by the {stage.measured_by}: give the --backend and --activations that name it, or use another --output"
        )
    if previous.bank and Path(previous.bank).name != stage.bank.folder.name:
        raise AmqError(
            f"--resume: {output} was measured on weights of the bank {Path(previous.bank).name}, this amq makes "
            f"others of the same settings ({stage.bank.folder.name}), since its quantizers have changed: use another "
            "--output"
        )


def prepare(settings: SearchSettings, progress: Progress, timings: Timings) -> Stage:
    with timings.measure("load"):
        opened = open_model(settings.model, settings.dtype, settings.device, settings.trust_remote_code, settings.load)
        inventory = opened.inventory
        embedding = embedding_weight(opened.model)
        space = SearchSpace.of(inventory, settings)
        quantized = _quantized(inventory, space)
        check_widths(rotation_of(settings.proxy, settings.rotation), quantized.linears)
        engine = _engine(settings, opened, space, quantized, progress)
        whole = _plan_memory(settings, opened, space, engine, progress)
        budget = _budget(settings, opened, space, progress)
    with timings.measure("text"):
        count = settings.bank_windows + settings.windows + settings.confirm_windows + settings.cost_passes
        sampler = opened.sampler(settings.calibration, settings.window_length, settings.seed, count, progress)
        corpus = sampler.corpus
        bank_windows = sampler.take(settings.bank_windows)
        windows = {"search": sampler.take(settings.windows), "confirm": sampler.take(settings.confirm_windows)}
        cost_windows = sampler.take(settings.cost_passes)
        unscored, length = dict.fromkeys(windows, corpus.unscored), 0
        if settings.shares_memory and (long := _long_windows(settings, opened, engine, progress)) is not None:
            windows[CONTEXT], length, unscored[CONTEXT] = long, long.shape[1], long.shape[1] - SCORED
        BlockRunner(opened.model).check(windows["search"][:1, :32].to(embedding.device))  # not after hours of banking
        fingerprint = opened.fingerprint
        answers = _answers(settings, opened, progress)
        hashed = windows if answers is None else answers.hashed
        windows_key = content_hash([*hashed.items(), ("bank", bank_windows), ("cost", cost_windows)])
    formats, outer = bank_formats(space)
    with timings.measure("bank"):
        rotation = bank_rotation(settings, space, budget)
        of = BankSettings(settings.proxy, settings.group_size, bank_windows, rotation)
        bank = open_bank(
            opened.model, quantized, formats, of, progress, fingerprint=fingerprint, outer=outer,
        )  # fmt: skip
    with timings.measure("reference"):
        close = near(bank, embedding.device, settings.gpu_bytes)
        evaluator = Evaluator(
            opened.loaded, inventory, close, windows, settings.loss, parse_size(settings.cache_memory),
            engine.backend, engine.activations, unscored, whole, answers, engine.native,
        )  # fmt: skip
    return Stage(
        opened, quantized, space, bank, rotation, close, evaluator, engine.name, cost_windows, corpus, windows_key,
        budget, length,
    )  # fmt: skip


def _long_windows(settings: SearchSettings, opened: OpenModel, engine: _Engine, progress: Progress) -> Any:
    """int64 [WINDOWS, length]: prompts whose last tokens are scored through the caches that are compared; None, and the
    reason said, where nothing measures that."""
    attention_of(opened.model)  # refused before hours of banking
    text = next((part for part in settings.calibration.split("+") if part not in (AUTO, SELF)), BUILT_IN)
    whole = opened.sampler(text, settings.window_length, settings.seed, 0, progress).corpus
    length = prompt_length(settings.context, len(whole.tokens), whole.unscored)
    if engine.native is not None and settings.loss != ANSWERS and length:
        return opened.sampler(text, length, settings.seed, WINDOWS, progress).take(WINDOWS)
    why = "the reference has no such caches" if engine.native is None else "--objective answers measures no texts"
    progress.say(f"plan: kinds of cache are compared by their costs alone: {why if length else 'prompts are short'}")
    return None


def bank_rotation(settings: SearchSettings, space: SearchSpace, budget: Budget) -> str:
    """Of `BANK_ROTATIONS`: for `auto` the candidate whose size is nearest to the budget, since what gains at 3 bits may
    lose at 5; the middle one where there is no size."""
    if settings.rotation != AUTO:
        return settings.rotation
    if budget.bits is None:
        return space.formats[len(space.formats) // 2].name
    bits = budget.bits - 32 / settings.group_size
    return min(settings.bit_formats, key=lambda fmt: abs(fmt.code_bits - bits)).name


def _answers(settings: SearchSettings, opened: OpenModel, progress: Progress) -> Agreement | None:
    """What `--objective answers` measures on; the full-precision model answers here, before anything is swapped in."""
    if settings.loss != ANSWERS:
        return None
    count = 2 * settings.answers
    found = open_answers(
        opened.loaded, count, settings.answer_tokens, settings.seed, opened.fingerprint, SEARCHED, progress
    )
    parts = {"search": found.items[: settings.answers], "confirm": found.items[settings.answers :]}
    return Agreement({name: AnswerWindows.of(items) for name, items in parts.items()})


@dataclass(frozen=True)
class _Engine:
    """What runs the candidates: `native`, whose head `backend` multiplies, or `backend` alone within the model."""

    backend: str
    activations: str
    native: NativeStates | None = None

    @property
    def name(self) -> str:
        return f"{self.backend if self.native is None else 'native'} engine with {self.activations} activations"


def _engine(
    settings: SearchSettings, opened: OpenModel, space: SearchSpace, quantized: Inventory, progress: Progress
) -> _Engine:
    """What `--backend` and `--activations` stand for with this model; says so, with the reason where `auto` is not
    native, and raises AmqError where what was asked for cannot be had."""
    activations = settings.activations
    if settings.backend not in (AUTO, NATIVE):
        engine = _Engine(settings.backend, "fp32" if activations == AUTO else activations)
        progress.say(f"plan: evaluations by the {engine.name}")
        return engine
    try:
        native = _native(settings, opened, space, quantized)
    except Unsupported as error:
        if settings.backend == NATIVE or activations == "int8":
            kernels = "cpu" if settings.device.startswith("cpu") else "cuda"
            other = "reference" if activations != "int8" else f"{kernels}, which runs within the model's own modules"
            raise AmqError(
                f"--backend {settings.backend} --activations {activations}: {error}; take --backend {other}"
            ) from error
        engine = _Engine(REFERENCE, "fp32")
        progress.say(f"plan: evaluations by the {engine.name}: {error}")
        return engine
    engine = _Engine("cpu", native.activations, native)
    progress.say(f"plan: evaluations by the {engine.name}")
    return engine


def _native(settings: SearchSettings, opened: OpenModel, space: SearchSpace, quantized: Inventory) -> NativeStates:
    """Raises Unsupported where the native engine is not for this model or device."""
    if not settings.device.startswith("cpu"):
        raise Unsupported(f"the native engine is for CPUs, and the model is on {settings.device}")
    activations = "int8" if settings.activations == AUTO else settings.activations
    needed, free = working_bytes(opened.model, space, parse_size(settings.cache_memory), "cpu"), free_memory()
    if needed > free:
        raise Unsupported(
            f"the native engine needs {needed / 2**30:.2f} GiB for all blocks' codes, and {free / 2**30:.2f} are free"
        )
    return NativeStates(
        opened.loaded, quantized, settings.group_size, activations,
        min(free // READY_SHARE, free - needed),
    )  # fmt: skip


def _plan_memory(
    settings: SearchSettings, opened: OpenModel, space: SearchSpace, engine: _Engine, progress: Progress
) -> bool:
    """Whether all blocks may hold working copies at once, or one block at a time; says what a search takes besides the
    loaded model, and raises AmqError where that is not free."""
    import psutil

    how = (opened.model, space, parse_size(settings.cache_memory), engine.backend)
    ready = 0 if engine.native is None else min(engine.native.room, all_codes(space))
    needed = working_bytes(*how) + ready + (settings.gpu_bytes or 0)
    whole = fits(needed, settings.device)
    if not whole:
        needed = working_bytes(*how, whole=False) + (settings.gpu_bytes or 0)
        check_memory(needed, "the working copy of one block, --cache-memory and --gpu-memory", settings.device)
    resident = psutil.Process().memory_info().rss / 2**30
    copies = "" if whole else " (working copies of one block at a time)"
    progress.say(
        f"plan: memory: {resident:.2f} GiB in use with the model, about {needed / 2**30:.2f} GiB more on "
        f"{settings.device}{copies}"
    )
    if text := memory_text(opened.model):
        progress.say(text)
    return whole


def _quantized(inventory: Inventory, space: SearchSpace) -> Inventory:
    """The model, of whose weights a stage sees those that some configuration quantizes."""
    return inventory.only({s.name for s in space.quantized})


def _budget(settings: SearchSettings, opened: OpenModel, space: SearchSpace, progress: Progress) -> Budget:
    """What is asked for; raises AmqError where nothing fits it."""
    speed = _speed(settings, opened, space, progress) if settings.timed else None
    if settings.max_loss is not None:
        return Budget(max_loss=settings.max_loss, speed=speed)
    bits = _bits(settings, opened, space)
    if speed is not None:
        speed.select(speed.times, space.capacity(bits))  # raises where nothing is as fast, before hours of banking
    return Budget(bits, speed=speed)


def _bits(settings: SearchSettings, opened: OpenModel, space: SearchSpace) -> float:
    """Most bits per weight that the budget leaves."""
    low, high = space.bits_range
    if settings.memory is not None:
        memory = parse_size(settings.memory)
        kind = KINDS[0] if settings.shares_memory else settings.cache  # of the smallest, until costs are known
        caches = kept_as(opened.shape.caches, kind) if settings.context else ()
        return budget_from_memory(memory, settings.context, opened.inventory, caches, space)
    if settings.target_bits is not None:
        return check_bits(settings.target_bits, space)
    if settings.min_speed is not None:
        return high
    # no budget given: the cost of the middle format, so that there is something to compare with
    return min(max(space.bits_of(space.uniform(space.formats[len(space.formats) // 2])), low), high)


def _speed(settings: SearchSettings, opened: OpenModel, space: SearchSpace, progress: Progress) -> Speed:
    """By --speed-table or the table of the run that is resumed, else by one that is measured now."""
    model, threads = Skeleton.of(opened.folder), torch.get_num_threads()
    kept = Path(settings.output) / NAMES[SpeedTable]
    given = settings.speed_table or (str(kept) if kept.is_file() else None)
    if given is not None:
        table = SpeedTable.read(Path(given))
        table.check(given, settings.group_size, model.key, threads)
    else:
        depths = (0, settings.context) if settings.context else (0,)
        how = How(group_size=settings.group_size, cache=settings.cache, threads=threads, depths=depths)
        table = measure(model, wanted_times(opened.inventory, space), how, progress)
    return Speed.of(table, opened.inventory, space, settings.context, settings.min_speed)


def _cost_tables(
    settings: SearchSettings, stage: Stage, problem: Problem, folder: RunWriter, timings: Timings
) -> dict[str, Any]:
    def timed(make: Any) -> Any:
        def table() -> Table:
            with timings.measure("cost"):
                return make()

        return table

    tables = {
        "fisher": timed(lambda: _fisher(settings, stage, problem, folder)),
        "sensitivity": timed(lambda: sensitivity_costs(problem)),
        "weight": timed(stage.bank.weight_errors),
    }
    assert tuple(tables) == COSTS, "--cost offers other tables"
    return tables


def _fisher(settings: SearchSettings, stage: Stage, problem: Problem, folder: RunWriter) -> Table:
    """The Fisher table, one file update per pass, so that an interrupted search goes on at the next pass."""
    formats = sorted({f.name for name in stage.bank.names for f in stage.bank.formats_of(name)})
    kinds = (FISHER, CACHE) if settings.shares_memory else (FISHER,)
    done = 0
    total: dict[str, Table] = {kind: {} for kind in kinds}
    saved = read_cost(folder.path, stage.space)
    if saved:
        if saved.schema != Cost.SCHEMAS[0]:
            raise AmqError(
                f"--resume: {folder.path / NAMES[Cost]} is of schema {saved.schema!r}, this amq computes scores of "
                f"{Cost.SCHEMAS[0]!r}, and the two do not compare: delete it, or use another --output"
            )
        if saved.kind != FISHER or saved.passes is None or saved.passes > settings.cost_passes:
            raise AmqError(
                f"{folder.path / NAMES[Cost]}: expected a Fisher table of at most {settings.cost_passes} passes, got "
                f"{saved.kind!r} of {saved.passes}: delete it and run the search with --resume"
            )
        done, total = saved.passes, {FISHER: saved.cost, CACHE: saved.cache or {}}
    with (
        problem.progress.stage("cost table", max(1, settings.cost_passes - done)) as step,
        stage.evaluator.full_precision(),
    ):
        passes = gradient_passes(
            stage.opened.model, stage.quantized, stage.near, stage.cost_windows, formats, settings.seed, kinds,
            stage.corpus.unscored, parse_size(settings.cache_memory), done,
        )  # fmt: skip
        for tables in passes:
            total = {kind: add_pass(total[kind], tables[kind], done) for kind in kinds}
            done += 1
            cost = Cost(kind=FISHER, unit="nats/token", passes=done, cost=total[FISHER], cache=total.get(CACHE))
            folder.write(cost)
            step()
            if done < settings.cost_passes:
                problem.check_time()
    return total[FISHER]


def _describe(settings: SearchSettings, stage: Stage) -> RunFile:
    parts, corpus = stage.opened.inventory, stage.corpus
    return RunFile(
        status="running",
        model=ModelEntry(
            name=settings.model, fingerprint=stage.opened.fingerprint, parameters=parts.numel, blocks=parts.n_blocks,
            architecture=type(stage.opened.model).__name__,
        ),
        settings=settings,
        calibration=TextEntry(
            name=corpus.name, sha256=corpus.sha256, tokens=len(corpus.tokens), windows=stage.windows_key,
            window_prefix=tuple(corpus.prefix_names),
        ),
        versions=versions(),
        machine=MachineEntry.of(settings.device, torch.get_num_threads()),
        bank=str(stage.bank.folder),
        measured_by=stage.measured_by,
        rotation=stage.rotation,
        linears=LinearEntry.of(parts.linears),
        outer=LinearEntry.of(parts.outer),
        others=tuple(OtherEntry(o.name, o.kind, o.numel, o.reason) for o in parts.others),
        head_is_tied=parts.head_is_tied,
        kv_cache=KvEntry.of(stage.opened.shape),
        pinned={n: f.name for n, f in stage.space.pinned.items()},
    )  # fmt: skip
