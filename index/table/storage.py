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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from index.errors import OptionError, SourceError, TableError, one_line

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


@dataclass(frozen=True, slots=True)
class Storage:
    """How to reach the object stores of URIs. Its options are never written or shown.

    Pickled to workers without its secrets, so that no job graph holds them: a worker finds those in its environment,
    which local workers inherit, or under their usual names such as AWS_SECRET_ACCESS_KEY.
    """

    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle names and values, but of secrets the environment variable that holds the value."""
        return _unpickled, (tuple((name, *_hidden(name, value)) for name, value in self.options),)

    @classmethod
    def of(cls, texts: Sequence[str] = ()) -> "Storage":
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
        return cls(tuple(sorted(options.items())))

    @property
    def lance(self) -> dict[str, str] | None:
        """The `storage_options` of Lance and LanceDB."""
        options = dict(self.options)
        if "aws_endpoint" in options:
            # Under this name it wins over AWS_ENDPOINT_URL_S3 of the environment.
            options["aws_endpoint_url_s3"] = options["aws_endpoint"]
        return options or None

    def files(self, uri: str) -> tuple[Any, str]:
        """Return the fsspec file system of a URI, and the path in it.

        Raises SourceError if the package of its protocol is not installed.
        """
        from fsspec.core import url_to_fs

        if uri.startswith("hf://"):
            from index.table.hub_files import hub_files, is_pinned

            if is_pinned(uri):
                return hub_files(), uri.removeprefix("hf://")
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
        return bool(files.exists(path))

    def names(self, folder: str) -> list[str]:
        """List the names of a folder's files, sorted; empty if there is no folder."""
        files, path = self.files(folder)
        try:
            return sorted(name.rsplit("/", 1)[-1] for name in files.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read_json(self, uri: str) -> Any:
        """Read a JSON file; None if there is none."""
        files, path = self.files(uri)
        try:
            return json.loads(files.cat_file(path))
        except FileNotFoundError:
            return None

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
                files.pipe_file(path, text.encode())
        except Exception as error:  # every object store has errors of its own
            raise unwritable(uri, error) from error

    def remove(self, uri: str) -> None:
        """Delete a file, or a folder with its content, if it exists."""
        files, path = self.files(uri)
        if files.exists(path):
            files.rm(path, recursive=True)


def unwritable(uri: str | Path, error: Exception) -> TableError:
    """Return the error for a target that cannot be written."""
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


def _unpickled(options: tuple[tuple[str, str, bool], ...]) -> Storage:
    return Storage(tuple((name, _revealed(name, value) if hidden else value) for name, value, hidden in options))


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
