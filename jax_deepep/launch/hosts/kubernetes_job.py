"""What a pod of an Indexed Kubernetes Job cannot read from its variables: the number of pods and their name.

`JOB_COMPLETION_INDEX` is the pod's index; the Job object has the rest. One GET with the pod's service
account, through the standard library: the `kubernetes` package that JAX requires is not needed.
"""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_REMEDY = "give --hosts NUMBER_OF_PODS --coordinator JOB-0.SUBDOMAIN instead (the pod's index is known)"


class KubernetesError(ValueError):
    """The Job could not be read, or cannot run a program of several pods."""


@dataclass(frozen=True)
class KubernetesJob:
    """The Job this pod belongs to."""

    name: str
    parallelism: int  # pods that run at the same time
    coordinator: str  # DNS name of pod 0


def read_job(
    environ: Mapping[str, str], fetch: Callable[[Mapping[str, str], str], dict[str, Any]] | None = None
) -> KubernetesJob:
    """Read the Job of this pod from the cluster.

    Args:
        environ: the pod's variables.
        fetch: gets one Job by its name; replaced in tests.
    """
    index = environ["JOB_COMPLETION_INDEX"]
    host = environ.get("HOSTNAME", "")
    name = host.removesuffix(f"-{index}")  # Kubernetes names the pods of an Indexed Job JOB-INDEX
    if name in ("", host):
        raise KubernetesError(f"HOSTNAME: expected JOB-{index} in an Indexed Job, got {host!r}; {_REMEDY}")
    spec = (fetch or _fetch)(environ, name)["spec"]
    parallelism = int(spec.get("parallelism", 1))
    subdomain = spec["template"]["spec"].get("subdomain")
    if parallelism == 1:
        return KubernetesJob(name, 1, "127.0.0.1")
    if not subdomain:
        raise KubernetesError(
            f"Job {name!r} has {parallelism} pods and no subdomain, so they cannot find each other: make a "
            "headless Service (clusterIP: None, publishNotReadyAddresses: true) and set "
            "spec.template.spec.subdomain to its name"
        )
    return KubernetesJob(name, parallelism, f"{name}-0.{subdomain}")


def _fetch(environ: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        namespace = (_ACCOUNT / "namespace").read_text().strip()
        token = (_ACCOUNT / "token").read_text().strip()
        server = f"{environ['KUBERNETES_SERVICE_HOST']}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        request = urllib.request.Request(
            f"https://{server}/apis/batch/v1/namespaces/{namespace}/jobs/{name}",
            headers={"Authorization": f"Bearer {token}"},
        )
        context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        with urllib.request.urlopen(request, timeout=30, context=context) as reply:
            job: dict[str, Any] = json.load(reply)
            return job
    except urllib.error.HTTPError as error:
        allow = "allow its service account to get jobs, or " if error.code == 403 else ""
        raise KubernetesError(
            f"Kubernetes answered {error.code} about Job {name!r}: {allow}{_REMEDY}"
        ) from error
    except OSError as error:
        raise KubernetesError(
            f"Kubernetes could not be asked about Job {name!r} ({error}): {_REMEDY}"
        ) from error
