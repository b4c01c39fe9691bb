"""For random conversations, templates and tokenizers: the ids are those of the rendered whole, or the row says why not."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import TextGroup
from dpo_ray.data.tokenizing.byte_bpe import GPT2, Words
from dpo_ray.data.tokenizing.chat import Rendered, load_tokenizer
from dpo_ray.data.tokenizing.encode import Encoder, clean_starts
from tests.unit.data.conftest import CHATML, tokenized_groups

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "</s>")
TEMPLATES = {
    "plain": "plain",
    "chatml": CHATML,
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "one BOS and words": (
        "{{ bos_token }}{% for m in messages %}{{ 'Q: ' + m.content + ' A:' if m.role != 'assistant' else m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    ),
    "breaks the prefix": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "adds text": CHATML + "{% if not add_generation_prompt %}  That was all.<|eot_id|>\n\n{% endif %}",
    "no end token": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}
CORPUS = (
    "I'd say it's 1234 reasons. We'll see, won't we?  Human: what's that\n\nAssistant: yes, the user's <tag> and so on...\n"
    "The model answers the question; don't ask \t it twice! naïve café déjà vu  12 + 34 = 46 “quotes” — dashes\n"
)


def wrapped(inner: Tokenizer, **marked: str) -> PreTrainedTokenizerBase:
    there = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens([AddedToken(t, special=True) for t in (*SPECIALS, *marked.values()) if t not in there])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marked)


def trained(model, trainer, *, normalizer=None, pre_tokenizer=None, decoder=None) -> Tokenizer:
    inner = Tokenizer(model)
    inner.normalizer, inner.pre_tokenizer, inner.decoder = normalizer, pre_tokenizer, decoder
    words = [
        "the",
        "their",
        "there",
        "an",
        "answer",
        "and",
        "user's",
        "system",
        "assistant",
        "won't",
        "can't",
        "12",
        "123",
        "I'm",
        "we've",
    ]
    chance = random.Random(0)
    inner.train_from_iterator([CORPUS, *(" ".join(chance.choices(words, k=30)) for _ in range(40))], trainer)
    return inner


def byte_bpe(pattern: str, normalizer=None) -> PreTrainedTokenizerBase:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return wrapped(
        trained(
            models.BPE(),
            trainers.BpeTrainer(
                vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizers.Sequence(
                [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            ),
            decoder=decoders.ByteLevel(),
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )


def sentencepiece_like(*, first: bool) -> PreTrainedTokenizerBase:
    return wrapped(
        trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first" if first else "always"),
            decoder=decoders.Metaspace(prepend_scheme="first" if first else "always"),
        ),
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
    )


def llama2_like() -> PreTrainedTokenizerBase:
    inner = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    return wrapped(inner, bos_token="<s>", eos_token="<end>", unk_token="<unk>")


def lowercasing() -> PreTrainedTokenizerBase:
    """Make one whose added tokens eat white space or stand alone, and are partly found in normalised text."""
    inner = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False),
        normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    inner.add_special_tokens(
        [
            AddedToken("<|im_start|>", lstrip=True, special=True),
            AddedToken("<|im_end|>", rstrip=True, special=True),
            AddedToken("<|eot_id|>", normalized=True, special=True),
        ]
    )
    inner.add_tokens([AddedToken("user", single_word=True), AddedToken("answer", normalized=True)])
    return wrapped(inner, bos_token="<s>", eos_token="<end>", unk_token="[UNK]")


TOKENIZERS = {
    "GPT-2's words": lambda: byte_bpe(GPT2),
    "Llama 3's words": lambda: byte_bpe(LLAMA3),
    "Qwen's words, NFC": lambda: byte_bpe(LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "Metaspace": lambda: sentencepiece_like(first=False),
    "Metaspace, first": lambda: sentencepiece_like(first=True),
    "Llama 2": llama2_like,
    "lowercase": lowercasing,
}


@pytest.fixture(scope="module", params=[*TOKENIZERS, "bytes", "builtin"])
def tokenizer(request: pytest.FixtureRequest, chatml_dir: str, builtin_dir: str) -> PreTrainedTokenizerBase:
    if request.param == "bytes":
        return load_tokenizer(chatml_dir)
    if request.param == "builtin":
        loaded = load_tokenizer(builtin_dir)
        loaded.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
        return loaded
    return TOKENIZERS[request.param]()


WORDS = (
    "the",
    "user's",
    "won't",
    "I'm",
    "12345",
    "answer",
    "user",
    "naïve",
    "é",
    "e\u0301",
    "中文",
    "½",
    "ſ",
    "İ",
    "ẞ",
)
SIGNS = ("😀", "\u200d", "“q”", "...", "$", "_")
SPACES = (" ", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\u3000", "\xa0", "\x85")
PIECES = st.one_of(
    st.sampled_from(WORDS + SIGNS),
    st.sampled_from(SPACES),
    st.sampled_from(
        [*SPECIALS, "<|im_", "end|>", "<|", "|>", "<", "</s", "<s>", "<|IM_END|>", "<|EOT_ID|>", "s>", "[UNK]"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.text(string.ascii_letters + " .,'", min_size=1, max_size=12),
)
TEXT = st.lists(PIECES, min_size=1, max_size=14).map("".join)
SPOKEN = TEXT.filter(lambda text: text.strip())
MESSAGES = st.lists(
    st.builds(dict, role=st.sampled_from(["user", "system", "assistant"]), content=TEXT), min_size=1, max_size=4
).map(tuple)
ROWS = st.lists(st.tuples(MESSAGES | TEXT, SPOKEN, SPOKEN), min_size=1, max_size=3)


def texts(tokenizer, template: str, prompt, completion: str) -> tuple[str, str]:
    """Render as transformers does; plain text as the documentation has it."""
    if template == "plain":
        start = prompt if isinstance(prompt, str) else "".join(f"{m['content']}\n\n" for m in prompt)
        return start, start + completion
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answer = {"role": "assistant", "content": completion}
    return (
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template([*messages, answer], chat_template=template, tokenize=False),
    )


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spells_a_special_token(tokenizer, prompt, *completions: str) -> bool:
    """Look for their names in the text, and for their ids among the text's: normalisation may make them."""
    said = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    marked = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    ids = set(tokenizer.convert_tokens_to_ids([*SPECIALS, tokenizer.eos_token])) - {None, tokenizer.unk_token_id}
    return any(
        any(token in text for token in marked) or ids.intersection(ids_of(tokenizer, text))
        for text in (*said, *completions)
    )


