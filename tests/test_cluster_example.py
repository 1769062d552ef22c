"""The cluster example: what kustomize makes of it, and what vLLM makes of its command lines.

Nothing here starts a container or needs a cluster.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config, read_config_file, settings_from_environment
from ep_rebalance.dashboards.build import undefined_metrics
from ep_rebalance.engines.vllm.contract import SUPPORTED_VERSIONS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "kubernetes"
DASHBOARDS = ROOT / "dashboards"
OVERLAYS = ("observe", "rebalance")
VLLM_033 = ROOT / ".venv" / "engines" / "vllm-0.33"
RANK_0 = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
"""The label that LeaderWorkerSet puts on the first pod of a group."""
KEY = "api-key"

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def every_overlay() -> dict[str, list[Manifest]]:
    return {overlay: built(overlay) for overlay in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, every_overlay) -> list[Manifest]:
    """All objects of an overlay."""
    return every_overlay[request.param]


def built(overlay: str) -> list[Manifest]:
    tools = (("kustomize", "build"), ("kubectl", "kustomize"))
    tool = next((tool for tool in tools if shutil.which(tool[0])), None)
    if tool is None:
        pytest.skip("needs kustomize or kubectl")
    command = [*tool, str(EXAMPLE / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a warning of kustomize"
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def group(manifests: list[Manifest]) -> Manifest:
    """What the LeaderWorkerSet says about a group of pods."""
    (server,) = of_kind(manifests, "LeaderWorkerSet")
    return server["spec"]["leaderWorkerTemplate"]


def pod(manifests: list[Manifest]) -> Manifest:
    return group(manifests)["workerTemplate"]


def container(manifests: list[Manifest]) -> Manifest:
    (container,) = pod(manifests)["spec"]["containers"]
    return container


def settings(manifests: list[Manifest]) -> RebalanceConfig:
    return load_config(yaml.safe_load(settings_text(manifests)))


def settings_text(manifests: list[Manifest]) -> str:
    volumes = pod(manifests)["spec"]["volumes"]
    name = next(v["configMap"]["name"] for v in volumes if v["name"] == "settings")
    (found,) = [m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == name]
    return found["data"]["settings.yaml"]


# --- Kubernetes


def core_objects(manifests: list[Manifest]) -> Iterator[Manifest]:
    """What the API server itself knows, with the pods and claims that are inside of other kinds."""
    for kind in ("ConfigMap", "Service"):
        yield from of_kind(manifests, kind)
    yield {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "of-the-group"},
        "template": pod(manifests),
    }
    for claim in group(manifests)["volumeClaimTemplates"]:
        yield {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}


def test_objects_are_of_the_form_that_kubernetes_takes(manifests):
    newest = kubernetes_validate.latest_version()
    checked = [
        kubernetes_validate.validate(manifest, newest, strict=True)
        for manifest in core_objects(manifests)
    ]
    assert len(checked) == 6


def test_all_objects_are_in_one_namespace(manifests):
    """A PodMonitor finds pods in its own."""
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"moe"}


def test_services_and_the_pod_monitor_find_the_pods(manifests):
    labels = pod(manifests)["metadata"]["labels"]
    (monitor,) = of_kind(manifests, "PodMonitor")
    everywhere, rank_0 = (m["spec"]["selector"] for m in of_kind(manifests, "Service"))
    for selector in (everywhere, monitor["spec"]["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    assert rank_0 == everywhere | RANK_0


def test_every_port_that_is_named_is_the_one_that_the_server_listens_on(manifests):
    server = container(manifests)
    (port,) = server["ports"]
    assert f"--port {port['containerPort']} " in server["args"][0]
    probes = [server[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    (monitor,) = of_kind(manifests, "PodMonitor")
    named = [
        *(probe["httpGet"]["port"] for probe in probes),
        *(endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]),
        *(p["targetPort"] for m in of_kind(manifests, "Service") for p in m["spec"]["ports"]),
    ]
    assert named == [port["name"]] * 6


def test_every_volume_is_mounted_and_every_mount_has_a_volume(manifests):
    volumes = [volume["name"] for volume in pod(manifests)["spec"]["volumes"]]
    claims = [claim["metadata"]["name"] for claim in group(manifests)["volumeClaimTemplates"]]
    mounts = [mount["name"] for mount in container(manifests)["volumeMounts"]]
    assert sorted(mounts) == sorted(volumes + claims)


def test_a_gpu_for_each_rank(manifests):
    server = container(manifests)
    ranks = next(e["value"] for e in server["env"] if e["name"] == "RANKS_PER_NODE")
    for kind in ("requests", "limits"):
        assert server["resources"][kind]["nvidia.com/gpu"] == ranks


def test_a_pod_is_killed_only_after_it_has_answered(manifests):
    words = container(manifests)["args"][0].split()
    answering = int(words[words.index("--shutdown-timeout") + 1])
    assert 0 < answering < pod(manifests)["spec"]["terminationGracePeriodSeconds"]


def test_no_variable_that_kubernetes_makes_is_taken_for_a_setting(manifests):
    """Those of a Service named ep-rebalance are, and the server does not start with them."""
    theirs = {"EP_REBALANCE_SERVICE_HOST": "10.0.0.1", "EP_REBALANCE_PORT": "tcp://10.0.0.1:80"}
    for name, value in theirs.items():
        with pytest.raises(ConfigurationError, match=name):
            settings_from_environment({name: value})
    assert pod(manifests)["spec"]["enableServiceLinks"] is False


# --- monitoring


def test_rules_are_those_of_the_package_and_know_every_metric(manifests):
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())
    expressions = [r["expr"] for g in rule["spec"]["groups"] for r in g["rules"]]
    assert expressions
    for expression in expressions:
        assert "ep_rebalance" in expression
        assert undefined_metrics(expression) == set()


def test_dashboards_are_those_of_the_package(manifests):
    (found,) = [m for m in of_kind(manifests, "ConfigMap") if "grafana_dashboard" in str(m)]
    files = sorted((DASHBOARDS / "grafana").glob("*.json"))
    assert found["data"] == {file.name: file.read_text() for file in files}
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    # `kubectl apply` keeps a copy in an annotation, which may have this many bytes.
    assert len(json.dumps(found)) < 256 << 10


# --- the plugin's settings


def test_paths_in_the_settings_are_where_the_server_may_write(manifests):
    writable = [
        m["mountPath"] for m in container(manifests)["volumeMounts"] if not m.get("readOnly")
    ]
    config = settings(manifests)
    paths = [path for path in (config.state.path, config.trace.path) if path]
    assert paths
    for path in paths:
        assert any(Path(path).is_relative_to(folder) for folder in writable)


def test_the_key_is_where_the_secret_is_mounted(manifests):
    file = settings(manifests).control.api_key_file
    volumes = {v["secret"]["secretName"]: v["name"] for v in secrets(manifests)}
    if not settings(manifests).control.enabled:
        assert (file, volumes) == (None, {})
        return
    assert volumes == {"ep-rebalance-control": "control-key"}
    mounts = {m["name"]: m for m in container(manifests)["volumeMounts"]}
    assert file == f"{mounts['control-key']['mountPath']}/{KEY}"
    readme = (EXAMPLE / "README.md").read_text()
    assert f"secret generic ep-rebalance-control --namespace moe --from-literal={KEY}=" in readme


def secrets(manifests: list[Manifest]) -> list[Manifest]:
    return [volume for volume in pod(manifests)["spec"]["volumes"] if "secret" in volume]


# --- vLLM

QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 262144,
    "dtype": "bfloat16",
}
"""The shape of the example's model, from its config.json."""

