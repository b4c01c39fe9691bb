"""What a recipe becomes on Kubernetes: sound for KubeRay, restricted, of the right size, and the same recipe."""

import json

import pytest
import yaml

from dpo_ray.cluster.node_groups import VARIABLE, node_groups
from dpo_ray.config.load import validate_recipe
from dpo_ray.deploy.kubernetes.render import render, stamped, text
from dpo_ray.deploy.kubernetes.rules import violations
from dpo_ray.errors import ConfigError
from tests.helpers.manifests import MATRIX, MATRIX_IDS, ON_GPUS, OPTIONS, PIPELINES, ROOT, SECRET, TOLERATION, recipe

EXAMPLES = ROOT / "cluster" / "kuberay"


def made(pipeline, overrides=(), kind="RayJob"):
    overrides = list(overrides)
    if pipeline == "zephyr_7b_dpo" and ".engines=null" in overrides:
        overrides.append(".training={cpus: 64}")
    return {m["kind"]: m for m in render(recipe(pipeline, *overrides), kind)}


def cluster_spec(manifests):
    return manifests["RayJob"]["spec"]["rayClusterSpec"]


def templates(manifests):
    spec = cluster_spec(manifests)
    return [spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])]


def worker(manifests, name):
    return next(g for g in cluster_spec(manifests)["workerGroupSpecs"] if g["groupName"] == name)


def limits(group):
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_matrix_is_wide_enough():
    assert len(MATRIX) >= 30


@pytest.mark.parametrize(("pipeline", "overrides"), MATRIX, ids=MATRIX_IDS)
def test_what_is_rendered_keeps_schemas_rules_and_restrictions(pipeline, overrides):
    manifests = made(pipeline, overrides)
    for kind, manifest in manifests.items():
        assert violations(manifest) == [], kind
    assert list(yaml.safe_load_all(text(list(manifests.values())))) == list(manifests.values())
    for template in templates(manifests):
        check_restricted(template["spec"])
        check_mounts(template["spec"])
    training = worker(manifests, "training")
    assert training["minReplicas"] == training["replicas"] == training["maxReplicas"]


def test_the_job_knows_its_run_and_its_rayjob():
    metadata = made("quickstart", (".namespace=research", ".retries=2"))["RayJob"]["spec"]["metadata"]
    assert metadata["dpo_ray.recipe"] == "quickstart"
    assert metadata["dpo_ray.output"] == "/mnt/shared/runs"
    assert metadata["dpo_ray.rayjob"] == "research/quickstart"
    assert metadata["dpo_ray.retries"] == "2"
    more_memory = made("quickstart", (".namespace=research", ".retries=2", ".training={memory_gib: 32}"))
    assert more_memory["RayJob"]["spec"]["metadata"]["dpo_ray.recipe_sha256"] != metadata["dpo_ray.recipe_sha256"]


def test_each_application_is_marked_so_that_a_new_rayjob_is_not_taken_for_a_former_one():
    marks = {stamped(list(made("quickstart").values()))[-1]["spec"]["metadata"]["dpo_ray.applied"] for _ in range(2)}
    assert len(marks) == 2
    assert violations(stamped(list(made("quickstart").values()))[-1]) == []
    stamped(list(made("quickstart", kind="RayCluster").values()))  # has no job


def check_restricted(spec):
    """Hold a pod to the level `restricted` of Kubernetes' Pod Security Standards."""
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] != 0
    assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not security.get("privileged")
        assert not any("hostPort" in port for port in container["ports"])
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in spec["volumes"]:
        assert volume.keys() - {"name"} <= allowed


