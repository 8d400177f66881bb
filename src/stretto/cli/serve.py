"""`stretto serve [MODEL]`: an OpenAI-compatible server on this machine; `stretto batch`: the same from file to file."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import stretto
from stretto.cli.app import app, progress_bar, say
from stretto.core.errors import FieldError, UserError
from stretto.core.plan import Plan
from stretto.files import read_yaml, validate

if TYPE_CHECKING:
    from stretto.serve.http.settings import ServerSettings
    from stretto.serve.predict import PassCosts


@dataclass(frozen=True, kw_only=True)
class Options:
    """What flags, environment or a configuration file say; None where they say nothing."""

    model: str | None = None
    host: str | None = None
    port: int | None = None
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefill: str | None = None
    dtype: str | None = None
    path: str | None = None
    threads: int | None = None
    kv_tokens: int | None = None
    preemption: str | None = None
    spare_tokens: int | None = None
    api_key: tuple[str, ...] | None = None
    allowed_host: tuple[str, ...] | None = None
    max_queue: int | None = None
    max_body_bytes: int | None = None
    stall_seconds: float | None = None
    drain_seconds: float | None = None
    plan: str | None = None
    json_logs: bool | None = None

    def over(self, other: Options) -> Options:
        """These, and what `other` says where they say nothing."""
        mine = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(other, **mine)


_ENGINE = {
    "model": "model",
    "max_model_len": "max_model_len",
    "max_num_seqs": "slots",
    "max_num_batched_tokens": "prefill_tokens",
    "prefill": "prefill",
    "dtype": "dtype",
    "path": "path",
    "threads": "threads",
    "kv_tokens": "pool_tokens",
    "preemption": "preemption",
    "spare_tokens": "spare_tokens",
}
_SERVER = {
    **{name: name for name in ("host", "port", "served_model_name", "max_queue", "max_body_bytes", "json_logs")},
    "stall_seconds": "stall_seconds",
    "drain_seconds": "drain_seconds",
    "api_key": "api_keys",
    "allowed_host": "allowed_hosts",
}


def _option(default: Any, name: str, text: str) -> Any:
    flag = f"--{name}/--no-{name}" if name == "json-logs" else f"--{name}"
    return typer.Option(default, flag, envvar=f"STRETTO_{name.upper().replace('-', '_')}", help=text)


@app.command()
def serve(
    model: str | None = typer.Argument(None, help="A name, a path (.gguf or a folder) or a Hugging Face id."),
    host: str | None = _option(None, "host", "Address to listen on; 127.0.0.1 if left out."),
    port: int | None = _option(None, "port", "Port; 8000 if left out, 0 for a free one."),
    served_model_name: str | None = _option(None, "served-model-name", "The model's name for clients."),
    max_model_len: int | None = _option(None, "max-model-len", "Longest prompt and answer together, in tokens."),
    max_num_seqs: int | None = _option(None, "max-num-seqs", "Most requests that run at once; 8 if left out."),
    max_num_batched_tokens: int | None = _option(None, "max-num-batched-tokens", "Most prompt tokens in a pass."),
    prefill: str | None = _option(None, "prefill", "Prompts in the passes of decoding rows, mixed, or beside, lanes."),
    dtype: str | None = _option(None, "dtype", "auto, fp32, bf16 or int4."),
    path: str | None = _option(None, "path", "How passes are computed: auto, torch, exact, bf16 or fast."),
    threads: int | None = _option(None, "threads", "CPU threads, of each lane if there are two; all if left out."),
    kv_tokens: int | None = _option(
        None, "kv-tokens", "Tokens that the KV pool holds; all slots' longest if left out."
    ),
    preemption: str | None = _option(None, "preemption", "Of requests put back for want of pages: recompute or swap."),
    spare_tokens: int | None = _option(None, "spare-tokens", "Tokens that spare memory holds, for swap."),
    api_key: list[str] | None = _option(None, "api-key", "A key that clients must send; may be repeated."),
    allowed_host: list[str] | None = _option(
        None, "allowed-host", "A name for a server on 127.0.0.1, as a proxy sends it; may be repeated."
    ),
    max_queue: int | None = _option(None, "max-queue", "Most waiting requests; more are answered 429."),
    max_body_bytes: int | None = _option(None, "max-body-bytes", "Longest request body; more is answered 413."),
    stall_seconds: float | None = _option(None, "stall-seconds", "/health is 503 after so long without a step."),
    drain_seconds: float | None = _option(None, "drain-seconds", "How long live requests may go on after SIGTERM."),
    plan: str | None = _option(None, "plan", "A plan or job file: how to run the model."),
    json_logs: bool | None = _option(None, "json-logs", "Log lines as JSON."),
    config: Path | None = typer.Option(None, "--config", help="A YAML file with the same names as the flags."),
) -> None:
    """Serve a model over HTTP as OpenAI's API, with a chat and a live view at `/`."""
    given = Options(
        model=model,
        host=host,
        port=port,
        served_model_name=served_model_name,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefill=prefill,
        dtype=dtype,
        path=path,
        threads=threads,
        kv_tokens=kv_tokens,
        preemption=preemption,
        spare_tokens=spare_tokens,
        api_key=tuple(api_key) if api_key else None,
        allowed_host=tuple(allowed_host) if allowed_host else None,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        stall_seconds=stall_seconds,
        drain_seconds=drain_seconds,
        plan=plan,
        json_logs=json_logs,
    )
    options = given if config is None else given.over(read_config(config))
    chosen = None if options.plan is None else chosen_plan(options)
    settings = settings_of(options, chosen)
    with _plain_mistakes():
        from stretto.serve.http.run import serve as run

        ended_by = run(settings, costs=None if chosen is None else costs_of(chosen, settings))
    if ended_by == signal.SIGINT:
        raise typer.Exit(130)