READ_AS_VLLM_DOES = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm

model, *lines = json.load(sys.stdin)
answers = []
for line in lines:
    parser = FlexibleArgumentParser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(line)
    command.validate(args)
    args.model, args.skip_tokenizer_init = model, True  # what it asks for is on a hub
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    parallel = config.parallel_config
    answers.append({
        "version": ".".join(vllm.__version__.split(".")[:2]),
        "model": args.model_tag,
        "ranks": parallel.data_parallel_size,
        "here": parallel.data_parallel_size_local,
        "first": parallel.data_parallel_rank,
        "hybrid": parallel.data_parallel_hybrid_lb,
        "experts": parallel.enable_expert_parallel,
        "address": parallel.data_parallel_master_ip,
        "extension": parallel.worker_extension_cls,
        "settings": config.additional_config["ep_rebalance"],
    })
print(json.dumps(answers))
"""


def folder_for_mounts(manifests: list[Manifest], folder: Path) -> dict[str, Path]:
    """A folder for each mounted path, with what is in it when a pod starts."""
    found = {}
    for mount in container(manifests)["volumeMounts"]:
        found[mount["mountPath"]] = folder / mount["name"]
        found[mount["mountPath"]].mkdir()
    (folder / "settings" / "settings.yaml").write_text(in_folders(settings_text(manifests), found))
    if secrets(manifests):
        (folder / "control-key" / KEY).write_text("a-key\n")
    return found


def in_folders(text: str, folders: dict[str, Path]) -> str:
    """`text` with the folders in place of the mounted paths."""
    paths = sorted(map(re.escape, folders), key=len, reverse=True)
    return re.sub("|".join(paths), lambda match: str(folders[match[0]]), text)


def command_lines(manifests: list[Manifest], folder: Path) -> list[list[str]]:
    """What `vllm` is called with in each pod of a group, as the container's own shell script says it."""
    server, size = container(manifests), group(manifests)["size"]
    folders = folder_for_mounts(manifests, folder)
    (script,) = server["args"]
    script = in_folders(script, folders)
    assert "/dev/shm" not in script, "it deletes what is there"
    (folder / "vllm").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (folder / "vllm").chmod(0o755)
    given = {e["name"]: e.get("value", "127.0.0.1") for e in server["env"]}
    given |= {"LWS_GROUP_SIZE": str(size), "LWS_LEADER_ADDRESS": "127.0.0.1"}
    lines = []
    for index in range(size):
        environment = given | {"LWS_WORKER_INDEX": str(index), "PATH": f"{folder}:{os.defpath}"}
        done = subprocess.run(
            [*server["command"], script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        lines.append(done.stdout.removesuffix("\0").split("\0"))
    return lines


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_vllm_reads_every_command_line_as_it_is_meant(every_overlay, version, tmp_path):
    """One process reads them all, since it takes long to import vLLM."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if version == "0.33":
        if not VLLM_033.is_dir():
            pytest.skip("needs scripts/setup --engines")
        path.insert(0, str(VLLM_033))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_235B))
    lines, expected = [], []
    for overlay, manifests in every_overlay.items():
        (tmp_path / overlay).mkdir()
        lines += command_lines(manifests, tmp_path / overlay)
        file = tmp_path / overlay / "settings" / "settings.yaml"
        config = load_config(read_config_file(file)).as_dict()
        expected += [meant(version, first_rank, config) for first_rank in (0, 8)]
    kept = {name: value for name, value in os.environ.items() if "REBALANCE" not in name}
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ_AS_VLLM_DOES],
        input=json.dumps([str(tmp_path / "model"), *lines]),
        env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def meant(version: str, first_rank: int, config: dict[str, Any]) -> dict[str, Any]:
    """What vLLM has to make of the command line of one pod."""
    return {
        "version": version,
        "model": "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "ranks": 16,
        "here": 8,
        "first": first_rank,
        "hybrid": True,
        "experts": True,
        "address": "127.0.0.1",
        "extension": "ep_rebalance.engines.vllm.worker_extension.WorkerExtension",
        "settings": config,
    }


# --- the image


def test_the_images_are_of_every_version_that_is_supported(manifests):
    text = (EXAMPLE / "Containerfile").read_text()
    built = re.findall(r"--build-arg VLLM_VERSION=(\S+) -t moe-server:(\S+)", text)
    assert sorted(built) == sorted((f"{v}.0", f"{v}.0") for v in SUPPORTED_VERSIONS)
    name, _, tag = container(manifests)["image"].rpartition(":")
    assert name.endswith("/moe-server")
    assert (tag, tag) in built


def test_the_image_is_built_from_all_that_a_wheel_is_made_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    folders |= set(project["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    lines = (EXAMPLE / "Containerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == folders | files


def test_shells_can_read_what_the_image_runs():
    text = (EXAMPLE / "Containerfile").read_text().replace("\\\n", " ")
    runs = re.findall(r"^RUN (?:--mount=\S+ +)*(.*)$", text, flags=re.MULTILINE)
    assert len(runs) == 3
    for run in runs:
        subprocess.run(["sh", "-n", "-c", run], check=True)