def check_mounts(spec):
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {m["mountPath"]: m["name"] for c in spec["containers"] for m in c["volumeMounts"]}
    assert set(mounts.values()) <= volumes.keys()
    # The root file system is read-only: Ray's session, /dev/shm and the home directory must not be on it.
    assert "emptyDir" in volumes[mounts["/tmp"]]  # noqa: S108
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"  # noqa: S108
    assert all("autoscaler-token" not in (m["name"] for m in c["volumeMounts"]) for c in spec["containers"])
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize("pipeline", [path.stem for path in sorted(PIPELINES.glob("*.yaml"))])
def test_the_recipe_on_the_cluster_says_the_same_but_for_places(pipeline):
    here = recipe(pipeline)
    there = validate_recipe(yaml.safe_load(made(pipeline)["ConfigMap"]["data"]["recipe.yaml"]))
    assert there.train.objective == here.train.objective
    assert there.train.optimizer == here.train.optimizer
    assert (there.name, there.seed, there.train.groups_per_step) == (here.name, here.seed, here.train.groups_per_step)
    assert there.online == here.online
    assert there.ray.address == "auto"
    assert there.output.startswith("/mnt/shared/")
    differing = {k for k, v in here.model_dump().items() if there.model_dump()[k] != v}
    assert differing <= {"output", "data", "cluster", "ray", "model"}


def test_relative_paths_and_a_template_come_along():
    manifests = made("hh_pandalm")
    files = manifests["ConfigMap"]["data"]
    there = validate_recipe(yaml.safe_load(files["recipe.yaml"]))
    here = recipe("hh_pandalm")
    assert there.data.train[0].path == f"/mnt/shared/{here.data.train[0].path}"
    assert there.data.chat_template == "/etc/dpo-ray/human_assistant.jinja"
    assert files["human_assistant.jinja"] == (PIPELINES / "human_assistant.jinja").read_text()
    head = templates(manifests)[0]["spec"]
    assert {"name": "recipe", "configMap": {"name": manifests["ConfigMap"]["metadata"]["name"]}} in head["volumes"]
    assert manifests["RayJob"]["spec"]["entrypoint"] == "dpo-ray run /etc/dpo-ray/recipe.yaml"


def test_engines_ask_for_the_label_that_their_pods_have():
    for overrides in ((), ("cluster.roles.reference.node_labels={accelerator: l40s, dpo/role: scorer}",)):
        manifests = made("quickstart", overrides)
        there = validate_recipe(yaml.safe_load(manifests["ConfigMap"]["data"]["recipe.yaml"]))
        assert there.cluster.roles.reference.node_labels
        assert there.cluster.roles.reference.node_labels.items() <= worker(manifests, "engines")["labels"].items()
        assert not there.cluster.roles.reference.node_labels.items() <= worker(manifests, "training")["labels"].items()
    shared = validate_recipe(yaml.safe_load(made("quickstart", (".engines=null",))["ConfigMap"]["data"]["recipe.yaml"]))
    assert shared.cluster.roles.reference.node_labels == {}