def check(tokenizer, template: str, row, result) -> None:
    prompt, *completions = row
    rendered = [texts(tokenizer, template, prompt, completion) for completion in completions]
    prompt_ids = ids_of(tokenizer, rendered[0][0])
    wholes = [ids_of(tokenizer, whole) for _, whole in rendered]
    is_prefix = all(whole.startswith(start) for start, whole in rendered) and all(
        ids[: len(prompt_ids)] == prompt_ids for ids in wholes
    )
    if isinstance(result, Rejected):
        match result.reason:
            case "PREFIX_BROKEN":
                assert not is_prefix
            case "EMPTY_PROMPT":
                assert not prompt_ids
            case "NO_RESPONSE_TOKENS":  # white space alone may differ, or an unknown token stands for both
                behind = [[i for i in ids[len(prompt_ids) :] if not is_end_or_blank(tokenizer, i)] for ids in wholes]
                assert not all(behind) or behind[0] == behind[1]
            case other:
                pytest.fail(other)
        return
    assert is_prefix
    for expected, completion_ids in zip(wholes, result.completion_ids, strict=True):
        ours = [*result.prompt_ids.tolist(), *completion_ids.tolist()]
        if ours[:-1] == expected:
            assert ours[-1] == tokenizer.eos_token_id  # added where the template writes none
            continue
        assert expected[: len(ours)] == ours
        assert ours[-1] in {*tokenizer.all_special_ids, *special_ids(tokenizer)}
        assert all(is_end_or_blank(tokenizer, i) for i in expected[len(ours) :])


def special_ids(tokenizer) -> list[int]:
    return [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]


def is_end_or_blank(tokenizer, token: int) -> bool:
    return token in {*special_ids(tokenizer), *tokenizer.all_special_ids} or not tokenizer.decode([token]).strip()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, name=st.sampled_from(list(TEMPLATES)), rule=st.sampled_from(["quarantine", "allow"]))
