"""The engine of a run: check it and its options before the work starts, and tell its failures from our own.

An engine is a Beam runner with what it needs around it, such as a job service or a scheduler. That it cannot be
reached, or dies, is nothing that a traceback explains.
"""

import argparse
import contextlib
import io
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from index.errors import CoalescerError, OptionError, one_line
from pipeline.config import RuntimeConfig

CONNECT_SECONDS = 10.0
ENGINE_MODULES = ("asyncio", "concurrent", "distributed", "grpc")
"""Packages whose exceptions tell of an engine, not of our code."""
IN_OUR_CODE = "[while running "
"""Beam writes this behind an exception that a step raised."""
PARTITION_OPTIONS, DASK_PARTITIONS = ("--dask_npartitions", "--dask_partition_size"), 32
"""Beam's default of up to 128 elements in a partition would leave all work to one worker."""
WRITTEN = "options of Beam follow `--` and are written --name=value"


def check_engine(runtime: RuntimeConfig) -> Any:
    """Return Beam's options for a run, after a check of the runner, of the options and of the addresses in them.

    Raises OptionError if the runner is unknown, an option is not valid, or nothing listens at an address.
    """
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    texts = ["--runner=FnApiRunner"]
    if runtime.num_workers > 1:
        texts += [f"--direct_num_workers={runtime.num_workers}", "--direct_running_mode=multi_processing"]
    texts += runtime.beam_options  # the last of equal options counts
    name = PipelineOptions(texts).view_as(StandardOptions).runner
    if name.endswith("DaskRunner") and not any(text.startswith(PARTITION_OPTIONS) for text in texts):
        texts.append(f"{PARTITION_OPTIONS[0]}={DASK_PARTITIONS}")
    options = PipelineOptions(texts)
    _check_runner(name)
    _check_values(options, runtime.beam_options, name)
    _check_addresses(options.get_all_options(), name)
    return options


def _check_runner(name: str) -> None:
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.runners.runner import PipelineRunner, create_runner

    try:
        runner: object = create_runner(name)
    except ImportError as error:
        if name.rpartition(".")[0] and (error.name or "").startswith(name.partition(".")[0]):
            runner = None
        else:
            raise OptionError(f"--runner {name} needs a package that is missing: {one_line(error)}") from error
    except Exception:  # whatever a wrong name makes of itself
        runner = None
    if not isinstance(runner, PipelineRunner):
        known = ", ".join(each for each in StandardOptions.KNOWN_RUNNER_NAMES if "Test" not in each)
        raise OptionError(f"--runner {name} is unknown: use one of {known}, or a runner's class with its module")


def _check_values(options: Any, given: tuple[str, ...], runner: str) -> None:
    """Raise OptionError if Beam cannot parse an option, or would ignore it."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            known, every = (options.get_all_options(retain_unknown_options=unknown) for unknown in (False, True))
    except (SystemExit, argparse.ArgumentError) as error:  # argparse prints and exits
        text = messages.getvalue().strip().rpartition("error: ")[2] or str(error)
        raise OptionError(f"{one_line(ValueError(text))}: {WRITTEN}") from error
    # A job service may know more options than Beam does here.
    ignored = sorted(set(every) - set(known))
    if ignored and runner.rpartition(".")[2] in ("FnApiRunner", "DaskRunner"):
        shown = next((text for text in given if text.lstrip("-").partition("=")[0] in ignored), f"--{ignored[0]}")
        raise OptionError(f"{shown} is no option of {runner.rpartition('.')[2]}: {WRITTEN}")


def _check_addresses(values: dict[str, str | None], runner: str) -> None:
    if runner.lower() in ("portable", "portablerunner") and not values.get("job_endpoint"):
        raise OptionError(f"--runner {runner} needs the address of a job service: add -- --job_endpoint=HOST:PORT")
    addresses: dict[str, str | None] = {
        "job_endpoint": values.get("job_endpoint"),
        "dask_client_address": values.get("address"),
    }
    for name, address in addresses.items():
        parts = urlsplit(address if address and "://" in address else f"//{address or ''}")
        host: str | None
        port: int | None
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not address or address == "embed" or parts.scheme not in ("", "tcp", "tls"):
            continue
        if not isinstance(host, str) or not port:
            raise OptionError(f"--{name}={address} is not an address: use HOST:PORT")
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError as error:
            raise OptionError(
                f"--{name}={address} does not answer ({one_line(error)}): start the engine, or correct the address"
            ) from error


def user_error(error: BaseException) -> CoalescerError | None:
    """Return the CoalescerError behind a runner's exception, if any: workers send it as the text of a traceback."""
    direct = CoalescerError.__subclasses__()
    classes = {each.__name__: each for each in [*direct, *(sub for each in direct for sub in each.__subclasses__())]}
    matches = re.findall(r"index\.errors\.(\w+): (.*)", f"index.errors.{type(error).__name__}: {error}")
    for name, text in reversed(matches):
        if name in classes:
            return classes[name](re.sub(r" \[while running .*", "", text))
    return None


def engine_failure(error: BaseException) -> str | None:
    """Return on one line how an engine failed; None if an exception came from our own code."""
    text = str(error)
    if IN_OUR_CODE in text:
        return None
    if type(error).__module__.partition(".")[0] in ENGINE_MODULES:
        details = re.search(r"(?:details|error_message\S*) = \"([^\"]+)", text)
        return details[1] if details else one_line(error, typed=True)
    if isinstance(error, RuntimeError) and re.search(r"\bfailed in state |^Pipeline failed", text):
        return one_line(ValueError(text.strip().splitlines()[-1]))
    return one_line(error, typed=True) if isinstance(error, ConnectionError | TimeoutError) else None


def unfinished_futures(result: Any) -> str | None:
    """Return why a result that claims to be done is not: Dask's runner takes futures that were lost for finished."""
    lost = {future.status for future in getattr(result, "futures", ())} - {"finished"}
    return f"its tasks are {', '.join(sorted(lost))}" if lost else None


def is_dask_without_workers(result: Any) -> bool:
    """Return whether a result waits for a Dask scheduler that has no worker."""
    client = getattr(result, "client", None)
    return client is not None and not client.scheduler_info(n_workers=-1)["workers"]
