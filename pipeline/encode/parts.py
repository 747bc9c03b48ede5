"""Parts of an encode run: N commands that any scheduler starts, of which each encodes every N-th shard.

Parts share one plan, DB/NAME.encode/parts-KEY.json. The first of them writes it, and KEY tells for which state of the
table, so that no plan is ever replaced. A part at work holds the lock of DB/NAME.encode/part-I-of-N, which is free
again after it was killed. A part publishes nothing: the command without --part does, once no part is at work and every
shard has a checkpoint. Each of the two takes its own lock before it looks at the other's, so they never work together.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index.errors import LockedError, OptionError, TableError
from index.table.lock import hold_lock, lock_holder
from index.table.once import write_once
from index.table.storage import Storage, is_local
from index.table.table import is_table, open_table, runs_folder
from index.terminal import print_status
from pipeline.config import EncodeConfig, Part, RuntimeConfig
from pipeline.encode.checkpoints import UNREAD, Checkpoints, file_name

PLAN_NAME = re.compile(r"parts-[0-9a-f]{8}\.json")
PART_FOLDER = re.compile(r"part-(\d+)-of-(\d+)")
LOOK_SECONDS = 1.0
"""A command that only looks whether a part is at work holds its lock for a moment."""
CLOCK_SECONDS = 3.0
"""Stores tell the age of a lease in whole seconds, and allow for that before it may be taken over."""
SHOWN_PARTS = 20

Plan = dict[str, Any]


def check_divisible(config: EncodeConfig, part: Part) -> None:
    """Raise OptionError if a run cannot be encoded in parts."""
    if config.filters.dedup:
        raise OptionError(
            f"--dedup {config.filters.dedup} compares all samples of a run, and --part {part} reads its own shards "
            "alone: leave out --dedup, or leave out --part and add workers by --num-workers or --runner"
        )


def read_plans(uri: str, storage: Storage) -> list[Plan]:
    """Return the plans of a table's unfinished runs in parts; more than one only if the table changed meanwhile."""
    root = runs_folder(uri)
    contents = [storage.read_json(f"{root}/{name}") for name in storage.names(root) if PLAN_NAME.fullmatch(name)]
    return [content for content in contents if content]


def agree_on_plan(uri: str, plan: Plan, storage: Storage) -> Plan:
    """Return the plan of the part that was the first to write one for this state of the table."""
    key = hashlib.sha256(json.dumps(plan["base_run_ids"]).encode()).hexdigest()[:8]
    agreed: Plan = write_once(f"{runs_folder(uri)}/parts-{key}.json", plan, storage)
    return agreed


@contextlib.contextmanager
def hold_part(uri: str, part: Part, storage: Storage) -> Iterator[None]:
    """Hold the lock of a part while the block runs; one that was killed a moment ago is waited for.

    Raises LockedError if the same part, or a command without --part, is at work.
    """
    root = runs_folder(uri)
    folder, purpose = f"{root}/part-{part.number}-of-{part.count}", f"encode --part {part}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder, storage, purpose))
        except LockedError as error:
            if error.seconds:
                print_status(f"pipeline encode: waiting {error.seconds:.0f} s for part {part}, which may be gone")
            time.sleep(error.seconds + (CLOCK_SECONDS if error.seconds else LOOK_SECONDS))
            stack.enter_context(hold_lock(folder, storage, purpose))
        if holder := lock_holder(root, storage):
            raise LockedError(f"{uri} is being encoded without --part ({holder}): wait for that command, or stop it")
        yield
    if is_local(root):
        with contextlib.suppress(OSError):
            Path(root).rmdir()


def check_parts(uri: str, runtime: RuntimeConfig) -> None:
    """Raise TableError, with the list, if parts of the table's run are at work or have not encoded all their shards."""
    storage = runtime.storage
    plans, running = read_plans(uri, storage), _running(uri, storage)
    run_ids = list(open_table(uri, storage=storage).meta.run_ids) if plans and is_table(uri, storage) else None
    if any(plan["run_id"] in (run_ids or ()) for plan in plans):
        return
    plan = next((plan for plan in plans if plan["base_run_ids"] == run_ids), None)
    if plans and plan is None and not running:
        raise TableError(
            f"{runs_folder(uri)} holds parts of a run that was planned before {uri} changed: start all parts again "
            "with --part, or delete the folder to encode without"
        )
    states = {number: f"running: {holder}" for number, holder in running.items()}
    states |= _unfinished(uri, plan, runtime, set(running)) if plan else {}
    if not states:
        return
    shown = ", ".join(f"{number} ({states[number]})" for number in sorted(states)[:SHOWN_PARTS])
    more = f", and {len(states) - SHOWN_PARTS:,} more" if len(states) > SHOWN_PARTS else ""
    count = plan["num_parts"] if plan else "N"
    raise TableError(
        f"{uri} is encoded in {count} parts, and these are not finished: {shown}{more}: wait for those that run, type "
        f"the others again with --part I/{count}, and then this command"
    )


def not_encoded_by_its_part(uri: str, shard: str, plan: Plan) -> TableError:
    """Return the error for a shard whose part has finished it, and whose checkpoint does not hold any more."""
    count = plan["num_parts"]
    part = Part(plan["shards"].index(shard) % count + 1, count)
    return TableError(
        f"{uri} is not finished: {shard} has changed since part {part} encoded it, or its files are gone: "
        f"rerun with --part {part}, and then this command"
    )


def remove_parts(uri: str, storage: Storage) -> None:
    """Delete the plans of a published run in parts, and what killed parts have left."""
    root = runs_folder(uri)
    names = storage.names(root)
    for name in sorted(names, key=lambda name: not PLAN_NAME.fullmatch(name)):
        is_left = PART_FOLDER.fullmatch(name) and lock_holder(f"{root}/{name}", storage) is None
        if is_left or PLAN_NAME.fullmatch(name):
            storage.remove(f"{root}/{name}")


def _running(uri: str, storage: Storage) -> dict[int, str]:
    """Return the numbers of the parts that are at work, and who does each."""
    root = runs_folder(uri)
    found = {name: PART_FOLDER.fullmatch(name) for name in storage.names(root)}
    holders = {int(match[1]): lock_holder(f"{root}/{name}", storage) for name, match in found.items() if match}
    return {number: holder for number, holder in holders.items() if holder}


def _unfinished(uri: str, plan: Plan, runtime: RuntimeConfig, running: set[int]) -> dict[int, str]:
    """Return the numbers of the parts that have shards left and do not run, and how many."""
    names = set(runtime.storage.names(Checkpoints(f"{runs_folder(uri)}/{plan['run_id']}").folder))
    count, shards, states = plan["num_parts"], plan["shards"], dict[int, str]()
    for number in range(1, count + 1):
        own = shards[number - 1 :: count]
        left = [shard for shard in own if file_name(shard) not in names]
        unread = [shard for shard in left if file_name(shard, UNREAD) in names]
        if unread and len(unread) == len(left):
            if not runtime.allow_missing_shards:
                states[number] = f"{len(unread):,} of {len(own):,} shards could not be read"
        elif left:
            states[number] = f"{len(left):,} of {len(own):,} shards left"
    return {number: state for number, state in states.items() if number not in running}
