"""Options of object stores: one set of names, checked against a list, for shards (fsspec) and tables (Lance).

Names are those that LanceDB documents, with some shorter ones: a name may leave its prefix out, and `anonymous` and
`profile` say what Lance and fsspec call otherwise. Each store reads options that are not set from its usual environment
variables and credential files.
"""

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from index.errors import OptionError, one_line

ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables of an S3 endpoint; the last that is set wins."""
CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
S3_NAMES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "aws_endpoint": "endpoint_url",
    "aws_profile": "profile",
}
"""Lance's name of an option -> that of s3fs."""
AZURE_NAMES = {
    "azure_storage_account_name": "account_name",
    "azure_storage_account_key": "account_key",
    "azure_storage_sas_token": "sas_token",
    "azure_storage_client_id": "client_id",
    "azure_storage_client_secret": "client_secret",
    "azure_storage_tenant_id": "tenant_id",
    "connection_string": "connection_string",
}
"""The same for adlfs."""
AZURE_PARTS = {
    "AccountName": "azure_storage_account_name",
    "AccountKey": "azure_storage_account_key",
    "SharedAccessSignature": "azure_storage_sas_token",
    "BlobEndpoint": "azure_storage_endpoint",
}
"""Parts of a connection string of Azure -> Lance's names."""
ANONYMOUS = ("aws_skip_signature", "azure_skip_signature", "google_skip_signature")
OTHER_NAMES = {
    "azure_storage_access_key": "azure_storage_account_key",
    "azure_storage_sas_key": "azure_storage_sas_token",
    "google_service_account_path": "google_service_account",
    "google_application_credentials": "google_service_account",
    "aws_default_region": "aws_region",
}
NOT_FOR_LANCE = ("aws_profile", "connection_string", "project")
OPTION_NAME = re.compile(r"[A-Za-z]+(_[A-Za-z]+)*")
"""What an error shows of a malformed option; anything else may be a secret."""
PREFIXES = ("aws_", "azure_storage_", "azure_", "google_")
KNOWN = {
    "aws_": "access_key_id secret_access_key session_token endpoint endpoint_url region default_region skip_signature "
    "profile virtual_hosted_style_request unsigned_payload checksum_algorithm metadata_endpoint imdsv1_fallback "
    "role_arn role_session_name web_identity_token_file endpoint_url_sts container_credentials_relative_uri "
    "container_credentials_full_uri container_authorization_token_file request_payer conditional_put "
    "copy_if_not_exists disable_tagging s3_express server_side_encryption sse_kms_key_id sse_bucket_key_enabled "
    "sse_customer_key_base64",
    "azure_storage_": "account_name account_key access_key client_id client_secret tenant_id authority_id sas_key "
    "sas_token token endpoint use_emulator",
    "azure_": "use_fabric_endpoint use_azure_cli skip_signature msi_endpoint msi_resource_id object_id "
    "federated_token_file",
    "google_": "service_account service_account_path service_account_key application_credentials skip_signature",
    "": "anonymous allow_http allow_invalid_certificates connect_timeout timeout request_timeout pool_idle_timeout "
    "pool_max_idle_per_host proxy_url proxy_ca_certificate proxy_excludes user_agent http1_only http2_only "
    "download_retry_count client_max_retries client_retry_timeout connection_string anon project",
}
"""What LanceDB and fsspec's file systems take, by prefix; a name may leave its prefix out."""
SECRETS = ("secret", "token", "access_key", "account_key", "sas_", "service_account", "customer_key", "connection_")
"""Parts of the names of options that are secrets."""


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """Return `name=value` texts and the environment's and profile's endpoint under Lance's names.

    Raises OptionError if a text has no name or no `=`, if its name is unknown, or if there is no such profile.
    """
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise OptionError(
                f"--storage-option {_shown(name)} is not of the form name=value: for instance aws_region=eu-west-1"
            )
        _check_name(name.lower())
        options |= _canonical(name.lower(), value)
    connection = options.get("connection_string", os.environ.get(CONNECTION_STRING, ""))
    options = _parts_of(connection) | options
    options = _of_environment(options.get("aws_profile")) | options
    if any(options.get(name, "").startswith("http://") for name in ("aws_endpoint", "azure_storage_endpoint")):
        options.setdefault("allow_http", "true")
    return options


def lance_options(options: Mapping[str, str]) -> dict[str, str]:
    """Return what Lance takes of parsed options."""
    taken = {name: value for name, value in options.items() if name not in NOT_FOR_LANCE}
    if "aws_endpoint" in taken:
        # Under this name it wins over AWS_ENDPOINT_URL_S3 of the environment.
        taken["aws_endpoint_url_s3"] = taken["aws_endpoint"]
    return taken


