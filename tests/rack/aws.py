"""AWS in a box: moto answers the EC2 and IAM APIs, and each instance that it reports is run.

Every instance becomes a host of a rack, with the addresses that moto assigned, the requested key,
and instance metadata on the link-local address. So the real launcher starts a cluster file for
AWS, over real SSH, without a cloud. Tests use `exhaust` for capacity errors, `notice` to announce
a spot interruption, `reclaim` to carry it out, and `calls` for the requests so far.
"""

import contextlib
import ctypes
import io
import json
import os
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.server import DomainDispatcherApplication, create_backend_app
from rack import Rack
from werkzeug.serving import WSGIRequestHandler, make_server

GATEWAY = "172.31.255.254"
METADATA = "169.254.169.254"
API = f"http://{GATEWAY}:5000"
CLONE_NEWNET = 0x40000000
USER = "ubuntu"
IMAGE = "ami-03cf127a"
"""An image that moto knows."""

FAMILIES = ("m5.", "m7i.", "g6.")
"""The families of the instance types that exist here."""

ROLE = "ray-autoscaler-v1"
PASSED = ("InstanceType", "SpotOptions", "MarketType", "MaxCount", "InstanceId", "TagSpecification")


def in_network(process: int, work: Callable[[], Any]) -> Any:
    """Call `work` in a thread in the network namespace of a process; returns its result."""
    result: list[Any] = []

    def run() -> None:
        with Path(f"/proc/{process}/ns/net").open() as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        result.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


