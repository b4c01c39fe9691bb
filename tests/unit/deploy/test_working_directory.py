"""What is sent to a cluster with a job, and what never is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpo_ray.config.load import load_recipe
from dpo_ray.deploy.ray_jobs import working_directory
from dpo_ray.deploy.ray_jobs.working_directory import code_files, fill, recipe_text
from dpo_ray.errors import ConfigError

PIPELINES = Path(__file__).resolve().parents[3] / "pipelines"
SHARED = "output=/shared/runs"


def sent(recipe: str, *overrides: str) -> dict:
    return yaml.safe_load(recipe_text(load_recipe(PIPELINES / recipe, list(overrides))))


def written(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def test_the_recipe_is_written_with_its_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [SHARED, "train.objective.beta=0.7"])
    assert fill(tmp_path, recipe, None) == ["recipe.yaml"]
    again = load_recipe(tmp_path / "recipe.yaml", [])
    assert again.train == recipe.train
    assert again.data == recipe.data
    assert (again.output, again.ray.address) == ("/shared/runs", "auto")


def test_the_chat_template_goes_with_it_and_is_found_beside_it(tmp_path: Path) -> None:
    template = PIPELINES / "zephyr.jinja"
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [SHARED, f"data.chat_template={template}"])
    assert fill(tmp_path, recipe, None) == ["chat_template.jinja", "recipe.yaml"]
    assert (tmp_path / "chat_template.jinja").read_text() == template.read_text()
    assert load_recipe(tmp_path / "recipe.yaml", []).data.chat_template == "chat_template.jinja"


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [SHARED, "data.chat_template=none.jinja"])
    with pytest.raises(ConfigError, match=r"none\.jinja: the file cannot be read"):
        fill(tmp_path, recipe, None)


def test_absolute_paths_uris_and_names_of_the_hub_are_left_alone() -> None:
    values = sent(
        "hh_rlhf.yaml",
        SHARED,
        "model.path=/shared/models/sft",
        "data.train=['/shared/hh/train-*.jsonl.gz', 'hf://datasets/a/b@main/x.jsonl']",
        "data.eval=hub:Anthropic/hh-rlhf",
        "reference.store=s3://bucket/store",
    )
    assert values["model"]["path"] == "/shared/models/sft"
    assert values["data"]["train"][0]["path"] == "/shared/hh/train-*.jsonl.gz"
    assert values["reference"]["store"] == "s3://bucket/store"
    assert sent("quickstart.yaml", SHARED, "model.path=HuggingFaceTB/SmolLM2-135M")["model"]["path"].startswith(
        "Hugging"
    )


@pytest.mark.parametrize(
    ("recipe", "overrides", "where"),
    [
        ("quickstart.yaml", [], "output=runs"),
        ("quickstart.yaml", ["output=/shared", "reference.store=store"], "reference.store=store"),
        ("quickstart.yaml", ["output=/shared", "model.path=./model"], r"model.path=\./model"),
        ("quickstart.yaml", ["output=/shared", "model.path=models/a/b"], "model.path=models/a/b"),
        ("quickstart.yaml", ["output=/shared", "model.adapter=lora"], "model.adapter=lora"),
        ("hh_rlhf.yaml", ["output=/shared"], r"data.train.*=data/hh-rlhf/train"),
        (
            "quickstart_online.yaml",
            ["output=/shared", "online.judge={type: reward_model, path: ../judge}"],
            r"online.judge.path=\.\./judge",
        ),
    ],
)
def test_a_relative_path_is_refused_with_its_field(recipe: str, overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError, match=where) as refused:
        sent(recipe, *overrides)
    assert "s3://" in refused.value.fix


def test_a_model_that_lies_here_is_not_taken_for_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/sft").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.path=models/sft"):
        sent("quickstart.yaml", SHARED, "model.path=models/sft")


def test_roles_go_with_the_recipe_and_the_profile_of_kubernetes_does_not() -> None:
    values = sent("quickstart.yaml", SHARED, "cluster.kubernetes.namespace=lab")
    assert "kubernetes" not in values.get("cluster", {})


def test_ignore_files_are_honoured_at_every_level(tmp_path: Path) -> None:
    written(
        tmp_path,
        {
            "judge.py": "x",
            "pkg/a.py": "x",
            "pkg/data/big.bin": "x",
            "pkg/keep.log": "x",
            "pkg/other.log": "x",
            "runs/out.txt": "x",
            ".gitignore": "runs/\n*.log\n!keep.log\n",
            "pkg/.rayignore": "/data\n",
            ".git/config": "x",
            ".env": "KEY=1",
            "pkg/__pycache__/a.pyc": "x",
        },
    )
    assert code_files(tmp_path) == ["judge.py", "pkg/a.py", "pkg/keep.log"]


def test_links_to_directories_are_not_followed_and_dangling_ones_passed_over(tmp_path: Path) -> None:
    code = written(tmp_path / "code", {"a.py": "x"})
    (code / "loop").symlink_to(code)
    (code / "gone").symlink_to(tmp_path / "nowhere")
    assert code_files(code) == ["a.py"]


def test_too_much_is_refused_before_anything_is_sent_and_the_largest_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_directory, "MAX_BYTES", 3 << 20)
    mib = b"0" * (1 << 20)
    written(tmp_path, {"weights/a": mib, "weights/b": mib, "data.bin": mib, "code.py": "x", "tiny/x": "x"})
    with pytest.raises(ConfigError) as refused:
        code_files(tmp_path)
    assert "the upload would have 3.0 MiB, but the limit is 3.0 MiB" in refused.value.what
    assert "weights/ (2.0 MiB), data.bin (1.0 MiB)" in refused.value.what
    written(tmp_path, {".rayignore": "weights\n"})
    assert code_files(tmp_path) == ["code.py", "data.bin", "tiny/x"]


def test_code_goes_beside_the_recipe_which_goes_before_one_of_its_name(tmp_path: Path) -> None:
    code = written(tmp_path / "code", {"recipe.yaml": "old", "pkg/judge.py": "x", ".gitignore": "*.yaml\n"})
    target = tmp_path / "target"
    target.mkdir()
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [SHARED])
    assert fill(target, recipe, code) == ["pkg/judge.py", "recipe.yaml"]
    assert load_recipe(target / "recipe.yaml", []).name == "quickstart"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        code_files(tmp_path / "none")