@app.command()
def batch(
    requests: Path = typer.Argument(metavar="INPUT.jsonl", help="Requests, one a line, in OpenAI's batch format."),
    output: Path = typer.Argument(metavar="OUTPUT.jsonl", help="Where the answers go, one a line."),
    model: str | None = typer.Option(None, "--model", help="A name, a path (.gguf or a folder) or a Hugging Face id."),
    served_model_name: str | None = _option(None, "served-model-name", "The model's name in the requests."),
    max_model_len: int | None = _option(None, "max-model-len", "Longest prompt and answer together, in tokens."),
    max_num_seqs: int | None = _option(None, "max-num-seqs", "Most requests that run at once; 8 if left out."),
    dtype: str | None = _option(None, "dtype", "auto, fp32, bf16 or int4."),
    path: str | None = _option(None, "path", "How passes are computed: auto, torch, exact, bf16 or fast."),
    threads: int | None = _option(None, "threads", "CPU threads; all if left out."),
) -> None:
    """Answer a file of requests. Exits with 1 if any was refused; its line in the output says why."""
    settings = settings_of(
        Options(
            model=model,
            served_model_name=served_model_name,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            dtype=dtype,
            path=path,
            threads=threads,
        )
    )
    with _plain_mistakes(), progress_bar(quiet=False) as progress:
        from stretto.serve.http.batch import read_batch, run_batch

        lines = read_batch(requests)
        if output.exists() and output.samefile(requests):
            raise UserError("is the file of the requests", file=str(output), right="name another one for the answers")
        counts = run_batch(settings, lines, output, progress=lambda done: progress("answers", done, len(lines)))
    say(f"{counts.answered} answered, {counts.refused} refused; written to {output}")
    if counts.refused:
        raise typer.Exit(1)