def test_ids_are_those_of_the_rendered_whole(rows, name, rule, tokenizer):
    config = DataConfig.model_validate(
        {"train": "x.jsonl", "max_length_tokens": 10**6, "rules": {"special_tokens": rule}}
    )
    groups = [
        TextGroup(prompt, answers, (1.0, 0.0))
        for prompt, answers in ((prompt, (one, other)) for prompt, one, other in rows)
    ]
    results = tokenized_groups(groups, tokenizer, TEMPLATES[name], config)
    for row, result in zip(rows, results, strict=True):
        if rule == "quarantine" and spells_a_special_token(tokenizer, *row):
            assert isinstance(result, Rejected)
            assert result.reason == "SPECIAL_TOKEN_INJECTION"
        else:
            check(tokenizer, TEMPLATES[name], row, result)


# -- words


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    return byte_bpe(GPT2)


@pytest.mark.parametrize(
    ("name", "has_words"),
    [
        ("GPT-2's words", True),
        ("Llama 3's words", True),
        ("Qwen's words, NFC", True),
        ("Metaspace", False),
        ("Llama 2", False),
        ("lowercase", False),
    ],
)
def test_tokenizers_whose_words_are_known(name: str, has_words: bool):
    assert (Words.of(TOKENIZERS[name]().backend_tokenizer) is not None) == has_words


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{N}{1,3}(?=(?:\p{N}{3})*$)|" + GPT2,  # looks far ahead
        r"(?<=\s)x|" + GPT2,  # looks behind
        r"the user's|" + GPT2.replace(r"'s|", ""),  # a word with a space within
        r" ?\p{L}+ ?\p{L}*|" + GPT2,
        r"\p{Han}+|" + GPT2,  # a class that is not known
        GPT2.replace(r"|\s+(?!\S)|\s+", ""),  # white space is between words
    ],
)
def test_unusual_words_are_left_to_the_tokenizer(pattern: str):
    tokenizer = byte_bpe(pattern)
    words = Words.of(tokenizer.backend_tokenizer)
    if words is not None:  # then it makes no difference
        for text in ("the user's the user's", "a 1234567", "中文 the  x", " x x"):
            assert words.encode(text) == Encoder(tokenizer, plain=True)._ids([text])[0]


@settings(max_examples=100, deadline=None)
@given(begin=TEXT, end=TEXT)
def test_text_is_cut_at_settled_places_whatever_follows(begin: str, end: str, gpt2):
    words = Words.of(gpt2.backend_tokenizer)
    assert words is not None
    place = words.settled(begin)
    assert ids_of(gpt2, begin[:place]) + ids_of(gpt2, begin[place:] + end) == ids_of(gpt2, begin + end)


def test_characters_whose_class_may_change_are_left_to_the_tokenizer(gpt2):
    words = Words.of(gpt2.backend_tokenizer)
    assert words is not None
    assert words.encode("a \u0378") is None  # not assigned
    assert words.encode("a \ue000") is None  # private use
    assert words.encode("a \U0001e900") is None  # a letter of Unicode 9
    assert words.encode("a 😀 é 中") is not None


def test_a_tokenizer_that_turns_out_to_cut_otherwise_encodes_all_itself(gpt2, caplog: pytest.LogCaptureFixture):
    encoder = Encoder(gpt2, plain=True)
    text = Rendered("It is", ["It is good"])
    right = encoder.encode([text])
    encoder._words._spaced["good"] = b"\0\0\0\0"  # type: ignore[union-attr]
    assert encoder.encode([text] * 3) == right * 3
    assert "splits words differently" in caplog.text


def test_clean_starts():
    assert clean_starts(["<|im_start|>", "<|im_end|>", "<s>", "</s>"]) == {"<|im_start|>", "<|im_end|>", "<s>", "</s>"}
    assert clean_starts(["ab", "bc"]) == {"ab"}  # in `abc`, `ab` hides the start of `bc`
    assert clean_starts(["aa"]) == frozenset()  # in `aaa`, the second `a` starts one only where the first does not
    assert clean_starts(["xaby", "ab"]) == {"xaby"}
    assert clean_starts(["ab", "abc"]) == {"ab", "abc"}  # the same start, whichever it is


def test_words_are_forgotten_when_there_are_too_many(gpt2, monkeypatch: pytest.MonkeyPatch):
    words = Words.of(gpt2.backend_tokenizer)
    assert words is not None
    monkeypatch.setattr("dpo_ray.data.tokenizing.byte_bpe.MAX_PIECES", 10)
    text = " ".join(f"w{i}" for i in range(50))
    assert words.encode(text) == words.encode(text)
    assert len(words._spaced) <= 10
