"""The commands that need no cluster, as a user types them."""

import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray.cli.kubernetes import kubernetes
from dpo_ray.errors import ConfigError
from tests.helpers.manifests import PIPELINES, changed, sound_ray_job

QUICKSTART = str(PIPELINES / "quickstart.yaml")


def run(*arguments, text=None):
    result = CliRunner().invoke(kubernetes, list(arguments), input=text)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_what_render_prints_is_what_validate_takes(kind):
    printed = run("render", QUICKSTART, "cluster.kubernetes.namespace=lab", "--kind", kind)
    manifests = list(yaml.safe_load_all(printed))
    assert manifests[-1]["kind"] == kind
    assert {m["metadata"]["namespace"] for m in manifests} == {"lab"}
    assert run("validate", "-", text=printed) == f"{len(manifests)} manifests: valid\n"


def test_every_wrong_field_is_named_with_its_file_and_object(tmp_path):
    sound, broken = tmp_path / "sound.yaml", tmp_path / "broken.yaml"
    sound.write_text(yaml.safe_dump(sound_ray_job()))
    wrong = changed(changed(sound_ray_job(), "spec.backofLimit", 1), "spec.ttlSecondsAfterFinished", "600")
    broken.write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as refused:
        run("validate", str(sound), str(broken))
    assert "2 fields are wrong" in refused.value.what
    assert f"{broken}: RayJob/sound: spec.backofLimit: unknown field" in refused.value.what
    assert "spec.ttlSecondsAfterFinished: '600' is not of type 'integer'" in refused.value.what
    assert str(sound) not in refused.value.what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [b", "not valid YAML"),
        ("- a\n", "this manifest is not a mapping"),
        ("{}", "kind"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_manifest_is_said_in_words(tmp_path, text, what):
    file = tmp_path / "file.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=what):
        run("validate", str(file))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        run("validate", str(tmp_path / "none.yaml"))