def test_the_head_names_the_groups_for_recipes_that_are_submitted(monkeypatch):
    manifests = made("zephyr_7b_dpo", (), "RayCluster")
    spec = manifests["RayCluster"]["spec"]
    environment = {e["name"]: e.get("value") for e in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    for group, rendered in zip(node_groups(), spec["workerGroupSpecs"], strict=True):
        own = limits(rendered)
        assert (group.name, group.most) == (rendered["groupName"], rendered["maxReplicas"])
        assert (f"{group.cpus}", f"{group.memory_gib}Gi") == (own["cpu"], own["memory"])
        assert group.gpus == int(own.get("nvidia.com/gpu", 0))
        assert group.labels == rendered["labels"]


def test_gpus_are_said_outright_because_the_driver_sees_none():
    manifests = made("quickstart", ON_GPUS)
    there = validate_recipe(yaml.safe_load(manifests["ConfigMap"]["data"]["recipe.yaml"]))
    assert (there.cluster.roles.train.gpus, there.cluster.roles.reference.gpus) == (1, 1)
    assert limits(worker(manifests, "training"))["nvidia.com/gpu"] == "8"
    assert templates(manifests)[1]["spec"]["containers"][0]["image"].endswith("-gpu")
    assert "nvidia.com/gpu" not in json.dumps(cluster_spec(manifests)["headGroupSpec"])
    assert templates(made("quickstart"))[1]["spec"]["containers"][0]["image"].endswith("-cpu")


def test_only_the_autoscaler_gets_a_token():
    manifests = made("quickstart")
    options = cluster_spec(manifests)["autoscalerOptions"]
    assert "autoscaler-token" in [m["name"] for m in options["volumeMounts"]]
    assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    assert "autoscaler-token" not in json.dumps(cluster_spec(made("quickstart", (".autoscaling=false",))))


def test_secrets_are_references():
    environment = templates(made("quickstart", (f".secrets=[{SECRET}]",)))[2]["spec"]["containers"][0]["env"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token"}},
    } in environment


def test_the_network_is_closed_but_for_the_run():
    policy = made("quickstart", ("cluster.kubernetes.network.operator_namespace=operators",))["NetworkPolicy"]["spec"]
    own = {"podSelector": {"matchLabels": {"dpo-ray/run": "quickstart"}}}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["podSelector"] == own["podSelector"]
    assert policy["ingress"][0] == {"from": [own]}
    operators = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "operators"}}}
    assert {"from": [operators], "ports": [{"protocol": "TCP", "port": 8265}]} in policy["ingress"]
    assert all("from" in rule for rule in policy["ingress"])
    assert [p["port"] for p in policy["egress"][2]["ports"]] == [443, 6443]  # the API server's, for the autoscaler
    for template in templates(made("quickstart")):
        assert template["metadata"]["labels"]["dpo-ray/run"] == "quickstart"


@pytest.mark.parametrize(
    ("overrides", "ports"),
    [
        ((), []),  # a built-in model and made-up data
        (("model.path=HuggingFaceTB/SmolLM2-135M",), [443]),
        (("data.train={type: hub, path: trl-lib/ultrafeedback_binarized}",), [443]),
        (("data.train=https://data.example:8443/pairs.jsonl",), [8443]),
        (("data.eval={other: hub:trl-lib/ultrafeedback_binarized}",), [443]),
        (("data.train=http://data.example/pairs.jsonl",), [80]),
        (("output=s3://bucket/runs",), [443]),
        (("cluster.kubernetes.network.egress_ports=[9000]", "output=s3://bucket/runs"), [9000]),
        (("cluster.kubernetes.autoscaling=true",), [443, 6443]),
    ],
)
def test_pods_reach_only_the_ports_that_the_run_needs(overrides: tuple[str, ...], ports: list[int]):
    policy = made("quickstart", ("cluster.kubernetes.autoscaling=false", *overrides))["NetworkPolicy"]["spec"]
    own, dns, *outside = policy["egress"]
    assert own == {"to": [{"podSelector": {"matchLabels": {"dpo-ray/run": "quickstart"}}}]}
    assert {p["port"] for p in dns["ports"]} == {53}
    assert [[p["port"] for p in rule["ports"]] for rule in outside] == ([ports] if ports else [])


JUDGE = "online.judge={type: llm, base_url: 'http://judge.svc:8000/v1', model: judge, api_key_env: JUDGE_KEY}"


def test_a_judges_port_is_open_and_its_key_comes_from_a_secret():
    key = ".secrets=[{variable: JUDGE_KEY, secret: judge, key: key}]"
    policy = made("quickstart_online", (JUDGE, key))["NetworkPolicy"]["spec"]
    assert [p["port"] for p in policy["egress"][2]["ports"]] == [443, 6443, 8000]
    with pytest.raises(ConfigError, match="JUDGE_KEY") as refused:
        made("quickstart_online", (JUDGE,))
    assert refused.value.where == "cluster.kubernetes.secrets"


