"""Local files and object stores behind one set of options, and files that are written whole.

Tables go through Lance's own object stores, shards and reports through fsspec. Both get the option names that LanceDB
documents (`aws_endpoint`, `aws_access_key_id`, ...); each store reads options that are not set from its usual
environment variables and credential files.
"""

import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from index.errors import CoalescerError, OptionError, OutOfReachError, SourceError, TableError, one_line
from index.reach import LISTING_SECONDS, RETRY_SECONDS, Patience, describe, is_denied, is_store_failure

T = TypeVar("T")

ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables of an S3 endpoint; the last that is set wins."""
S3_NAMES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "aws_endpoint": "endpoint_url",
    "aws_region": "region_name",
}
"""Lance's name of an option -> that of s3fs."""
OPTION_NAME = re.compile(r"[A-Za-z]+(_[A-Za-z]+)*")
"""What an error shows of a malformed option; anything else may be a secret."""


PREFIXES = ("aws_", "azure_storage_", "azure_", "google_")
KNOWN = {
    "aws_": "access_key_id secret_access_key session_token endpoint endpoint_url region default_region skip_signature "
    "virtual_hosted_style_request unsigned_payload checksum_algorithm metadata_endpoint imdsv1_fallback role_arn "
    "role_session_name web_identity_token_file endpoint_url_sts container_credentials_relative_uri "
    "container_credentials_full_uri container_authorization_token_file request_payer conditional_put "
    "copy_if_not_exists disable_tagging s3_express server_side_encryption sse_kms_key_id sse_bucket_key_enabled "
    "sse_customer_key_base64",
    "azure_storage_": "account_name account_key access_key client_id client_secret tenant_id authority_id sas_key "
    "sas_token token endpoint use_emulator",
    "azure_": "use_fabric_endpoint use_azure_cli skip_signature msi_endpoint msi_resource_id object_id "
    "federated_token_file",
    "google_": "service_account service_account_path service_account_key application_credentials skip_signature",
    "": "allow_http allow_invalid_certificates connect_timeout timeout request_timeout pool_idle_timeout "
    "pool_max_idle_per_host proxy_url proxy_ca_certificate proxy_excludes user_agent http1_only http2_only "
    "download_retry_count client_max_retries client_retry_timeout connection_string anon project",
}
"""What LanceDB and fsspec's file systems take, by prefix; a name may leave its prefix out."""
SECRETS = ("secret", "token", "access_key", "account_key", "sas_", "service_account", "customer_key", "connection_")
"""Parts of the names of options that are secrets."""
SECRET_VARIABLE = "COALESCER_SECRET_"
LANCE_RETRIES = 100
"""Lance pauses between its attempts as we do; the seconds end them, not this number."""
READ_SECONDS = 60.0
"""A web server that sends nothing for so long counts as away."""