def fsspec_options(uri: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return what fsspec's file system of a URI takes of parsed options."""
    scheme = uri.partition("://")[0]
    if scheme in ("s3", "s3a"):
        return _s3fs(options)
    if scheme in ("az", "abfs", "abfss", "adl"):
        return _adlfs(options)
    if scheme in ("gs", "gcs"):
        token = "anon" if _is_true(options, "google_skip_signature") else options.get("google_service_account")
        found = {"token": token, "project": options.get("project")}
        return {name: value for name, value in found.items() if value} | {"use_listings_cache": False}
    return {}


def _s3fs(options: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {theirs: options[ours] for ours, theirs in S3_NAMES.items() if ours in options}
    client: dict[str, Any] = {"region_name": options["aws_region"]} if "aws_region" in options else {}
    if _is_true(options, "allow_invalid_certificates"):
        client["verify"] = False
    if _is_true(options, "aws_skip_signature"):
        renamed["anon"] = True
    if _is_true(options, "aws_request_payer"):
        renamed["requester_pays"] = True
    # Other processes write the files that we look for: a cached listing would hide them.
    return {**renamed, "use_listings_cache": False, "client_kwargs": client}


def _adlfs(options: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {theirs: options[ours] for ours, theirs in AZURE_NAMES.items() if ours in options}
    endpoint = options.get("azure_storage_endpoint")
    if endpoint and "connection_string" not in renamed:
        parts = {part: options[name] for part, name in AZURE_PARTS.items() if name in options}
        protocol = endpoint.partition("://")[0]
        parts = {"DefaultEndpointsProtocol": protocol} | parts
        renamed["connection_string"] = ";".join(f"{part}={value}" for part, value in parts.items())
    if _is_true(options, "azure_skip_signature"):
        renamed["anon"] = True
    elif "account_key" in renamed or "sas_token" in renamed or "connection_string" in renamed:
        renamed["anon"] = False
    return {**renamed, "use_listings_cache": False, "connection_timeout": 20, "read_timeout": 60}


def _is_true(options: Mapping[str, str], name: str) -> bool:
    return options.get(name, "false").lower() in ("true", "1", "yes", "on")


def _parts_of(connection: str) -> dict[str, str]:
    """Return the parts of a connection string of Azure as options, for Lance, which takes no such string."""
    pairs = (part.partition("=") for part in connection.split(";") if part)
    parts = {AZURE_PARTS[name]: value for name, _, value in pairs if name in AZURE_PARTS}
    return parts | ({"connection_string": connection} if parts else {})


def _of_environment(profile: str | None) -> dict[str, str]:
    """Return S3's endpoint and region from the environment, or else from the profile, so that workers get them.

    A profile that is named becomes the environment's, where Lance looks for it.
    """
    if profile is not None:
        os.environ["AWS_PROFILE"] = profile
    found: dict[str, str] = {}
    config = _profile(profile)
    for name, value in (("aws_endpoint", config.get("endpoint_url")), ("aws_region", config.get("region"))):
        if value:
            found[name] = value
    for variable in ENDPOINTS:
        if variable in os.environ:
            found["aws_endpoint"] = os.environ[variable]
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        found["aws_region"] = os.environ.get("AWS_REGION") or os.environ["AWS_DEFAULT_REGION"]
    return found


def _profile(name: str | None) -> dict[str, str]:
    """Return the settings of an AWS profile, with the endpoint of its S3 service if it has one."""
    file = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    if name is None and not file.exists():
        return {}
    try:
        from botocore.exceptions import ProfileNotFound
        from botocore.session import Session
    except ImportError:  # without the extra s3 there is no botocore
        return {}
    session = Session(profile=name)
    try:
        settings = session.get_scoped_config()
    except ProfileNotFound as error:
        known = ", ".join(session.available_profiles) or "none"
        raise OptionError(f"{one_line(error)}: use one of those in {file} ({known})") from error
    service = session.full_config.get("services", {}).get(settings.get("services"), {}).get("s3", {})
    endpoint = service.get("endpoint_url") if isinstance(service, dict) else None
    texts = {key: value for key, value in settings.items() if isinstance(value, str)}
    return texts | ({"endpoint_url": endpoint} if endpoint else {})


def _canonical(name: str, value: str) -> dict[str, str]:
    """Return an option under Lance's full name; `anonymous` is one of each store."""
    if name in ("anonymous", "anon", "skip_signature"):
        return dict.fromkeys(ANONYMOUS, value)
    bare = name.removeprefix("aws_").removesuffix("_url")
    if bare == "endpoint":
        return {"aws_endpoint": value}
    if name.removeprefix("azure_storage_").removeprefix("azure_") == "endpoint":
        return {"azure_storage_endpoint": value}
    known = next((p for p in PREFIXES for each in KNOWN[p].split() if name == each), "")
    full = f"{known}{name}"
    short = name.removeprefix("azure_")
    if name.startswith("azure_") and short in KNOWN["azure_storage_"].split():
        full = f"azure_storage_{short}"
    return {OTHER_NAMES.get(full, full): value}


def _check_name(name: str) -> None:
    """Raise OptionError, which does not show the value, if an option is unknown."""
    known = [prefix + each for prefix, names in KNOWN.items() for each in names.split()]
    short = [each for names in KNOWN.values() for each in names.split()]
    if name in known or name in short or name.removeprefix("azure_") in KNOWN["azure_storage_"].split():
        return
    near = get_close_matches(name, known, n=1)
    family = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "aws_")
    listed = ", ".join(prefix + each for prefix in (family, "") for each in KNOWN[prefix].split())
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"--storage-option {_shown(name)} is unknown: {hint}use one of {listed}")


def _shown(name: str) -> str:
    return repr(name) if OPTION_NAME.fullmatch(name) else "(not shown)"