@contextmanager
def _plain_mistakes() -> Iterator[None]:
    """What is missing or out of range, as a user's mistake."""
    try:
        yield
    except ImportError as missing:
        raise UserError(
            f"serving needs {missing.name}, which is not installed", right="pip install 'stretto[server]'"
        ) from None
    except FieldError as problem:
        raise _told(problem) from None


def read_config(path: Path) -> Options:
    """The options in a YAML file, whose names are those of the flags, with - or _.

    Raises:
        UserError: for a file that cannot be read, a name that is unknown or a value of the wrong type.
    """
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise document.error((), "the file holds no fields", "it must hold the names of flags: `port: 8000` and so on")
    data = {name.replace("-", "_"): value for name, value in document.data.items()}
    for name in ("api_key", "allowed_host"):
        if isinstance(data.get(name), str):
            data[name] = [data[name]]
    lines: dict[tuple[str | int, ...], int] = {
        tuple(part.replace("-", "_") if isinstance(part, str) else part for part in place): line
        for place, line in document.lines.items()
    }
    return validate(Options, dataclasses.replace(document, lines=lines), data)


def settings_of(options: Options, chosen: Plan[Any, Any] | None = None) -> ServerSettings:
    """The settings of a server: what `options` say, over the choices of a plan, over the defaults.

    Raises:
        UserError: for a value out of range, named by its flag.
    """
    from stretto.serve.http.settings import ServerSettings
    from stretto.serve.settings import EngineSettings

    said = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    engine = {} if chosen is None else _engine_of(chosen)
    engine |= {theirs: said[name] for name, theirs in _ENGINE.items() if name in said}
    server = {theirs: said[name] for name, theirs in _SERVER.items() if name in said}
    try:
        return ServerSettings(engine=EngineSettings(**engine), **server)
    except FieldError as problem:
        raise _told(problem) from None


def _told(problem: FieldError) -> UserError:
    names = {theirs: name for name, theirs in (_ENGINE | _SERVER).items()}
    flag = names.get(problem.field, problem.field).replace("_", "-")
    return UserError(f"the value is {problem.value!r}", field=f"--{flag}", right=f"it must be {problem.right}")


def chosen_plan(options: Options) -> Plan[Any, Any]:
    """The plan that `--plan` names.

    Raises:
        UserError: if it is for another model than the one named, or cannot be served.
    """
    assert options.plan is not None
    with progress_bar(quiet=False) as progress:
        chosen = stretto.chosen_plan(options.plan, progress=progress)
    if chosen.kind != "serve":
        raise UserError(f"the plan is of kind {chosen.kind}", file=options.plan, right="a plan of kind serve")
    if options.model not in (None, chosen.job.model):
        raise UserError(
            f"the plan is for {chosen.job.model}, not for {options.model}",
            file=options.plan,
            right="name one of the two",
        )
    if chosen.choices.instances > 1:
        raise UserError(
            f"the plan has {chosen.choices.instances} instances",
            file=options.plan,
            field="choices.instances",
            right="the server runs one; plan with `instances: 1`",
        )
    return chosen


def _engine_of(chosen: Plan[Any, Any]) -> dict[str, Any]:
    same: tuple[str, ...] = ("dtype", "path", "threads", "slots", "prefill_tokens", "prefill")
    same += ("joining", "prefix_cache", "layout", "reorder")
    return {"model": chosen.job.model, **{name: getattr(chosen.choices, name) for name in same}}


def costs_of(chosen: Plan[Any, Any], settings: ServerSettings) -> PassCosts | None:
    """The tables of this machine for a plan's model, type and threads; None if flags have changed these."""
    from stretto.serve.predict import PassCosts
    from stretto.serve.workload import workload

    choices = chosen.choices
    engine = settings.engine
    if (choices.dtype, choices.threads, choices.path) != (engine.dtype, engine.threads, engine.path):
        return None
    device = chosen.cluster.device(choices.device)
    return PassCosts(workload(chosen.job).spec, device, choices.dtype, choices.threads, choices.path)