_answered: set[str] = set()
"""Stores that have answered in this process: a mistake in their address is not what keeps them away."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How to reach the object stores of URIs. Its options are never written or shown.

    Pickled to workers without its secrets, so that no job graph holds them: a worker finds those in its environment,
    which local workers inherit, or under their usual names such as AWS_SECRET_ACCESS_KEY.
    """

    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    patience: float | None = field(default=None, compare=False)
    """Seconds that a store which is away is waited for; None: as long as index.reach says."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle names and values, but of secrets the environment variable that holds the value."""
        options = tuple((name, *_hidden(name, value)) for name, value in self.options)
        return _unpickled, (options, self.patience, tuple(_answered))

    @classmethod
    def of(cls, texts: Sequence[str] = (), patience: float | None = None) -> "Storage":
        """Parse `name=value` texts; the environment's endpoint is included, for workers on other machines.

        Raises OptionError if a text has no name or no `=`, or if its name is unknown.
        """
        options: dict[str, str] = {}
        for variable in ENDPOINTS:
            if variable in os.environ:
                options["aws_endpoint"] = os.environ[variable]
        for text in texts:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise OptionError(
                    f"--storage-option {_shown(name)} is not of the form name=value: for instance aws_region=eu-west-1"
                )
            _check_name(name.lower())
            options[_canonical(name.lower())] = value
        if options.get("aws_endpoint", "").startswith("http://"):
            options.setdefault("allow_http", "true")
        return cls(tuple(sorted(options.items())), patience)

    @property
    def lance(self) -> dict[str, str]:
        """The `storage_options` of Lance and LanceDB."""
        options = dict(self.options)
        if "aws_endpoint" in options:
            # Under this name it wins over AWS_ENDPOINT_URL_S3 of the environment.
            options["aws_endpoint_url_s3"] = options["aws_endpoint"]
        seconds = RETRY_SECONDS if self.patience is None else self.patience
        # Lance's own patience is half a second.
        return {"client_max_retries": str(LANCE_RETRIES), "client_retry_timeout": f"{max(1, round(seconds))}"} | options

    def files(self, uri: str) -> tuple[Any, str]:
        """Return the fsspec file system of a URI, and the path in it.

        Raises SourceError if the package of its protocol is not installed.
        """
        from fsspec.core import url_to_fs

        options: Mapping[str, Any] = {}
        if uri.startswith("s3://"):
            renamed = {S3_NAMES[name]: value for name, value in self.options if name in S3_NAMES}
            region = renamed.pop("region_name", None)
            # Other processes write the files that we look for: a cached listing would hide them.
            client = {"region_name": region} if region else {}
            options = {**renamed, "use_listings_cache": False, "client_kwargs": client}
        elif not is_local(uri) and not uri.startswith(("http://", "https://")):
            # The options of S3, which the environment may set, mean nothing to other stores.
            options = {k: v for k, v in self.options if not k.startswith("aws_") and k != "allow_http"}
        try:
            files, path = url_to_fs(uri, **options)
        except (ImportError, ValueError) as error:
            raise SourceError(f"{uri} cannot be reached: {error}") from error
        return files, path

    def open(self, uri: str) -> Any:
        """Open a file for reading bytes, as a context manager."""
        files, path = self.files(uri)
        return files.open(path, "rb")

    def exists(self, uri: str) -> bool:
        """Return whether there is a file or folder."""
        files, path = self.files(uri)
        if not uri.startswith(("http://", "https://")):
            return bool(self._reached(uri, lambda: files.exists(path)))
        try:
            # `exists` of fsspec says no for any failure.
            self._reached(uri, lambda: files.info(path))
        except FileNotFoundError as error:
            if is_denied(error):
                return False
            raise
        return True

    def names(self, folder: str) -> list[str]:
        """List the names of a folder's files, sorted; empty if there is no folder.

        Raises TableError if there is no such bucket.
        """
        files, path = self.files(folder)
        try:
            listed = self._reached(folder, lambda: files.ls(path, detail=False))
        except FileNotFoundError as error:
            _check_bucket(folder, files, path, error)
            return []
        return sorted(name.rsplit("/", 1)[-1] for name in listed)

    def read_json(self, uri: str) -> Any:
        """Read a JSON file; None if there is none."""
        files, path = self.files(uri)
        try:
            return json.loads(self._reached(uri, lambda: files.cat_file(path)))
        except FileNotFoundError as error:
            if is_denied(error):
                return None
            raise

    def write_json(self, uri: str, content: Any) -> None:
        """Write JSON atomically; raises TableError if that fails."""
        self.write_text(uri, _indented(content))

    def write_text(self, uri: str, text: str) -> None:
        """Write text atomically: readers see the old file or the new one. Raises TableError if that fails."""
        try:
            if is_local(uri):
                write_text(Path(uri), text)
            else:
                files, path = self.files(uri)
                self._reached(uri, lambda: files.pipe_file(path, text.encode()))
        except CoalescerError:
            raise
        except Exception as error:  # every object store has errors of its own
            raise unwritable(uri, error) from error

    def remove(self, uri: str) -> None:
        """Delete a file, or a folder with its content, if it exists."""
        files, path = self.files(uri)
        if self.exists(uri):
            try:
                self._reached(uri, lambda: files.rm(path, recursive=True))
            except FileNotFoundError:
                if self.exists(uri):  # the answer to an attempt that has deleted it may be lost
                    raise

    def _reached(self, uri: str, call: Callable[[], T]) -> T:
        """Return the result of a call, which is repeated while the store is away.

        Raises OutOfReachError if it stays away, earlier if it has never answered: its address may be wrong. Any other
        answer raises what the file system makes of it.
        """
        if is_local(uri):
            return call()
        store = "/".join(uri.split("/")[:3])
        patience = Patience(uri, limit=self._limit(store))
        while True:
            try:
                result = call()
            except Exception as error:
                if not is_store_failure(error) or is_denied(error) or isinstance(error, FileExistsError):
                    raise
                if patience.seconds_left(error) <= 0:
                    raise OutOfReachError(
                        f"{uri} cannot be reached ({describe(error)}): check the address, the credentials and "
                        "--storage-option, then rerun the same command"
                    ) from error
                patience.wait(error)
            else:
                _answered.add(store)
                return result

    def _limit(self, store: str) -> float | None:
        if self.patience is not None:
            return self.patience
        return RETRY_SECONDS if store in _answered else LISTING_SECONDS


