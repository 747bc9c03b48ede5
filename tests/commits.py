"""Do something after each commit of a build, in Lance's own functions: copy the table, or end the process."""

import os
from functools import wraps

from lance.dataset import DatasetOptimizer, LanceDataset, Tags

FUNCTIONS = (
    (LanceDataset, "commit"),
    (LanceDataset, "create_index"),
    (LanceDataset, "create_scalar_index"),
    (LanceDataset, "update_schema_metadata"),
    (LanceDataset, "drop_index"),
    (LanceDataset, "commit_existing_index_segments"),
    (DatasetOptimizer, "optimize_indices"),
    (Tags, "create"),
)
KILLED = 9


def after_each_commit(setattr_, action):
    """Let each function that commits call `action` with its name afterwards; `setattr_` sets it on its class."""
    for owner, name in FUNCTIONS:
        original = owner.__dict__[name]
        function = original.__func__ if isinstance(original, staticmethod) else original

        @wraps(function)
        def committing(*args, _function=function, _name=name, **options):
            result = _function(*args, **options)
            action(_name)
            return result

        setattr_(owner, name, staticmethod(committing) if isinstance(original, staticmethod) else committing)


def build_until_commit(uri, number, options):
    """Build an index in this process, and end it right after the commit `number`, counted from 1."""
    from index.build.build_index import BuildConfig, build_index
    from index.table.table import open_table

    commits = []

    def count(name):
        commits.append(name)
        if len(commits) == number:
            os._exit(KILLED)

    after_each_commit(setattr, count)
    build_index(open_table(uri), BuildConfig(**options))
