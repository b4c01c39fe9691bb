"""A wrong recipe gives one clear error, names the place, starts nothing and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_ray.cli.app import main
from dpo_ray.models.builtin import builtin_model
from tests.helpers.good_recipe import good

Arguments = list[str]


@dataclass(frozen=True)
class Kind:
    """One kind of wrong recipe: what makes it so in a directory that holds good.yaml, and what the error must say."""

    name: str
    make: Callable[[Path], Arguments]
    says: tuple[str, ...]


def override(name: str, *pairs: str, says: tuple[str, ...]) -> Kind:
    """Take the good recipe with values that are wrong."""
    return Kind(name, lambda here: [str(here / "good.yaml"), *pairs], says)


def text(name: str, content: str | bytes, *, says: tuple[str, ...]) -> Kind:
    """Take a file of this content as the recipe."""

    def make(here: Path) -> Arguments:
        data = content if isinstance(content, bytes) else content.encode()
        (here / "bad.yaml").write_bytes(data)
        return [str(here / "bad.yaml")]

    return Kind(name, make, says)


def model_copy(here: Path, *, without: str = "", auto_map: bool = False) -> Path:
    copied = here / "model"
    shutil.copytree(builtin_model("sentiment_llama"), copied)
    for file in copied.glob(without) if without else ():
        file.unlink()
    if auto_map:
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    return copied


def adapted(
    *, module: str = "model.layers.0.self_attn.q_proj", rank: int = 2, **changes: object
) -> Callable[[Path], Arguments]:
    """Name a LoRA adapter of one module of the built-in model, whose configuration is changed."""

    def make(here: Path) -> Arguments:
        place = here / "lora"
        place.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
        (place / "adapter_config.json").write_text(json.dumps(config))
        shapes = {"A": (rank, 128), "B": (128, rank)}
        weights = {f"base_model.model.{module}.lora_{m}.weight": np.ones(s, np.float32) for m, s in shapes.items()}
        save_file(weights, place / "adapter_model.safetensors")
        return [str(here / "good.yaml"), f"model.adapter={place}"]

    return make


def adapter_without_weights(here: Path) -> Arguments:
    arguments = adapted()(here)
    (here / "lora" / "adapter_model.safetensors").rename(here / "lora" / "adapter_model.bin")
    return arguments


def adapter_as_model(here: Path) -> Arguments:
    adapted()(here)
    return [str(here / "good.yaml"), f"model.path={here / 'lora'}"]


def bad_template(here: Path) -> Arguments:
    (here / "t.jinja").write_text("{% for m in messages %}{{ m.content }}")
    return [str(here / "good.yaml"), f"data.chat_template={here / 't.jinja'}"]


def latin_template(here: Path) -> Arguments:
    (here / "t.jinja").write_bytes("{{ messages }} é".encode("latin-1"))
    return [str(here / "good.yaml"), f"data.chat_template={here / 't.jinja'}"]


def unknown_suffix(here: Path) -> Arguments:
    (here / "rows.xlsx").write_bytes(b"PK")
    return [str(here / "good.yaml"), f"data.train={here / 'rows.xlsx'}"]


def below_a_file(field: str) -> Callable[[Path], Arguments]:
    def make(here: Path) -> Arguments:
        (here / "a-file").write_text("in the way")
        return [str(here / "good.yaml"), f"{field}={here / 'a-file' / 'runs'}"]

    return make


def named_templates(here: Path) -> Arguments:
    model = model_copy(here)
    config = json.loads((model / "tokenizer_config.json").read_text())
    templates = [{"name": name, "template": "{{ messages }}"} for name in ("tool_use", "rag")]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    return [str(here / "good.yaml"), f"model.path={model}", "data.chat_template=auto"]


BOMB = "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n"

FUNCTION = {"type": "function", "function": "dpo_ray.data.synthetic.true_rewards"}
LLM = {"type": "llm", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "DPO_RAY_TEST_NO_KEY"}


def rounds(name: str, online: dict[str, object], *, says: tuple[str, ...]) -> Kind:
    """Take the good recipe with a section `online` that is wrong."""
    return text(name, good(online={"sampling": {"max_new_tokens": 16}, **online}), says=says)


KINDS = [
    Kind(
        "no such file",
        lambda here: [str(here / "absent.yaml")],
        ("absent.yaml: there is no such recipe", "dpo-ray init"),
    ),
    Kind("a directory", lambda here: [str(here)], ("is a directory",)),
    Kind("no argument", lambda here: [], ("missing argument", "recipe")),
    Kind("unknown option", lambda here: [str(here / "good.yaml"), "--frobnicate"], ("no such option", "--frobnicate")),
    text("an empty file", "", says=("bad.yaml", "file is empty")),
    text("a YAML list", "- name: x\n", says=("bad.yaml", "file is a list")),
    text("bad YAML", "name: x\nmodel: {path: [}\n", says=("bad.yaml, line 2", "not valid YAML")),
    text("a repeated key", "name: x\nseed: 1\nseed: 2\n", says=("line 3", "the key `seed` appears twice")),
    text("a bomb of aliases", BOMB, says=("line 2", "aliases are not allowed")),
    text("a bomb of nesting", "name: " + "[" * 5_000, says=("bad.yaml", "nested too deeply")),
    text("not UTF-8", "name: é\n".encode("latin-1"), says=("bad.yaml", "not UTF-8", "byte 6")),
    text("a date that is none", "name: 2024-13-45\n", says=("bad.yaml", "a value cannot be read")),
    text("a key that is a number", "1: 2\n", says=("line 1", "the key 1 is not text")),
    text("a large file", "# " + "x" * (1 << 20), says=("bad.yaml", "larger than 1048576 bytes")),
    text("a missing section", good(model=None), says=("model: is required",)),
    text("an empty section", good() + "train:\n", says=("train: a section (a mapping of keys) is expected",)),
    override("an unknown key", "train.objective.bta=0.1", says=("train.objective.bta: unknown key", "`beta`")),
    override("a key of elsewhere", "train.beta=0.1", says=("train.beta: unknown key", "`train.objective.beta`")),
    override("an unknown section", "trian.steps=3", says=("trian: unknown key", "`train`")),
    override("a wrong type", "train.workers=many", says=("train.workers: a whole number", "'many'")),
    override("a truth value for a number", "train.workers=yes", says=("train.workers: true is not allowed",)),
    override("out of range", "train.objective.beta=-1", says=("train.objective.beta:", "greater than 0", "-1")),
    override("not a number", "train.optimizer.learning_rate=.nan", says=("train.optimizer.learning_rate:", "finite")),
    override("an unknown objective", "train.objective.type=ppo", says=("train.objective.type: 'ppo'", "'sigmoid'")),
    override("an unknown engine", "reference.engine=sglang", says=("reference.engine:", "'vllm' or 'trainer'")),
    override("an unknown source", "data.train={type: kafka}", says=("data.train.0.type: 'kafka'", "'files'")),
    override("eval set without a source", "data.eval={far: []}", says=("data.eval.far: no source is set",)),
    override(
        "half the sources weighed", "data.train=[{type: synthetic, weight: 1}, synthetic]", says=("data.train: some",)
    ),
    override(
        "template's own variable", "data.chat_template_kwargs={messages: 1}", says=("chat_template_kwargs.messages",)
    ),
    override("filter of no module", "data.rules.filters=[nowhere:keep]", says=("data.rules.filters", "nowhere")),
    override("no source", "data.train=[]", says=("data.train: no source is set",)),
    override("a name with a slash", "name=a/b", says=("name:", "'a/b'")),
    override("a name that is taken", "name=artifacts", says=("name: `artifacts`", "choose another")),
    override("evaluation on nothing", "data.eval=[]", "train.eval_every_steps=5", says=("train.eval_every_steps:",)),
    override(
        "samples of nothing", "data.eval=[]", "evaluate.sample_prompts=8", says=("evaluate.sample_prompts:", "held-out")
    ),
    override("an override without =", "train.steps", says=("`train.steps` is not KEY.PATH=VALUE",)),
    override("an override through a scalar", "name.first=x", says=("command line, name.first", "`name` is 'wrong'")),
    override("an override that is no YAML", "name=[x", says=("command line, name", "not valid YAML")),
    override("an unquoted glob", "data.train=*.jsonl", says=("command line, data.train", "quote")),
    override(
        "an unsupported output", "output=ftp://host/x", says=("output=ftp://host/x", "ftp:// storage is not supported")
    ),
    override("an output that lost a slash", "output=s3:/bucket/x", says=("lacks a slash",)),
    override("unsupported data", "data.train=gopher://host/x.jsonl", says=("data.train=gopher://", "gopher")),
    override("fewer CPUs than asked for", "ray.cpus=1", "train.workers=4", says=("ray.cpus: 1", "at least 4")),
    override(
        "more GPUs than there are",
        "cluster.roles.train.gpus=1",
        "train.workers=999",
        says=("train.workers: the recipe requests 999 GPUs",),
    ),
    override("no such builtin model", "model.path=builtin:gpt5", says=("'gpt5'", "sentiment_llama")),
    override(
        "no such model", "model.path=./no-such-model", says=("model.path=./no-such-model: there is no such model",)
    ),
    override("a context that is too short", "data.max_length_tokens=100000", says=("data.max_length_tokens=100000",)),
    override(
        "no such template",
        "data.chat_template=absent.jinja",
        says=("data.chat_template=absent.jinja: there is no such",),
    ),
    override("no chat template", "data.chat_template=auto", says=("data.chat_template=auto:", "no chat template")),
    override("a glob of nothing", "data.train=none/*.jsonl", says=("data.train=none/*.jsonl: no file matches",)),
    Kind(
        "a model without safetensors",
        lambda here: [str(here / "good.yaml"), f"model.path={model_copy(here, without='*.safetensors')}"],
        ("model.path=", "no *.safetensors"),
    ),
    Kind(
        "a model without a tokenizer",
        lambda here: [str(here / "good.yaml"), f"model.path={model_copy(here, without='token*')}"],
        ("model.path=", "no usable tokenizer"),
    ),
    Kind(
        "a model that brings code",
        lambda here: [str(here / "good.yaml"), f"model.path={model_copy(here, auto_map=True)}"],
        ("model.path=", "auto_map"),
    ),
    override(
        "4 bits without an adapter", "train.quantization=nf4", says=("train.quantization", "needs an adapter to train")
    ),
    override(
        "4 bits and another engine",
        "train.quantization=nf4",
        "train.lora.rank=8",
        says=("reference.engine", "the reference is the quantized model"),
    ),
    override("no such adapter", "model.adapter=./absent", says=("model.adapter=./absent: there is no such directory",)),
    override(
        "an adapter of the hub", "model.adapter=some/lora", says=("model.adapter=some/lora:", "hf download some/lora")
    ),
    override("a rank that cannot be sampled from", "train.lora.rank=513", says=("train.lora.rank=513", "merge=true")),
    override("an adapter of an embedding", "train.lora.target_modules=[embed_tokens]", says=("an embedding cannot",)),
    override(
        "an adapter of nothing", "train.lora.target_modules=[wq]", says=("train.lora.target_modules", "all-linear")
    ),
    override(
        "no such evaluation metric",
        *("train.eval_every_steps=2", "train.best.metric=eval_acuracy"),
        says=("train.best.metric=eval_acuracy", "eval_rewards/accuracies"),
    ),
    override(
        "no room for a prompt",
        "evaluate.max_new_tokens=4096",
        says=("evaluate.max_new_tokens=4096", "leave no room for a prompt"),
    ),
    override(
        "more memory than there is",
        "cluster.roles.reference.memory_gib=100000",
        says=("cluster.roles.reference", "1 engines are needed", "the nodes can hold only 0"),
    ),
    override(
        "more processes than fit", "train.workers=99999", says=("train.workers=99999", "do not fit in the memory")
    ),
    override(
        "heads that cannot be split", "reference.tensor_parallel=3", says=("reference.tensor_parallel=3", "heads")
    ),
    override(
        "a task larger than ray.cpus", "ray.cpus=4", "cluster.roles.prepare.cpus=9", says=("ray.cpus: 4", "at least 10")
    ),
    override(
        "a model of a name that no disk takes", f"model.path={'x' * 300}", says=("model.path=xxx", "no such model")
    ),
    override("an adapter of a name that no disk takes", f"model.adapter={'x' * 300}", says=("model.adapter=xxx",)),
    override("a user without a home", "model.path=~absent_user/x", says=("model.path=~absent_user/x", "no such model")),
    override(
        "no such file of a kind", "data.train=/dev/null", says=("data.train=/dev/null", "kind of file is not known")
    ),
    override("a name that no disk takes", f"output={'x' * 300}", says=("output:", "255 bytes")),
    override("a template of a name", "data.chat_template=name:tool_use", says=("name:tool_use", "no chat template")),
    Kind("only named templates", named_templates, ("data.chat_template=auto", "`default`", "name:rag, name:tool_use")),
    Kind("an adapter without weights", adapter_without_weights, ("model.adapter=", "pickled weights are not read")),
    Kind("an adapter that is not LoRA", adapted(peft_type="IA3"), ("model.adapter=", "of type IA3")),
    Kind("more than LoRA", adapted(modules_to_save=["lm_head"]), ("model.adapter=", "modules_to_save=['lm_head']")),
    Kind("an adapter of another rank", adapted(r=8), ("model.adapter=", "rank 2 (A) and 2 (B)", "sets rank 8")),
    Kind(
        "an adapter of the head",
        adapted(module="lm_head"),
        ("model.adapter=", "the head and the embeddings cannot have"),
    ),
    Kind(
        "an adapter of another model",
        adapted(module="model.layers.2.self_attn.q_proj"),
        ("model.adapter=", "no module `model.layers.2.self_attn.q_proj`"),
    ),
    Kind("a rank that is too large", adapted(rank=513, r=513), ("model.adapter=", "513", "reference.engine=trainer")),
    Kind("an adapter as the model", adapter_as_model, ("model.path=", "contains an adapter", "model.adapter")),
    Kind("a template with an error", bad_template, ("data.chat_template=", "the template is not valid")),
    Kind("a template that is not UTF-8", latin_template, ("data.chat_template=", "UTF-8")),
    Kind("an unknown suffix", unknown_suffix, ("rows.xlsx", "kind of file is not known")),
    Kind("an output below a file", below_a_file("output"), ("output=", "a-file` is not a directory")),
    Kind("a store below a file", below_a_file("reference.store"), ("reference.store=", "a-file` is not a directory")),
    rounds("a judge that is not there", {"judge": FUNCTION | {"function": "absent.module.f"}}, says=("absent",)),
    rounds("no judge", {}, says=("online.judge", "required")),
    rounds(
        "lists for pairs",
        {"judge": FUNCTION, "pairing": {"pairs": "list"}},
        says=("online.pairing.pairs", "not from lists"),
    ),
    rounds(
        "labels of several pairs",
        {"judge": FUNCTION, "pairing": {"pairs": "margin", "labels": "bradley_terry"}},
        says=("online.pairing.labels",),
    ),
    rounds(
        "all from elsewhere", {"judge": FUNCTION, "mix": {"offline": 0.6, "earlier_rounds": 0.4}}, says=("online.mix",)
    ),
    rounds("a key that is not set", {"judge": LLM}, says=("DPO_RAY_TEST_NO_KEY", "not set")),
    rounds(
        "a key of the evaluation's judge",
        {"judge": FUNCTION, "evaluate": {"judge": LLM}},
        says=("DPO_RAY_TEST_NO_KEY",),
    ),
    rounds(
        "a verifier without answers",
        {"judge": {"type": "verifier", "check": "exact"}},
        says=("online.prompts", "reference answers"),
    ),
    rounds(
        "no such stop token",
        {"judge": FUNCTION, "sampling": {"max_new_tokens": 16, "stop_token_ids": [5, 99_999]}},
        says=("online.sampling.stop_token_ids", "no token 99999"),
    ),
    rounds(
        "GPUs for a judge",
        {"judge": {"type": "reward_model", "path": "absent", "gpus_per_replica": 999}},
        says=("online.judge", "requests 999 GPUs"),
    ),
    rounds(
        "a model that judges nothing",
        {"judge": {"type": "reward_model", "path": str(builtin_model("sentiment_llama"))}},
        says=("online.judge.path", "outputs, not 1"),
    ),
    rounds(
        "no prompts there", {"judge": FUNCTION, "prompts": "absent/*.jsonl"}, says=("online.prompts=absent/*.jsonl",)
    ),
]


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize("kind", [pytest.param(k, id=k.name.replace(" ", "-")) for k in KINDS])
def test_one_clear_error_and_nothing_done(
    kind: Kind, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(good())
    arguments = kind.make(tmp_path)
    before, ray_before = sorted(tmp_path.rglob("*")), ray.is_initialized()
    with pytest.raises(SystemExit) as stopped:
        main([command, *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert err.count("error:") == 1
    for words in kind.says:
        assert words.lower() in err.lower()
    assert "Traceback" not in out + err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert ray.is_initialized() == ray_before


def test_all_wrong_fields_come_in_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(good())
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(tmp_path / "good.yaml"), "seed=-1", "train.steps=x", "model.pth=y"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("error:") == 1
    assert "3 fields are wrong" in error
    assert all(field in error for field in ("seed:", "train.steps:", "model.pth:"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_stops_before_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text(good())
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "good.yaml"), f"output={closed}"])
    assert stopped.value.code == 4
    assert "cannot create" in capsys.readouterr().err
    assert list(closed.iterdir()) == []