def _check_bucket(uri: str, files: Any, path: str, error: BaseException) -> None:
    """Raise TableError if the reason why a folder is not found is that its bucket or container does not exist."""
    if is_local(uri) or "NoSuchBucket" in f"{error} {error.__cause__!r}":
        exists = is_local(uri)
    else:
        try:
            exists = bool(files.exists(path.lstrip("/").partition("/")[0]))
        except Exception:  # a key may be allowed to list a folder, but not its bucket
            exists = True
    if not exists:
        bucket = "/".join(uri.split("/")[:3])
        raise TableError(f"{bucket} does not exist (NoSuchBucket): create it, or correct the name") from error


def unwritable(uri: str | Path, error: Exception) -> TableError:
    """Return the error for a target that cannot be written."""
    if not is_local(str(uri)):
        return TableError(
            f"{uri} cannot be written ({describe(error)}): check that the bucket exists, the credentials, the region "
            "and the endpoint (--storage-option), and that the key may write; rerun the same command to resume"
        )
    return TableError(
        f"{uri} cannot be written ({one_line(error)}): check free space, permissions and --storage-option, or name "
        "another --table; rerun the same command to resume"
    )


def _check_name(name: str) -> None:
    """Raise OptionError, which does not show the value, if an option is unknown."""
    known = [prefix + each for prefix, names in KNOWN.items() for each in names.split()]
    if name in known or name in [each for names in KNOWN.values() for each in names.split()]:
        return
    near = get_close_matches(name, known, n=1)
    family = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "aws_")
    listed = ", ".join(prefix + each for prefix in (family, "") for each in KNOWN[prefix].split())
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"--storage-option {_shown(name)} is unknown: {hint}use one of {listed}")


def _shown(name: str) -> str:
    return repr(name) if OPTION_NAME.fullmatch(name) else "(not shown)"


def _hidden(name: str, value: str) -> tuple[str, bool]:
    """Return an option's value and False, or for a secret the environment variable that now holds it and True."""
    if not any(part in name for part in SECRETS):
        return value, False
    variable = SECRET_VARIABLE + hashlib.sha256(f"{name}={value}".encode()).hexdigest()[:16]
    os.environ[variable] = value
    return variable, True


def _unpickled(
    options: tuple[tuple[str, str, bool], ...], patience: float | None, answered: tuple[str, ...]
) -> Storage:
    _answered.update(answered)
    revealed = tuple((name, _revealed(name, value) if hidden else value) for name, value, hidden in options)
    return Storage(revealed, patience)


def _revealed(name: str, variable: str) -> str:
    value = os.environ.get(variable, os.environ.get(name.upper()))
    if value is None:
        raise OptionError(
            f"a worker on {socket.gethostname()} lacks the secret --storage-option {name}, which no job graph holds: "
            f"set {name.upper()} in the environment of the workers"
        )
    return value


def _canonical(name: str) -> str:
    """Map `endpoint_url`, `endpoint` and `aws_endpoint` to one name, as Lance does; other names are unchanged."""
    bare = name.removeprefix("aws_").removesuffix("_url")
    return f"aws_{bare}" if f"aws_{bare}" in S3_NAMES else name


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a local file atomically."""
    write_text(path, _indented(content))


def write_text(path: Path, text: str) -> None:
    """Write text to a local file atomically: to a temporary file in its folder, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _indented(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
