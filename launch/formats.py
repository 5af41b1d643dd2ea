"""Formats of the launchers' flag values, as Google Cloud accepts them."""

import re

from gemma_encoder.inputs.errors import InputError

# Names that Cloud TPU, GKE and xpk all accept, with room for a slice index appended to them.
_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_NAME_MEANING = (
    "lowercase letters, digits and hyphens, at most 40 characters, "
    "starting with a letter and not ending with a hyphen"
)
_FORMATS = {  # by flag: the pattern, and its meaning for error messages
    "name": (_NAME, _NAME_MEANING),
    "cluster": (_NAME, _NAME_MEANING),
    "project": (
        r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
        "a project ID, e.g. my-project-123",
    ),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone, e.g. us-west4-a"),
    "workdir": (
        r"gs://[a-z0-9][-_.a-z0-9]+[a-z0-9](/[^\s/]+)+/?",
        "a folder in a bucket, e.g. gs://bucket/runs/first",
    ),
    "service_account": (
        r"[-a-z0-9]+@[-a-z0-9.]+",
        "an email address, e.g. trainer@my-project-123.iam.gserviceaccount.com",
    ),
    "runtime_version": (r"[a-z0-9][-.a-z0-9]*", "a TPU software version, e.g. v2-alpha-tpuv6e"),
    "image": (
        r"[a-z0-9][-.a-z0-9]*(:[0-9]+)?(/[-_.a-z0-9]+)+((:[\w][-.\w]*)|(@sha256:[0-9a-f]{64}))?",
        "an image, e.g. us-docker.pkg.dev/project/repository/image:tag",
    ),
    "registry": (
        r"[a-z0-9][-.a-z0-9]*(:[0-9]+)?(/[-_.a-z0-9]+)+",
        "an image repository, e.g. us-docker.pkg.dev/project/repository",
    ),
}


def check_format(flag: str, value: str | None) -> str:
    """Returns the value of a flag; raises InputError if it is missing or has a wrong format."""
    pattern, meaning = _FORMATS[flag]
    if value is None:
        raise InputError(f"--{flag} is missing; expected {meaning}")
    if not re.fullmatch(pattern, value):
        raise InputError(f"--{flag}={value!r} is invalid; expected {meaning}")
    return value