def test_queues_are_named_by_their_schedulers_labels():
    def labels(*overrides):
        return made("quickstart", overrides)["RayJob"]["metadata"]["labels"]

    job = made("quickstart", OPTIONS["Kueue with a topology"])
    assert job["RayJob"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["RayJob"]["spec"]["suspend"] is True
    assert worker(job, "training")["template"]["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-required-topology": "cloud.google.com/gce-topology-block"
    }
    volcano = labels(*OPTIONS["Volcano"])
    assert (volcano["volcano.sh/queue-name"], volcano["ray.io/priority-class-name"]) == ("research", "high")
    yunikorn = labels(*OPTIONS["YuniKorn"])
    assert yunikorn["yunikorn.apache.org/queue"] == "root.research"
    assert yunikorn["ray.io/gang-scheduling-enabled"] == "true"


def test_deadlines_retries_and_what_is_left_behind():
    spec = made("quickstart", OPTIONS["deadlines"])["RayJob"]["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (172800, 7200)
    assert (spec["ttlSecondsAfterFinished"], spec["backoffLimit"]) == (0, 0)
    assert made("quickstart")["RayJob"]["spec"]["backoffLimit"] == 3


@pytest.mark.parametrize("overrides", [(), OPTIONS["Kueue"], OPTIONS["an object store"]])
def test_a_ray_cluster_is_the_jobs_own(overrides):
    cluster = made("quickstart", overrides, "RayCluster")["RayCluster"]
    assert violations(cluster) == []
    job = made("quickstart", overrides)["RayJob"]["spec"]["rayClusterSpec"]
    assert {k: v for k, v in cluster["spec"].items() if k != "suspend"} == job


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ((".training={cpus: 1}", "cluster.roles.train.cpus=4"), "cluster.kubernetes.training.cpus"),
        ((".training={gpus: 1}", "cluster.roles.train.gpus=2"), "cluster.kubernetes.training.gpus"),
        ((".training={replicas: 1, cpus: 2}", "train.workers=8"), "cluster.kubernetes.training.replicas"),
        (
            (".engines={replicas: 1, max_replicas: 2, cpus: 1}", "reference.replicas=4"),
            "cluster.kubernetes.engines.max_replicas",
        ),
        (("name=" + "a" * 48,), "cluster.kubernetes.name"),
        (("name=7b",), "cluster.kubernetes.name"),
        ((".storage=null",), "output"),
        (("output=/scratch/runs",), "output"),
        (("output=../runs",), "output"),
        (("data.chat_template=none.jinja",), "data.chat_template"),
    ],
)
def test_what_can_never_run_is_refused(overrides, field):
    with pytest.raises(ConfigError) as refused:
        made("quickstart", overrides)
    assert refused.value.where.partition("=")[0] == field
    assert refused.value.fix


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (".lost_node_seconds=-1", "lost_node_seconds"),
        (".queue={type: slurm, name: research}", "queue.type"),
        (".training={max_replicas: 4}", "training.max_replicas"),
        (".engines={replicas: 4, max_replicas: 2}", "engines.max_replicas"),
        (".cpu={replicas: 1, min_replicas: 2}", "cpu.replicas"),
        (".name=" + "a" * 48, "name"),
        (".namespace=Research", "namespace"),
        (".retries=-1", "retries"),
        (".storage={storage_class: fast}", "storage.storage_class"),
        (".secrets=[{variable: HF_TOKEN, secret: hf, key: token, value: hf_abc}]", "secrets[0].value"),
        (".training={placement: {tolerations: [{key: gpu, operator: Equal}]}}", "tolerations[0].value"),
        (".training={placement: {node_selector: {pool: two words}}}", "node_selector"),
        (".environment={1A: b}", "environment"),
        (".imagePullSecrets=[a]", "imagePullSecrets"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_field(override, field):
    with pytest.raises(ConfigError, match=f"cluster.kubernetes.*{field.replace('[', '.').split('.')[-1]}"):
        recipe("quickstart", override)


def test_kueue_admits_a_changing_number_of_engines_but_places_them_by_topology_only_if_it_is_fixed():
    queue = ".queue={type: kueue, name: research}"
    elastic = made("quickstart", (queue, "reference.replicas=4", "reference.max_replicas=40"))
    assert elastic["RayJob"]["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert cluster_spec(elastic)["enableInTreeAutoscaling"] is True
    assert [worker(elastic, name)["minReplicas"] for name in ("engines", "training")] == [0, 1]
    assert [worker(elastic, name)["maxReplicas"] for name in ("engines", "training")] == [10, 1]
    assert "annotations" not in made("quickstart", (queue, ".autoscaling=false"))["RayJob"]["metadata"]
    assert "annotations" not in made("quickstart")["RayJob"]["metadata"]
    with pytest.raises(ConfigError, match="only if their number is fixed: set autoscaling to false") as refused:
        recipe("quickstart", queue, ".training={placement: {topology_key: cloud.google.com/gce-topology-block}}")
    assert "training.placement.topology_key" in str(refused.value)


def test_local_disk_is_requested_only_where_the_profile_asks_for_it():
    assert "ephemeral-storage" not in json.dumps(made("quickstart"))
    reserved = made("quickstart", OPTIONS["disk that is reserved"])
    for template in templates(reserved):
        resources = template["spec"]["containers"][0]["resources"]
        assert [part["ephemeral-storage"] for part in resources.values()] == ["500Gi", "500Gi"]


def test_the_pods_of_a_lost_node_are_replaced_soon_but_not_the_head():
    def seconds(template):
        taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        found = {t["key"]: t for t in template["spec"].get("tolerations", ()) if t["key"] in taints}
        assert all(t["operator"] == "Exists" and t["effect"] == "NoExecute" for t in found.values())
        return [found[key]["tolerationSeconds"] for key in taints if key in found]

    head, *workers = templates(made("quickstart"))
    assert seconds(head) == []
    assert [seconds(template) for template in workers] == [[30, 30]] * 3
    assert seconds(templates(made("quickstart", (".lost_node_seconds=0",)))[1]) == [0, 0]
    own = (
        ".training.placement={tolerations: ["
        + TOLERATION
        + ", {key: node.kubernetes.io/unreachable, effect: NoExecute}]}"
    )
    tolerations = worker(made("quickstart", (own,)), "training")["template"]["spec"]["tolerations"]
    assert [(t["key"], t.get("tolerationSeconds")) for t in tolerations] == [
        ("nvidia.com/gpu", None),
        ("node.kubernetes.io/unreachable", None),
        ("node.kubernetes.io/not-ready", 30),
    ]


EXAMPLE_OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "quickstart.yaml": ("quickstart", (".storage={create_gib: 10}",)),
    "zephyr_7b_dpo.yaml": (
        "zephyr_7b_dpo",
        (
            ".namespace=research",
            ".image=registry.example.org/dpo-ray:0.1.0-gpu",
            f".secrets=[{SECRET}]",
            ".pod_monitor=true",
            ".training={placement: {tolerations: [" + TOLERATION + "]}}",
            ".engines={placement: {tolerations: [" + TOLERATION + "]}}",
        ),
    ),
    "tulu3_70b_dpo_kueue.yaml": (
        "tulu3_70b_dpo",
        (
            ".namespace=research",
            ".image=registry.example.org/dpo-ray:0.1.0-gpu",
            ".queue={type: kueue, name: research}",
            ".autoscaling=false",
            ".training={devices: {rdma/ib: 8}, placement: {topology_key: cloud.google.com/gce-topology-block}}",
            ".deadline_seconds=604800",
        ),
    ),
}


@pytest.mark.parametrize("name", EXAMPLE_OVERRIDES)
def test_the_examples_are_what_the_renderer_writes(name):
    pipeline, overrides = EXAMPLE_OVERRIDES[name]
    _, _, manifests = (EXAMPLES / name).read_text(encoding="utf-8").partition("\n\n")
    assert manifests == text(render(recipe(pipeline, *overrides)))


def test_every_example_is_checked():
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == set(EXAMPLE_OVERRIDES)