class Silent(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


class AwsBox(Rack):
    """The host `me` is the machine of a user with an account; the others are instances."""

    def __init__(self, folder: Path, region: str) -> None:
        environment = {
            "AWS_ENDPOINT_URL": API,
            "AWS_DEFAULT_REGION": region,
            # The machine image has everything, and pip can download nothing ("0" means yes here).
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        super().__init__(folder, {"me": "172.31.255.2"}, GATEWAY, bits=16, environment=environment)
        self.region = region
        self.calls: list[tuple[str, dict[str, str]]] = []
        self._exhausted: set[tuple[str, str]] = set()
        self._notices: dict[str, float] = {}
        self._closing = threading.Event()
        self._errors: list[str] = []

    def __enter__(self) -> "AwsBox":
        super().__enter__()
        for name in [each for each in INSTANCE_TYPES if not each.startswith(FAMILIES)]:
            del INSTANCE_TYPES[name]  # Ray lists them all, for which moto needs a minute
        os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"
        self._at_the_bridge(f"ip addr add {METADATA}/32 dev bridge")
        moto = DomainDispatcherApplication(create_backend_app)
        self._serve(GATEWAY, 5000, self._recorded(moto))
        self._serve(METADATA, 80, self._metadata)
        # An earlier box of this process has left its state in moto.
        reset = urllib.request.Request(f"{API}/moto-api/reset", method="POST")
        in_network(self.process, lambda: urllib.request.urlopen(reset, timeout=60).close())
        self.boot("me")
        # Public addresses are on the same network.
        self.run("me", "ip route add 54.0.0.0/8 dev eth0; mkdir -p ~/work ~/.aws ~/.ssh")
        account = "[default]\naws_access_key_id = me\naws_secret_access_key = mine\n"
        (self.disk("me") / "root/.aws/credentials").write_text(account)
        self._thread = threading.Thread(target=self._run_instances, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join(60)
        super().__exit__(*error)
        assert not self._errors, self._errors

    def client(self, service: str) -> Any:
        """A client for use within `in_network`."""
        return boto3.client(
            service,
            endpoint_url=API,
            region_name=self.region,
            aws_access_key_id="box",
            aws_secret_access_key="box",
        )

    def ask(self, work: Callable[[Any], Any], service: str = "ec2") -> Any:
        """The result of `work` with a client within the box."""
        return in_network(self.process, lambda: work(self.client(service)))

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """The instances in these states, by default in those that cost money."""
        described = self.ask(lambda ec2: ec2.describe_instances())
        return _in_states(described, states or ("pending", "running"))

    def exhaust(self, instance_type: str, market: str = "spot") -> None:
        """Have all later requests for this capacity fail."""
        self._exhausted.add((instance_type, market))

    def restore(self, instance_type: str, market: str = "spot") -> None:
        self._exhausted.discard((instance_type, market))

    def notice(self, instance: str, left_s: float) -> None:
        """Announce an interruption to a spot instance; `reclaim` carries it out."""
        self._notices[instance] = time.time() + left_s

    def reclaim(self, instance: str) -> None:
        self.ask(lambda ec2: ec2.terminate_instances(InstanceIds=[instance]))

    def called(self, action: str) -> list[dict[str, str]]:
        """The parameters of every request for an action so far."""
        return [parameters for name, parameters in self.calls if name == action]

    def _serve(self, address: str, port: int, application: Any) -> None:
        server = in_network(
            self.process,
            lambda: make_server(address, port, application, threaded=True, request_handler=Silent),
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def _recorded(self, moto: Any) -> Callable[..., Iterable[bytes]]:
        """The API, which records requests that change something, and refuses exhausted capacity."""

        def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            fields = urllib.parse.parse_qs(body.decode("latin1"))
            parameters = {name: values[0] for name, values in fields.items()}
            action = parameters.get("Action", "")
            if action and not action.startswith(("Describe", "Get", "List")):
                self.calls.append((action, parameters))
            market = parameters.get("InstanceMarketOptions.MarketType", "on-demand")
            if action == "RunInstances" and (parameters["InstanceType"], market) in self._exhausted:
                reason = (
                    f"We currently do not have sufficient {parameters['InstanceType']} capacity"
                )
                answer = (
                    "<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code>"
                    f"<Message>{reason}</Message></Error></Errors></Response>"
                ).encode()
                start("500 Error", [("Content-Length", str(len(answer)))])
                return [answer]
            return moto(environ, start)

        return application

    def _metadata(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """Instance metadata, version 2, which requires a session token."""
        path = environ["PATH_INFO"].rstrip("/").removeprefix("/latest")
        answer = None
        if path == "/api/token" and environ["REQUEST_METHOD"] == "PUT":
            answer = "session"
        elif environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN") != "session":
            start("401 Unauthorized", [("Content-Length", "0")])
            return [b""]
        else:
            answer = self._about(environ["REMOTE_ADDR"], path.removeprefix("/meta-data"))
        text = (answer or "").encode()
        status = "200 OK" if answer is not None else "404 Not Found"
        start(status, [("Content-Length", str(len(text)))])
        return [text]

    def _about(self, address: str, path: str) -> str | None:
        names = {host.address: host.name for host in self.hosts.values()}
        instance = names.get(address, "")
        role = "/iam/security-credentials"
        keys = {"AccessKeyId": "role", "SecretAccessKey": "role", "Token": "role"}
        period = {"LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z"}
        answers = {
            role: ROLE,
            f"{role}/{ROLE}": json.dumps({"Code": "Success", "Type": "AWS-HMAC", **keys, **period}),
            "/instance-id": instance,
            "/placement/availability-zone": f"{self.region}a",
            "/placement/region": self.region,
        }
        if instance in self._notices:
            end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._notices[instance]))
            answers["/spot/instance-action"] = json.dumps({"action": "terminate", "time": end})
        return answers.get(path)

    def _run_instances(self) -> None:
        """Boot and pull instances as the API starts and ends them, until the box closes."""
        in_network(self.process, self._keep_running)

    def _keep_running(self) -> None:
        ec2, iam = self.client("ec2"), self.client("iam")
        # Ray waits half a minute for a role that it has created itself.
        iam.create_instance_profile(InstanceProfileName=ROLE)
        iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
        while not self._closing.wait(1):
            try:
                running = _in_states(ec2.describe_instances(), ("pending", "running"))
                alive = {each["InstanceId"]: each for each in running}
                for name, instance in alive.items():
                    if name not in self.hosts:
                        self._boot_instance(name, instance, ec2)
                for name in self.hosts.keys() - alive.keys() - {"me"}:
                    self.pull(name)
            except Exception as error:
                self._errors.append(repr(error))
                raise

    def _boot_instance(self, name: str, instance: dict[str, Any], ec2: Any) -> None:
        pairs = ec2.describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
        keys = [pair["PublicKey"] for pair in pairs if pair["KeyName"] == instance["KeyName"]]
        self.addresses[name] = instance["PrivateIpAddress"]
        self.boot(name, keys="\n".join(keys) + "\n")
        public = instance.get("PublicIpAddress")
        if public:
            self.run(name, f"ip addr add {public}/32 dev eth0")

    def _set_up_disk(self, root: Path, keys: str | None) -> None:
        """Add the machine image: the user `ubuntu`, and a virtual environment with everything."""
        super()._set_up_disk(root, keys)
        if keys is None:
            return
        home = root / "home" / USER
        home.mkdir(parents=True, exist_ok=True)
        lines = [
            f"export {name}='{value}'\n"
            for name, value in self.environment.items()
            if name.startswith(("AWS_", "PIP_", "RAY_")) or name == "PYTHONDONTWRITEBYTECODE"
        ]
        (home / ".bashrc").write_text("".join(lines))
        (home / ".profile").write_text("")
        with contextlib.suppress(FileExistsError):
            (home / "venv").symlink_to(sys.prefix)
        accounts = Path("/etc/passwd").read_text()
        # Another name for root, in the first line: ssh finds `~` by the user's number.
        (root / "etc/passwd").write_text(f"{USER}:x:0:0::/home/{USER}:/bin/bash\n{accounts}")


def _in_states(described: dict[str, Any], states: Iterable[str]) -> list[dict[str, Any]]:
    everything = [each for group in described["Reservations"] for each in group["Instances"]]
    return [each for each in everything if each["State"]["Name"] in states]
